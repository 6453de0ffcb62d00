//! The dir store at work: the conformance suite on tmpfs and on disk, a full disk, signals, growing, removing.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use everdisk_sys::{process, signal};
use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;
use uuid::Uuid;

use super::*;
use crate::conformance::{self, Fixture};

pub(super) fn format(len: u64) -> NodeFormat {
    let superblock = everdisk_proto::superblock::Superblock {
        volume: Uuid::from_u128(0xA),
        node: Uuid::from_u128(0xB),
        size: len,
        stripe: 64 << 10,
        index: 0,
        nodes: 1,
    };
    NodeFormat { superblock, len }
}

/// A node of `len` bytes below `parent`, confirmed.
pub(super) fn node(parent: &TempDir, len: u64) -> PathBuf {
    let path = parent.path().join("node");
    create(&path, &format(len)).unwrap().confirm();
    path
}

/// A tmpfs of a few MiB, unmounted on drop; `None` (and a message) where that is not allowed.
pub(super) struct SmallDisk(TempDir);

impl SmallDisk {
    pub(super) fn mount() -> Option<Self> {
        let dir = TempDir::new().unwrap();
        match rustix::mount::mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), Some(c"size=4m")) {
            Ok(()) => Some(Self(dir)),
            Err(e) => {
                let _ = writeln!(io::stderr(), "skipped: cannot mount a tmpfs ({e}); run as root");
                None
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

/// Makes its stores in fresh directories below one on the file system under test.
struct Directories {
    parent: TempDir,
    made: u64,
}

impl Directories {
    fn on(file_system: &str) -> Self {
        Self { parent: TempDir::new_in(file_system).unwrap(), made: 0 }
    }
}

impl Fixture for Directories {
    fn store(&mut self, len: u64) -> Arc<dyn Store> {
        self.made += 1;
        let path = self.parent.path().join(self.made.to_string());
        create(&path, &format(len)).unwrap().confirm();
        Arc::new(DirStore::open(&path, &format(len)).unwrap())
    }

    fn allocated_bytes(&self) -> Option<u64> {
        let path = self.parent.path().join(self.made.to_string());
        Some(fs::metadata(path.join("data")).unwrap().blocks() * 512)
    }
}

/// M7, on a file system in memory.
#[test]
fn conforms_on_tmpfs() {
    conformance::run(&mut Directories::on("/dev/shm"));
}

/// M7, on a file system on a disk.
#[test]
fn conforms_on_disk() {
    conformance::run(&mut Directories::on("/var/tmp"));
}

/// A full disk is ENOSPC, not a failed node: existing data can still be read, and space given back can be used again.
#[test]
fn enospc_is_reported_and_the_store_goes_on() {
    const MIB: usize = 1 << 20;
    let Some(disk) = SmallDisk::mount() else { return };
    let path = disk.path().join("node");
    create(&path, &format(64 << 20)).unwrap().confirm();
    let store = DirStore::open(&path, &format(64 << 20)).unwrap();
    let enospc = Some(Errno::NOSPC.raw_os_error());
    let data = vec![0xAB; MIB];
    store.write_at(0, &data).unwrap();

    let full = (1..8).map(|n| store.write_at(n << 20, &data)).find_map(Result::err);
    assert_eq!(full.as_ref().map(StoreError::errno), enospc, "{full:?}");
    assert!(full.unwrap().is_fault());
    assert_eq!(store.allocate(32 << 20, 8 << 20).err().map(|e| e.errno()), enospc);

    let mut bytes = vec![0; MIB];
    store.read_at(0, &mut bytes).unwrap();
    assert!(bytes == data, "what was written before is gone");
    store.write_at(4096, &bytes[..4096]).unwrap();
    store.flush().unwrap();
    store.discard(MIB as u64, 63 << 20).unwrap();
    store.write_at(40 << 20, &data).unwrap();
    store.read_at(40 << 20, &mut bytes).unwrap();
    assert!(bytes == data);
}

/// Workers are evicted by signals without SA_RESTART, and no signal may cause an error. Not every kernel interrupts
/// these calls, so the loops in `whole` are tested apart.
#[test]
fn signals_interrupt_no_operation() {
    let parent = TempDir::new_in("/dev/shm").unwrap();
    let len = 64 << 20;
    let store = DirStore::open(&node(&parent, len), &format(len)).unwrap();
    signal::install_evict().unwrap();
    let (worker, done) = (process::thread_id(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                signal::evict(std::process::id(), worker);
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        let data = vec![3; 1 << 20];
        let mut bytes = vec![0; 1 << 20];
        let outcome = (0..4).try_for_each(|round| {
            store.allocate(0, len)?;
            store.write_at(round << 20, &data)?;
            store.read_at(round << 20, &mut bytes)?;
            store.flush()?;
            store.next(0, Sought::Hole)?;
            store.write_zeroes(0, len / 2)?;
            store.discard(0, len)
        });
        done.store(true, Ordering::Relaxed);
        outcome.unwrap();
        assert!(bytes == data);
    });
}

/// Predecessor and successor of a hand-over have the node open at once.
#[test]
fn two_have_the_node_open_and_see_each_other() {
    let parent = TempDir::new().unwrap();
    let path = node(&parent, 1 << 20);
    let (old, new) =
        (DirStore::open(&path, &format(1 << 20)).unwrap(), DirStore::open(&path, &format(1 << 20)).unwrap());
    old.write_at(5, b"before").unwrap();
    let mut bytes = [0; 6];
    new.read_at(5, &mut bytes).unwrap();
    assert_eq!(&bytes, b"before");
}

#[test]
fn creation_makes_the_directories_above_and_undoes_them_unless_confirmed() {
    let parent = TempDir::new().unwrap();
    let path = parent.path().join("a/b/node");
    drop(create(&path, &format(4096)).unwrap());
    assert!(!parent.path().join("a").exists(), "something is left of an unconfirmed creation");

    create(&path, &format(4096)).unwrap().confirm();
    DirStore::open(&path, &format(4096)).unwrap();
    let mut names: Vec<_> = fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["data", "superblock"]);
}

/// The directory was there before, so it stays.
#[test]
fn an_unconfirmed_creation_keeps_the_operators_directory() {
    let parent = TempDir::new().unwrap();
    fs::create_dir(parent.path().join("lost+found")).unwrap();
    drop(create(parent.path(), &format(4096)).unwrap());
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
}

#[test]
fn destroy_removes_its_own_files_only_and_never_the_directory() {
    let parent = TempDir::new().unwrap();
    let NodeFormat { superblock, .. } = format(4096);
    let (volume, uuid) = (superblock.volume, superblock.node);
    let path = node(&parent, 4096);
    fs::write(path.join("notes"), "mine").unwrap();
    check_destroy(&path, volume, uuid).unwrap();
    assert!(destroy(&path, volume, uuid).unwrap());
    assert_eq!(fs::read_to_string(path.join("notes")).unwrap(), "mine");
    assert!(!path.join("data").exists() && !path.join("superblock").exists());

    fs::remove_file(path.join("notes")).unwrap();
    create(&path, &format(4096)).unwrap().confirm();
    // The state after an interrupted removal.
    fs::remove_file(path.join("data")).unwrap();
    check_destroy(&path, volume, uuid).unwrap();
    assert!(destroy(&path, volume, uuid).unwrap());
    assert!(path.exists());
    assert!(!destroy(&path, volume, uuid).unwrap(), "nothing is left");
    assert!(matches!(check_destroy(&path, volume, uuid), Err(OpenError::NoSuperblock { .. })));
}

/// Every state that a death can leave a resize in. At each node the data file and the superblock are old or new, and a
/// new superblock has not been begun, has been begun, or is whole. From each state the resize can be repeated and
/// undone, and nothing that was written is lost.
#[test]
fn a_resize_that_died_anywhere_can_be_repeated_and_undone() {
    let parent = TempDir::new().unwrap();
    let (old, new, newer) = (format(1 << 20), format(3 << 20), format(5 << 20));
    let path = node(&parent, old.len);
    DirStore::open(&path, &old).unwrap().write_at(1000, b"kept").unwrap();
    let encoded = |format: &NodeFormat| format.superblock.encode().to_vec();
    for (len, superblock) in [(old, old), (new, old), (new, new)] {
        for begun in [None, Some(b"half".to_vec()), Some(encoded(&new))] {
            for target in [old, new, newer] {
                File::options().write(true).open(path.join("data")).unwrap().set_len(len.len).unwrap();
                fs::write(path.join("superblock"), encoded(&superblock)).unwrap();
                begun.iter().for_each(|bytes| fs::write(path.join("superblock.new"), bytes).unwrap());
                check_resize(&path, &old, &target).unwrap();
                resize(&path, &old, &target).unwrap();
                let mut bytes = [0; 4];
                DirStore::open(&path, &target).unwrap().read_at(1000, &mut bytes).unwrap();
                assert_eq!(&bytes, b"kept");
            }
        }
    }
}

/// The file system's limit is found before anything is changed, and the temporary file is removed.
#[test]
fn a_length_that_the_file_system_cannot_hold_is_refused_by_the_check() {
    let parent = TempDir::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let (old, new) = (format(1 << 20), format(1 << 62));
    let path = node(&parent, old.len);
    let refused = check_resize(&path, &old, &new).unwrap_err();
    assert!(matches!(refused, OpenError::TooLarge { .. }), "{refused}");
    DirStore::open(&path, &old).unwrap();
    assert_eq!(fs::read_dir(&path).unwrap().count(), 2);
}

#[test]
fn a_node_that_may_not_be_changed_is_refused_before_anything_is() {
    let Some(disk) = SmallDisk::mount() else { return };
    let (old, new) = (format(4096), format(8192));
    create(disk.path(), &old).unwrap().confirm();
    let NodeFormat { superblock, .. } = old;
    rustix::mount::mount_remount(disk.path(), MountFlags::RDONLY, c"").unwrap();
    for refused in [
        check_resize(disk.path(), &old, &new),
        check_destroy(disk.path(), superblock.volume, superblock.node),
        check_open(disk.path(), &old),
    ] {
        assert!(matches!(refused, Err(OpenError::ReadOnly { .. })), "{refused:?}");
    }
}

#[test]
fn resize_keeps_the_bytes_and_can_be_repeated() {
    let parent = TempDir::new().unwrap();
    let (old, new) = (format(1 << 20), format(3 << 20));
    let path = node(&parent, old.len);
    DirStore::open(&path, &old).unwrap().write_at(1000, b"kept").unwrap();
    // Interrupted after the data file had grown, with a superblock begun.
    File::options().write(true).open(path.join("data")).unwrap().set_len(2 << 20).unwrap();
    fs::write(path.join("superblock.new"), "half").unwrap();

    check_resize(&path, &old, &new).unwrap();
    for _ in 0..2 {
        resize(&path, &old, &new).unwrap();
        let store = DirStore::open(&path, &new).unwrap();
        let mut bytes = [0; 4];
        store.read_at(1000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"kept");
        store.read_at((3 << 20) - 4, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4]);
    }
    assert!(!path.join("superblock.new").exists());
}
