//! The file with real system calls: what an application may do, what it may not, and which users may access it.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::{
        fs::{FileExt, MetadataExt},
        process::CommandExt,
    },
    path::Path,
    process::Command,
};

use everdisk_tests::{
    bytes::{Aligned, pattern},
    host::Host,
    run::{Output, run},
    volume::Volume,
    wait::{SOON, until},
};
use rustix::{
    fs::{FallocateFlags, OFlags, SeekFrom, fallocate, seek},
    io::Errno,
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Errno {
    Errno::from_io_error(&result.expect_err("an error")).expect("an error of the kernel")
}

fn read(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    file.read_exact_at(&mut data, offset).unwrap();
    data
}

#[test]
fn direct_and_buffered_io_aligned_and_not_see_the_same_bytes() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let plain = volume.open();
    let direct = volume.open_with(OFlags::DIRECT).unwrap();
    let mut model = vec![0; 8 << 20];
    let cases: [(u64, usize); 9] = [
        (0, 4096),
        (1, 1),
        (4095, 2),
        (65_535, 2),
        (65_536, 65_536),
        (131_071, 131_074),
        (MIB - 3, 2 << 20),
        (3 * MIB + 7, 3 << 20),
        (7 * MIB, 1 << 20),
    ];
    for (seed, (offset, len)) in (0..).zip(cases) {
        let data = pattern(seed, len);
        // Unaligned O_DIRECT is the storage node's business, not the application's.
        let file = if seed % 2 == 0 { &direct } else { &plain };
        let buffer = Aligned::of(&data);
        file.write_all_at(buffer.as_ref(), offset).unwrap();
        let start = usize::try_from(offset).unwrap();
        model[start..start + len].copy_from_slice(&data);
        for reader in [&plain, &direct] {
            let mut found = Aligned::new(model.len());
            reader.read_exact_at(found.as_mut(), 0).unwrap();
            assert!(found.as_ref() == model, "after {len} bytes at {offset}");
        }
    }
    plain.sync_all().unwrap();
    let durable = volume.open_with(OFlags::DSYNC | OFlags::DIRECT).unwrap();
    durable.write_all_at(Aligned::of(&pattern(77, 8192)).as_ref(), 40_960).unwrap();
    let synchronous = volume.open_with(OFlags::SYNC).unwrap();
    synchronous.write_all_at(&pattern(78, 100), 50_000).unwrap();
    assert!(read(&plain, 40_960, 8192) == pattern(77, 8192) && read(&plain, 50_000, 100) == pattern(78, 100));
    // O_APPEND begins at the end: like on a disk that is full.
    let append = OpenOptions::new().append(true).open(&volume.path).unwrap();
    assert_eq!(errno(io::Write::write(&mut &append, &[1])), Errno::NOSPC);
    volume.detach_after(vec![plain, direct, durable, synchronous, append]);
}

trait DetachAfter {
    fn detach_after(&self, files: Vec<File>);
}

impl DetachAfter for Volume<'_> {
    fn detach_after(&self, files: Vec<File>) {
        drop(files);
        self.detach();
    }
}

/// A shared mapping, written, synced and read by another descriptor, by fio's mmap engine; an upgrade in between.
#[test]
fn a_shared_mapping_is_written_and_read_by_others() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let fio = |arguments: &[&str]| {
        everdisk_tests::programs::need("fio");
        let mut command = Command::new("fio");
        command.current_dir(host.root().join("files")).arg(format!("--filename={}", volume.path.display()));
        command.args(["--name=mapped", "--output-format=json", "--size=48m", "--bs=64k", "--randseed=5"]);
        command.args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randrepeat=1"]);
        command.args(arguments);
        everdisk_tests::fio::check(&run(command, 3 * SOON))
    };
    for (seed, rw) in [(1, "write"), (2, "randwrite")] {
        let rw = format!("--rw={rw}");
        assert!(fio(&["--ioengine=mmap", &rw, "--do_verify=1", "--end_fsync=1"]) > 0);
        if seed == 1 {
            volume.upgrade(&everdisk_tests::programs::core_next());
        }
        fio(&["--ioengine=psync", "--direct=1", &rw, "--verify_only=1"]);
        fio(&["--ioengine=mmap", &rw, "--verify_only=1"]);
    }
    volume.detach();
}

