//! Every directory that is not the expected node is refused. The error says which path, what is wrong and what to do
//! (D11).

use std::{fs, os::unix::fs::symlink};

use everdisk_proto::superblock::{BadSuperblock, Superblock};
use rustix::mount::MountFlags;
use tempfile::TempDir;
use uuid::Uuid;

use super::{
    tests::{SmallDisk, format, node},
    *,
};

const LEN: u64 = 1 << 20;

/// The error of opening `path`, which must name it and end in advice.
fn refusal(path: &Path, expected: &NodeFormat) -> OpenError {
    let error = DirStore::open(path, expected).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with(path.to_str().unwrap()), "{text}");
    assert!(text.contains(". ") && text.chars().filter(|c| *c == ' ').count() > 8, "no advice: {text}");
    error
}

/// The error of opening a sound node after its directory was changed by `damage`.
fn refusal_after(damage: impl FnOnce(&Path)) -> OpenError {
    let parent = TempDir::new().unwrap();
    let path = node(&parent, LEN);
    damage(&path);
    refusal(&path, &format(LEN))
}

/// The error of opening a sound node with another identity or layout.
fn refusal_as(change: impl FnOnce(&mut Superblock)) -> OpenError {
    let parent = TempDir::new().unwrap();
    let path = node(&parent, LEN);
    let mut expected = format(LEN);
    change(&mut expected.superblock);
    refusal(&path, &expected)
}

#[test]
fn d11_a_missing_directory_is_refused() {
    let missing = refusal_after(|path| fs::remove_dir_all(path).unwrap());
    assert!(matches!(missing, OpenError::Missing { .. }), "{missing:?}");
}

#[test]
fn d11_something_else_than_a_directory_is_refused() {
    let file = refusal_after(|path| {
        fs::remove_dir_all(path).unwrap();
        fs::write(path, "").unwrap();
    });
    assert!(matches!(file, OpenError::NotDirectory { .. }), "{file:?}");
}

#[test]
fn d11_a_missing_superblock_is_refused() {
    let missing = refusal_after(|path| fs::remove_file(path.join("superblock")).unwrap());
    assert!(matches!(missing, OpenError::NoSuperblock { .. }), "{missing:?}");
}

#[test]
fn d11_a_corrupt_superblock_is_refused() {
    let flipped = refusal_after(|path| {
        let mut bytes = fs::read(path.join("superblock")).unwrap();
        bytes[20] ^= 1;
        fs::write(path.join("superblock"), bytes).unwrap();
    });
    assert!(matches!(flipped, OpenError::BadSuperblock { source: BadSuperblock::Checksum { .. }, .. }), "{flipped:?}");
    let short = refusal_after(|path| fs::write(path.join("superblock"), "EVERDISK").unwrap());
    assert!(matches!(short, OpenError::BadSuperblock { source: BadSuperblock::Short(8), .. }), "{short:?}");
}

#[test]
fn d11_another_volume_or_node_is_refused_with_both_uuids() {
    let other = Uuid::from_u128(0xC);
    let volume = refusal_as(|s| s.volume = other);
    assert!(matches!(volume, OpenError::OtherVolume { .. }), "{volume:?}");
    let text = volume.to_string();
    assert!(text.contains(&other.to_string()) && text.contains(&Uuid::from_u128(0xA).to_string()), "{text}");
    let node = refusal_as(|s| s.node = other);
    assert!(matches!(node, OpenError::OtherNode { .. }), "{node:?}");
}

#[test]
fn d11_another_layout_is_refused() {
    type Change = fn(&mut Superblock);
    let changes: [(&str, Change); 4] = [
        ("place", |s| s.index = 1),
        ("number of storage nodes", |s| s.nodes = 2),
        ("stripe unit", |s| s.stripe *= 2),
        ("volume size", |s| s.size *= 2),
    ];
    for (property, change) in changes {
        let error = refusal_as(change);
        assert!(matches!(error, OpenError::OtherLayout { what, .. } if what == property), "{error:?}");
    }
}

#[test]
fn d11_a_missing_data_file_is_refused() {
    let missing = refusal_after(|path| fs::remove_file(path.join("data")).unwrap());
    assert!(matches!(missing, OpenError::NoData { .. }), "{missing:?}");
}

