//! Everything as an unprivileged user, through fusermount3.
//!
//! /dev/fuse may be closed to that user on this machine; so the test makes a mount namespace of its own with another
//! node of the same device that is open to all. Nothing outside changes.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use everdisk_tests::{
    host::{Host, Identity},
    processes,
    programs::{VERSION_NEXT, core_next, need, need_root},
    run::{Running, run},
    volume::Volume,
    wait::{SOON, until},
};

const USER: u32 = 65_534;

/// A process that keeps the namespace.
fn namespace(host: &Host) -> Running {
    let own = host.root().join("dev");
    fs::create_dir(&own).unwrap();
    let own = own.display();
    let script = format!(
        "set -e; mount -t tmpfs -o mode=755 none {own}; mknod {own}/fuse c 10 229; chmod 666 {own}/fuse; \
         mount --bind {own}/fuse /dev/fuse; touch {own}/ready; exec sleep 600"
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    let mut keeper = Running::start(command);
    let pid = keeper.pid();
    until("the namespace", || {
        assert!(!keeper.has_ended(), "the namespace could not be made: {:?}", keeper);
        fs::exists(format!("/proc/{pid}/root{own}/ready")).unwrap_or(false).then_some(())
    });
    keeper
}

fn prefix(keeper: u32) -> Vec<String> {
    let words = format!(
        "nsenter --mount=/proc/{keeper}/ns/mnt setpriv --reuid={USER} --regid={USER} --clear-groups --no-new-privs=off --"
    );
    words.split(' ').filter(|word| !word.contains("no-new-privs")).map(str::to_owned).collect()
}

fn by_user(host: &Host, script: &str) -> String {
    let mut command = host.command("sh");
    command.args(["-ec", script]);
    run(command, SOON).ok()
}

#[test]
fn an_unprivileged_user_does_everything_through_fusermount3() {
    need_root();
    for program in ["unshare", "nsenter", "setpriv", "fusermount3", "mknod"] {
        need(program);
    }
    // The programs of the build may lie where that user cannot go.
    let mut host = Host::idle(Identity { prefix: Vec::new(), uid: Some(USER) });
    let keeper = namespace(&host);
    host.set_prefix(prefix(keeper.pid()));
    host.take_programs();
    host.start_daemon();
    {
        let volume = host.create("v", "32M", 2);
        volume.attach(&[]);
        let file = volume.path.display().to_string();
        let status = volume.settled();
        assert!(status.serves(), "{status:?}");
        for pid in status.cores().into_iter().chain(status.interface()) {
            let owner = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            assert!(owner.contains(&format!("Uid:\t{USER}\t{USER}")), "process {pid} does not run as that user");
        }
        by_user(
            &host,
            &format!(
                "dd if=/dev/urandom of=/dev/shm/e2e-$$ bs=64k count=64 status=none; \
             dd if=/dev/shm/e2e-$$ of={file} bs=64k conv=notrunc,fsync status=none; \
             cmp -n 4194304 /dev/shm/e2e-$$ {file}; mv /dev/shm/e2e-$$ {0}/copy",
                host.file("").display()
            ),
        );
        let same = format!("cmp -n 4194304 {0}/copy {file}", host.file("").display());
        let next = host.copied(&core_next());
        volume.upgrade(&next);
        assert_eq!(volume.settled().version(), VERSION_NEXT);
        by_user(&host, &same);
        let before = volume.settled();
        processes::kill(before.core().unwrap());
        volume.wait("another core", |status| status.serves() && status.core() != before.core());
        by_user(&host, &same);
        let before = volume.settled();
        processes::kill(before.interface().unwrap());
        volume.wait("another interface", |s| s.serves() && s.interface() != before.interface());
        by_user(&host, &same);
        volume.ask("suspend", &["--lease", "20s"]).ok();
        volume.ask("resume", &[]).ok();
        // Not even root outside the namespace sees the mount; in it, root is another user and is kept out.
        assert_eq!(processes::mount_on(&volume.path), None);
        // What it sees there is the file below: after an unmount by hand only root could write into it.
        let below = fs::metadata(&volume.path).unwrap();
        assert_eq!((below.is_file(), below.len(), below.permissions().mode() & 0o7777), (true, 0, 0));
        let mut held = host.command("sh");
        held.args(["-c", &format!("exec 3<{file}; echo open; exec sleep 600")]);
        let holder = Running::start(held);
        until("the file is open", || {
            fs::read_link(format!("/proc/{}/fd/3", holder.pid())).ok().filter(|target| target.ends_with("v.img"))
        });
        volume.ask("detach", &[]).refused(1, &["in use"]);
        drop(holder);
        volume.ask("detach", &[]).ok();
        assert_eq!(volume.processes(), []);
        volume.attach(&[]);
        by_user(&host, &same);
        volume.ask("detach", &["--force", "--yes"]).ok();
        host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
        let _ = Volume::new(&host, "v");
    }
    host.stop_daemon();
    drop(keeper);
}