#[test]
fn the_end_of_the_file_is_the_end_of_the_disk() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let file = volume.open();
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    assert_eq!(seek(&file, SeekFrom::End(0)).unwrap(), SIZE);
    assert_eq!(file.write_at(&[1; 100], SIZE - 40).unwrap(), 40, "short at the end");
    assert_eq!(read(&file, SIZE - 40, 40), [1; 40]);
    for past in [SIZE, SIZE + 1, SIZE + 4096, 1 << 40] {
        let error = errno(file.write_at(&[1], past));
        assert!([Errno::NOSPC, Errno::FBIG].contains(&error), "{error} at {past}");
        assert_eq!(file.read_at(&mut [0; 10], past).unwrap(), 0, "nothing to read at {past}");
    }
    assert_eq!(file.read_at(&mut [0; 100], SIZE - 40).unwrap(), 40);
    assert_eq!(file.write_at(&[], SIZE).unwrap(), 0);
    assert_eq!(file.metadata().unwrap().len(), SIZE, "the size does not change");
    volume.detach_after(vec![file]);
}

#[test]
fn truncation_and_changes_of_the_file_itself_are_refused() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let file = volume.open();
    file.write_all_at(&pattern(1, 4096), 0).unwrap();
    for len in [0, SIZE / 2, SIZE + 1, SIZE * 2] {
        assert_eq!(errno(file.set_len(len)), Errno::PERM, "{len}");
    }
    file.set_len(SIZE).unwrap();
    assert_eq!(errno(OpenOptions::new().write(true).truncate(true).open(&volume.path)), Errno::PERM);
    assert!(std::fs::remove_file(&volume.path).is_err(), "a mount point cannot be removed");
    assert!(std::fs::rename(&volume.path, host.file("other")).is_err());
    assert!(std::fs::hard_link(&volume.path, host.file("link")).is_err());
    assert!(rustix::fs::fsetxattr(&file, "user.x", b"1", rustix::fs::XattrFlags::empty()).is_err());
    // cp and touch set times; that is let pass.
    file.set_modified(std::time::SystemTime::now()).unwrap();
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    assert!(read(&file, 0, 4096) == pattern(1, 4096));
    volume.detach_after(vec![file]);
}

fn allocated(volume: &Volume<'_>) -> u64 {
    (0..2).map(|node| volume.node(node).join("data").metadata().unwrap().blocks() * 512).sum()
}

#[test]
fn holes_zeros_and_reservations_reach_the_storage_nodes() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let file = volume.open();
    let data = pattern(1, 16 << 20);
    file.write_all_at(&data, 0).unwrap();
    file.sync_all().unwrap();
    let full = allocated(&volume);
    assert!(full >= 16 * MIB, "{full}");
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 2 * MIB, 8 * MIB).unwrap();
    until("the hole gives its space back", || (allocated(&volume) <= full - 7 * MIB).then_some(()));
    assert!(read(&file, 2 * MIB, 8 << 20).iter().all(|b| *b == 0));
    // Edges that are not aligned keep what is beside them.
    fallocate(&file, punch, 12 * MIB + 11, 70_000).unwrap();
    let mut expected = data;
    expected[2 << 20..10 << 20].fill(0);
    expected[(12 << 20) + 11..(12 << 20) + 70_011].fill(0);
    assert!(read(&file, 0, 16 << 20) == expected, "unaligned hole");
    fallocate(&file, FallocateFlags::ZERO_RANGE, 14 * MIB + 3, MIB).unwrap();
    expected[(14 << 20) + 3..(15 << 20) + 3].fill(0);
    assert!(read(&file, 0, 16 << 20) == expected, "zeroed range");
    fallocate(&file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, 0, 4096).unwrap();
    expected[..4096].fill(0);
    // A reservation changes no byte.
    fallocate(&file, FallocateFlags::empty(), 0, SIZE).unwrap();
    assert!(read(&file, 0, 16 << 20) == expected, "reservation");
    assert!(allocated(&volume) >= SIZE, "{}", allocated(&volume));
    // Past the end there is nothing to reserve; a hole there is none.
    assert!([Errno::NOSPC, Errno::FBIG].contains(&fallocate(&file, FallocateFlags::empty(), SIZE, 1).unwrap_err()));
    fallocate(&file, punch, SIZE - 4096, 8192).unwrap();
    for mode in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE] {
        assert!(fallocate(&file, mode, 0, 65_536).is_err(), "{mode:?}");
    }
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    volume.detach_after(vec![file]);
}

