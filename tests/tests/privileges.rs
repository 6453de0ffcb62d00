//! What a core may do, and which program may become one.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use everdisk_tests::{
    host::{Host, Identity},
    programs::{core_next, need, need_root},
    run::sh,
    volume::Volume,
};
use rustix::fs::{Gid, Uid, chown};

/// What a core keeps: CAP_IPC_LOCK (capability 14), and CAP_DAC_READ_SEARCH (capability 2) to read nodes of other users.
const KEPT: &str = "0000000000004004";
const NONE: &str = "0000000000000000";
const NOBODY: u32 = 65_534;

/// What the kernel says of every thread of a core.
fn has_no_privileges(pid: u32) {
    let threads: Vec<_> = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().collect();
    assert!(threads.len() > 1, "a core has threads");
    for thread in threads {
        let Ok(status) = fs::read_to_string(thread.path().join("status")) else { continue };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.expect("the kernel tells of it").trim_start_matches(':').trim().to_owned()
        };
        let found = ["CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb", "NoNewPrivs"].map(field);
        assert_eq!(found, [KEPT, KEPT, NONE, NONE, NONE, "1"], "thread {:?} of core {pid}", thread.file_name());
    }
}

/// Whether a core has opened a data file such that reading it is not noted (`O_NOATIME`): its owner may, and CAP_FOWNER.
fn reads_without_a_trace(pid: u32) -> bool {
    const O_NOATIME: u32 = 0o1_000_000;
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten().any(|fd| {
        let is_data = fs::read_link(fd.path()).is_ok_and(|file| file.ends_with("data"));
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.file_name().display())).unwrap_or_default();
        let flags = info.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
        is_data && flags.is_some_and(|flags| flags & O_NOATIME != 0)
    })
}

fn all_without_privileges(volume: &Volume<'_>) {
    let status = volume.settled();
    let cores = status.cores();
    assert!(cores.len() >= 2, "one that serves and a standby: {status:?}");
    for pid in cores {
        has_no_privileges(pid);
    }
}

/// Root's cores keep nothing of root but the right to lock memory, through an upgrade and a death, also where the nodes belong
/// to another user and where no process may lock memory without that capability.
#[test]
fn cores_run_without_privileges_on_nodes_of_another_user() {
    need_root();
    need("prlimit");
    let mut host = Host::idle(Identity::default());
    host.set_prefix(["prlimit", "--memlock=65536", "--"].map(str::to_owned).to_vec());
    host.start_daemon();
    {
        let volume = host.create("v", "64M", 2);
        for number in 0..2 {
            let node = volume.node(number);
            let own = |path: &Path, mode: u32| {
                chown(path, Some(Uid::from_raw(NOBODY)), Some(Gid::from_raw(NOBODY))).unwrap();
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            };
            for file in fs::read_dir(&node).unwrap() {
                own(&file.unwrap().path(), 0o600);
            }
            own(&node, 0o700);
        }
        volume.attach(&[]);
        all_without_privileges(&volume);
        assert!(reads_without_a_trace(volume.settled().core().unwrap()));
        let file = volume.path.to_str().unwrap();
        let (from, copy) = (host.root().join("from"), host.root().join("copy"));
        let (from, copy) = (from.to_str().unwrap(), copy.to_str().unwrap());
        sh("dd", &["if=/dev/urandom", &format!("of={from}"), "bs=1M", "count=64", "status=none"]);
        sh("dd", &[&format!("if={from}"), &format!("of={file}"), "bs=1M", "conv=notrunc,fsync", "status=none"]);
        let holds = || {
            sh("dd", &[&format!("if={file}"), &format!("of={copy}"), "bs=1M", "iflag=direct", "status=none"]);
            sh("cmp", &[from, copy]);
        };
        holds();
        let report = volume.upgrade(&core_next());
        // The new core has read its nodes' superblocks anew, and found them to be the volume's (D11).
        assert!(
            report.0["verified_blocks"].as_u64().unwrap() > 0 && report.0["notes"].as_array().unwrap().is_empty(),
            "{report:?}"
        );
        assert!(volume.settled().0["nodes"].as_array().unwrap().iter().all(|node| node["state"] == "in-step"));
        all_without_privileges(&volume);
        holds();
        volume.kill_core();
        all_without_privileges(&volume);
        holds();
        volume.detach();
        host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
    }
    host.stop_daemon();
}