#[test]
fn d11_a_truncated_or_extended_data_file_is_refused() {
    for len in [LEN - 1, 0, LEN + 4096] {
        let error = refusal_after(|path| {
            File::options().write(true).open(path.join("data")).unwrap().set_len(len).unwrap();
        });
        assert!(matches!(error, OpenError::DataLength { found, expected: LEN, .. } if found == len), "{error:?}");
    }
}

#[test]
fn links_fifos_and_directories_in_place_of_a_file_are_refused() {
    for name in ["data", "superblock"] {
        let replace = |make: fn(&Path)| {
            refusal_after(|path| {
                fs::rename(path.join(name), path.join("elsewhere")).unwrap();
                make(&path.join(name));
            })
        };
        let errors = [
            replace(|path| symlink("elsewhere", path).unwrap()),
            replace(|path| fs::create_dir(path).unwrap()),
            replace(|path| {
                let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
                rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
            }),
        ];
        for error in errors {
            assert!(matches!(error, OpenError::NotFile { .. }), "{name}: {error:?}");
        }
    }
}

#[test]
fn a_read_only_node_is_refused() {
    let Some(disk) = SmallDisk::mount() else { return };
    let path = disk.path().join("node");
    create(&path, &format(LEN)).unwrap().confirm();
    rustix::mount::mount_remount(disk.path(), MountFlags::RDONLY, "").unwrap();
    let error = refusal(&path, &format(LEN));
    assert!(matches!(error, OpenError::ReadOnly { .. }), "{error:?}");
    let error = create(&disk.path().join("other"), &format(LEN)).unwrap_err();
    assert!(matches!(error, OpenError::ReadOnly { .. }), "{error:?}");
}

#[test]
fn creation_refuses_a_node_and_names_its_volume() {
    let parent = TempDir::new().unwrap();
    let path = node(&parent, LEN);
    let error = create(&path, &format(LEN)).unwrap_err();
    assert!(matches!(error, OpenError::InUse { volume, .. } if volume == Uuid::from_u128(0xA)), "{error:?}");
    assert!(error.to_string().contains(&Uuid::from_u128(0xA).to_string()));
    DirStore::open(&path, &format(LEN)).unwrap();
}

#[test]
fn creation_refuses_a_directory_with_anything_in_it_and_leaves_it_alone() {
    for name in ["data", "superblock.new", "photos"] {
        let parent = TempDir::new().unwrap();
        fs::write(parent.path().join(name), "dear").unwrap();
        let error = create(parent.path(), &format(LEN)).unwrap_err();
        assert!(matches!(&error, OpenError::NotEmpty { entry, .. } if entry == name), "{error:?}");
        assert_eq!(fs::read_to_string(parent.path().join(name)).unwrap(), "dear");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }
}

#[test]
fn creation_refuses_a_size_beyond_the_file_system_and_leaves_nothing() {
    let parent = TempDir::new_in("/var/tmp").unwrap();
    let path = parent.path().join("node");
    let error = create(&path, &format(1 << 62)).unwrap_err();
    assert!(matches!(error, OpenError::TooLarge { .. }), "{error:?}");
    assert!(!path.exists());
}

#[test]
fn destruction_refuses_what_is_not_its_own() {
    let parent = TempDir::new().unwrap();
    let path = node(&parent, LEN);
    let (volume, uuid, other) = (Uuid::from_u128(0xA), Uuid::from_u128(0xB), Uuid::from_u128(0xC));
    assert!(matches!(destroy(&path, other, uuid), Err(OpenError::OtherVolume { .. })));
    assert!(matches!(destroy(&path, volume, other), Err(OpenError::OtherNode { .. })));
    DirStore::open(&path, &format(LEN)).unwrap();
    fs::write(path.join("superblock"), "?").unwrap();
    assert!(matches!(destroy(&path, volume, uuid), Err(OpenError::BadSuperblock { .. })));
    assert!(path.join("data").exists());
}

