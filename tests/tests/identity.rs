//! What an application holds on to stays.

use std::os::unix::fs::{FileExt, MetadataExt};

use everdisk_tests::{
    bytes::pattern,
    host::Host,
    processes::{self, mount_on},
    programs::{VERSION, VERSION_NEXT, core, core_next},
};

/// M5: the core alone is replaced; the mount, the inode and the open descriptor are the same before and after.
#[test]
fn m5_the_open_file_inode_and_mount_stay_through_upgrades_and_a_kill() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let file = volume.open();
    let before = file.metadata().unwrap();
    let mount = mount_on(&volume.path).expect("a mount");
    let interface = volume.status().interface();
    let mut pids = vec![volume.status().core()];
    let same = |step: u64| {
        let now = file.metadata().unwrap();
        assert_eq!((now.dev(), now.ino(), now.len()), (before.dev(), before.ino(), before.len()));
        assert_eq!(now.mode(), before.mode());
        assert_eq!(mount_on(&volume.path).as_ref(), Some(&mount));
        assert_eq!(volume.status().interface(), interface);
        for earlier in 0..=step {
            let data = pattern(earlier, 10_000);
            if earlier == step {
                file.write_all_at(&data, earlier * 123_457).unwrap();
            }
            let mut read = vec![0; data.len()];
            file.read_exact_at(&mut read, earlier * 123_457).unwrap();
            assert!(read == data, "what step {earlier} wrote, read at step {step}");
        }
        file.sync_all().unwrap();
    };
    same(0);
    assert_eq!(volume.version_by(&file), VERSION);
    for step in 1..=5 {
        let (program, version) = if step % 2 == 1 { (core_next(), VERSION_NEXT) } else { (core(), VERSION) };
        volume.upgrade(&program);
        assert_eq!(volume.version_by(&file), version);
        assert_eq!(volume.status().version(), version);
        pids.push(volume.status().core());
        same(step);
    }
    volume.settled();
    pids.push(volume.kill_core().core());
    assert_eq!(volume.version_by(&file), VERSION_NEXT);
    same(6);
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 7, "every core was another process: {pids:?}");
    drop(file);
    volume.detach();
    // What was written is there after the next attach, and the version stays.
    volume.attach(&[]);
    assert_eq!(volume.status().version(), VERSION_NEXT);
    let mut read = vec![0; 10_000];
    volume.open().read_exact_at(&mut read, 6 * 123_457).unwrap();
    assert!(read == pattern(6, 10_000));
    volume.detach();
}

/// M5: an upgrade leaves one core that serves, one standby, and no process of the old version.
#[test]
fn m5_an_upgrade_leaves_no_process_of_the_old_core() {
    let host = Host::new();
    let volume = host.volume("v", "16M");
    let old = volume.settled();
    volume.upgrade(&core_next());
    let new = volume.settled();
    assert_eq!(new.standby_version(), VERSION_NEXT, "{new:?}");
    for pid in [old.core().unwrap(), old.standby().unwrap()] {
        assert!(!processes::is_alive(pid), "process {pid} of the old core lives on");
    }
    assert_eq!(volume.processes().len(), 3, "interface, core, standby: {:#?}", volume.processes());
    volume.detach();
}