#[test]
fn data_and_holes_can_be_sought() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let file = volume.open();
    assert_eq!(seek(&file, SeekFrom::Data(0)), Err(Errno::NXIO), "an empty volume has no data");
    assert_eq!(seek(&file, SeekFrom::Hole(0)), Ok(0));
    file.write_all_at(&[7; 4096], 10 * MIB).unwrap();
    file.write_all_at(&pattern(1, 200_000), 30 * MIB).unwrap();
    let found = seek(&file, SeekFrom::Data(0)).unwrap();
    assert!(found <= 10 * MIB && found + 65_536 > 10 * MIB, "{found}");
    assert_eq!(seek(&file, SeekFrom::Data(10 * MIB)), Ok(10 * MIB));
    let hole = seek(&file, SeekFrom::Hole(10 * MIB)).unwrap();
    assert!((10 * MIB + 4096..30 * MIB).contains(&hole), "{hole}");
    let data = seek(&file, SeekFrom::Data(hole)).unwrap();
    assert!(data > hole && data <= 30 * MIB, "{data}");
    assert!(seek(&file, SeekFrom::Hole(30 * MIB)).unwrap() >= 30 * MIB + 200_000);
    assert_eq!(seek(&file, SeekFrom::Data(40 * MIB)), Err(Errno::NXIO));
    assert_eq!(seek(&file, SeekFrom::Hole(SIZE - 1)), Ok(SIZE - 1));
    assert_eq!(seek(&file, SeekFrom::Data(SIZE)), Err(Errno::NXIO));
    volume.detach_after(vec![file]);
}

/// As another user.
fn as_nobody(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).uid(65_534).gid(65_534).current_dir("/");
    run(command, SOON)
}

fn copy(path: &Path, write: bool) -> Output {
    let path = path.to_str().unwrap();
    let (from, to) =
        if write { ("if=/dev/zero", format!("of={path}")) } else { ("bs=4096", "of=/dev/null".to_owned()) };
    let input = format!("if={path}");
    let mut arguments = vec![from, &to, "count=1", "conv=notrunc"];
    if !write {
        arguments.push(&input);
    }
    as_nobody("dd", &arguments)
}

#[test]
fn other_users_are_kept_out_unless_they_are_let_in() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    for write in [false, true] {
        let output = copy(&volume.path, write);
        assert_ne!(output.code(), 0, "{output:?}");
        assert!(output.stderr.contains("Permission denied"), "{}", output.stderr);
    }
    volume.detach();
    volume.attach(&["--allow-other", "--mode", "0644"]);
    assert_eq!(copy(&volume.path, false).code(), 0);
    assert_ne!(copy(&volume.path, true).code(), 0, "the file's mode counts");
    volume.detach();
    volume.attach(&["--allow-other", "--mode", "0666"]);
    for write in [false, true] {
        copy(&volume.path, write).ok();
    }
    assert_eq!(volume.open().metadata().unwrap().mode() & 0o777, 0o666);
    volume.upgrade(&everdisk_tests::programs::core_next());
    copy(&volume.path, true).ok();
    volume.detach();
    volume.attach(&["--owner", "65534:65534", "--allow-other"]);
    copy(&volume.path, true).ok();
    let metadata = std::fs::metadata(&volume.path).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o777), (65_534, 65_534, 0o600));
    volume.detach();
}

/// An application that is interrupted while its request is suspended gives up when it is killed, and nothing hangs.
#[test]
fn an_application_killed_while_its_request_waits_can_end() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let path = volume.path.to_str().unwrap().to_owned();
    for _ in 0..5 {
        let file = volume.open();
        volume.ask("suspend", &["--lease", "60s"]).ok();
        let mut command = Command::new("dd");
        command.args(["if=/dev/zero", &format!("of={path}"), "bs=64k", "count=4", "conv=notrunc,nocreat"]);
        let application = everdisk_tests::run::Running::start(command);
        volume.wait("a held request", |status| status.0["waiting"].as_u64().is_some_and(|held| held > 0));
        volume.ask("resume", &[]).ok();
        application.end(SOON).ok();
        // Killed in the middle of its work, while upgrades go on.
        let mut command = Command::new("dd");
        command.args(["if=/dev/zero", &format!("of={path}"), "bs=64k", "count=100000000", "conv=notrunc,nocreat"]);
        command.arg("oflag=direct").arg("seek=1");
        let application = everdisk_tests::run::Running::start(command);
        let pid = application.pid();
        volume.settled();
        let upgrade = volume.upgrading(&volume.other_core(), &["--soak", "0s"]);
        everdisk_tests::processes::kill(pid);
        drop(application);
        upgrade.end(3 * SOON).ok();
        file.write_all_at(&[1], 0).unwrap();
    }
    volume.wait("nothing left over", |status| status.0["waiting"].as_u64() == Some(0));
    volume.detach();
}