#[test]
fn resize_refuses_another_node_or_length() {
    let parent = TempDir::new().unwrap();
    let path = node(&parent, LEN);
    let (old, new) = (format(LEN), format(2 * LEN));
    let mut foreign = old;
    foreign.superblock.node = Uuid::from_u128(0xC);
    assert!(matches!(resize(&path, &foreign, &new), Err(OpenError::OtherNode { .. })));
    assert!(matches!(resize(&path, &new, &format(3 * LEN)), Err(OpenError::OtherLayout { .. })));
    let data = File::options().write(true).open(path.join("data")).unwrap();
    data.set_len(LEN / 2).unwrap();
    assert!(matches!(check_resize(&path, &old, &new), Err(OpenError::DataLength { .. })));
    // What was written above the new end is never cut off. What was not written is no loss.
    std::os::unix::fs::FileExt::write_all_at(&data, b"dear", 3 * LEN).unwrap();
    for resized in [check_resize(&path, &old, &new), resize(&path, &old, &new), resize(&path, &old, &old)] {
        assert!(matches!(resized, Err(OpenError::Beyond { .. })), "{resized:?}");
    }
    assert_eq!(data.metadata().unwrap().len(), 3 * LEN + 4);
    data.set_len(2 * LEN).unwrap();
    data.set_len(4 * LEN).unwrap();
    check_resize(&path, &old, &new).unwrap();
    resize(&path, &old, &new).unwrap();
    DirStore::open(&path, &new).unwrap();
}

/// Changes of the node that an open store notices.
#[test]
fn d11_recheck_notices_another_superblock_and_reads_notice_lost_data() {
    let parent = TempDir::new().unwrap();
    let path = node(&parent, LEN);
    let store = DirStore::open(&path, &format(LEN)).unwrap();
    store.recheck().unwrap();
    fs::write(path.join("superblock"), Superblock { index: 1, ..format(LEN).superblock }.encode()).unwrap();
    let error = store.recheck().unwrap_err();
    assert!(matches!(error, StoreError::Changed { .. }), "{error}");
    assert_eq!(error.errno(), Errno::IO.raw_os_error());
    File::options().write(true).open(path.join("data")).unwrap().set_len(LEN / 2).unwrap();
    let error = store.read_at(LEN / 2 - 10, &mut [0; 20]).unwrap_err();
    assert!(matches!(error, StoreError::Truncated { at, .. } if at == LEN / 2), "{error}");
}

/// A process that serves a node has the lock of its data file.
#[test]
fn a_node_that_somebody_has_is_neither_grown_nor_removed_and_the_refusal_names_who_has_it() {
    let parent = TempDir::new().unwrap();
    let path = node(&parent, LEN);
    let (old, new) = (format(LEN), format(2 * LEN));
    let (volume, uuid) = (old.superblock.volume, old.superblock.node);
    let served = File::options().read(true).write(true).open(path.join("data")).unwrap();
    rustix::fs::flock(&served, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    for refused in [check_resize(&path, &old, &new), resize(&path, &old, &new), destroy(&path, volume, uuid).map(drop)]
    {
        let error = refused.unwrap_err();
        assert!(matches!(error, OpenError::Held { .. }), "{error:?}");
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    }
    DirStore::open(&path, &old).expect("as it was; the cores of one volume have it open together");
    drop(served);
    resize(&path, &old, &new).unwrap();
    resize(&path, &old, &new).expect("nothing is left locked");
    destroy(&path, volume, uuid).unwrap();
    assert!(!path.join("data").exists());
}

/// No core serves a node before all nodes of its volume are made.
#[test]
fn a_node_is_locked_until_its_creation_is_confirmed() {
    let parent = TempDir::new().unwrap();
    let path = parent.path().join("node");
    let made = create(&path, &format(LEN)).unwrap();
    let file = File::open(path.join("data")).unwrap();
    let lock = || rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    assert_eq!(lock(), Err(Errno::WOULDBLOCK));
    made.confirm();
    lock().unwrap();
}

/// A file mounted over a node's file is not the node's.
#[test]
fn d11_a_file_that_is_covered_by_a_mount_is_refused() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    for name in ["data", "superblock"] {
        let parent = TempDir::new().unwrap();
        let path = node(&parent, LEN);
        let copy = parent.path().join("copy");
        fs::copy(path.join(name), &copy).unwrap();
        rustix::mount::mount_bind(&copy, path.join(name)).unwrap();
        let error = DirStore::open(&path, &format(LEN));
        let kept = destroy(&path, format(LEN).superblock.volume, format(LEN).superblock.node);
        rustix::mount::unmount(path.join(name), rustix::mount::UnmountFlags::DETACH).unwrap();
        for error in [error.map(drop).unwrap_err(), kept.unwrap_err()] {
            assert!(matches!(error, OpenError::Covered { .. }), "{name}: {error:?}");
        }
        DirStore::open(&path, &format(LEN)).unwrap();
    }
}