fn digest(path: &Path) -> String {
    let line = sh("sha256sum", &[path]);
    line.split_whitespace().next().unwrap().trim_start_matches('\\').to_owned()
}

/// What became of an upgrade says which bytes it ran.
#[test]
fn an_upgrade_records_the_digest_of_what_it_ran() {
    let host = Host::new();
    let volume = host.volume("v", "16M");
    let report = volume.upgrade(&core_next());
    let expected = digest(&core_next());
    assert_eq!(report.0["digest"], expected.as_str());
    let status = volume.settled();
    assert_eq!(status.0["last_upgrade"]["digest"], expected.as_str());
    for pid in status.cores() {
        assert_eq!(digest(Path::new(&format!("/proc/{pid}/exe"))), expected);
    }
    let ended = host.everdisk(&["--json", "rollback", "v"]).ok();
    assert!(ended.contains(&digest(&host.core())), "{ended}");
    volume.detach();
}

/// A program that other users may write is not run as a core, not even for its version.
#[test]
fn a_program_that_others_may_write_does_not_become_a_core() {
    let host = Host::new();
    let volume = host.volume("v", "16M");
    let core = host.root().join("bin/core");
    fs::create_dir(core.parent().unwrap()).unwrap();
    let ran = host.root().join("ran");
    let text = format!("#!/bin/sh\n: > {}\nexec {} \"$@\"\n", ran.display(), core_next().display());
    fs::write(&core, text).unwrap();
    let mode = |path: &Path, mode: u32| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let refused = |words: &[&str]| {
        let path = core.to_str().unwrap();
        let mut words = words.to_vec();
        words.extend([path, "is not run", "install -o root"]);
        volume.ask("upgrade", &["--core", path, "--plan"]).refused(1, &words);
        volume.ask("upgrade", &["--core", path, "--soak", "0s"]).refused(1, &words);
        assert!(!ran.exists(), "it was run");
    };
    for (file, around, words) in
        [(0o775, 0o755, "may write it"), (0o757, 0o755, "may write it"), (0o755, 0o777, "may replace it")]
    {
        mode(&core, file);
        mode(core.parent().unwrap(), around);
        refused(&[words]);
    }
    mode(core.parent().unwrap(), 0o755);
    chown(&core, Some(Uid::from_raw(NOBODY)), None).unwrap();
    refused(&["belongs to user 65534"]);
    chown(&core, Some(Uid::from_raw(0)), None).unwrap();
    let before = volume.settled();
    volume.ask("upgrade", &["--core", core.to_str().unwrap(), "--plan"]).ok();
    assert_eq!(volume.settled().core(), before.core());
    volume.upgrade(&core);
    assert!(ran.exists());
    volume.detach();
}

#[test]
fn every_program_tells_what_it_is_for() {
    for name in ["everdisk-interface", "everdisk-core", "everdiskd", "everdisk"] {
        let program = everdisk_tests::programs::program(name);
        let said = sh(program.to_str().unwrap(), &["--help"]);
        assert!(said.contains("Usage") && said.contains("--"), "{said}");
    }
}

/// A crash writes no memory out, neither to a file nor to a program that core_pattern names: that would hold users' data, and the
/// process would be alive until it is complete.
#[test]
fn d15_no_core_dump_is_written_of_a_core_or_an_interface() {
    let host = Host::new();
    let volume = host.volume("v", "16M");
    let status = volume.settled();
    for pid in [status.core(), status.standby(), status.interface()] {
        let pid = pid.expect("it runs");
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let limit = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
        // 1 is what the kernel takes as "not even to a program"; 0 means files only.
        assert_eq!(limit.split_whitespace().next(), Some("1"), "{limit}");
        assert_eq!(fs::read_to_string(format!("/proc/{pid}/coredump_filter")).unwrap().trim(), "00000000");
    }
}
