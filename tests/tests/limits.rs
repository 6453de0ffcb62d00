//! Limits of the operating system: what is too little is named before anything is started, and running out of something is no end.

use std::{fs, io::ErrorKind};

use everdisk_tests::{
    host::{Host, Identity},
    nbd::{Client, Exported, Kind},
    processes::mount_on,
    programs::need_root,
    run::sh,
    wait::until,
};

/// A host behind limits, without the right to raise them.
fn limited(limits: &[&str]) -> Host {
    need_root();
    let drop = "-ipc_lock,-sys_resource";
    let mut prefix = vec!["setpriv", "--bounding-set", drop, "--inh-caps", drop, "prlimit"];
    prefix.extend(limits);
    let prefix = prefix.into_iter().map(str::to_owned).collect();
    let mut host = Host::idle(Identity { prefix, ..Identity::default() });
    host.start_daemon();
    host
}

/// 9: attach reports success only when a core serves: a limit that is too low is refused and named, and nothing is left.
#[test]
fn a_limit_that_is_too_low_is_named_before_anything_is_attached() {
    for (limit, words) in [
        ("--memlock=65536", &["RLIMIT_MEMLOCK", "65536", "LimitMEMLOCK"][..]),
        ("--nofile=128", &["RLIMIT_NOFILE", "128"]),
    ] {
        let host = limited(&[limit]);
        let volume = host.create("v", "16M", 1);
        volume.try_attach(&[]).refused(1, words);
        assert_eq!((volume.status().state(), mount_on(&volume.path)), ("detached", None));
        assert_eq!(volume.processes(), []);
        until("it is logged", || (!host.logged(&["operator", "attach", words[0]]).is_empty()).then_some(()));
    }
}

/// 9: a file that may not become as long as the volume's would cost a core its life.
#[test]
fn a_file_size_limit_is_named() {
    need_root();
    let mut host = Host::idle(Identity::default());
    host.start_daemon();
    host.create("v", "64M", 1);
    host.stop_daemon();
    let drop = "-ipc_lock,-sys_resource";
    let prefix = ["setpriv", "--bounding-set", drop, "--inh-caps", drop, "prlimit", "--fsize=33554432"];
    host.set_prefix(prefix.into_iter().map(str::to_owned).collect());
    host.start_daemon();
    let volume = everdisk_tests::volume::Volume::new(&host, "v");
    volume.try_attach(&[]).refused(1, &["RLIMIT_FSIZE", "33554432"]);
}

/// 9: where a limit may be raised it is: a soft limit stops no program.
#[test]
fn a_soft_limit_is_raised() {
    let host = limited(&["--nofile=128:", "--memlock=65536:"]);
    let volume = host.create("v", "16M", 1);
    volume.attach(&[]);
    fs::read(&volume.path).unwrap();
    volume.detach();
}

/// 9: an interface without a descriptor for another NBD client turns it away, keeps those it has, leaks nothing, and goes on when
/// there are some again.
#[test]
fn an_interface_without_descriptors_turns_nbd_clients_away() {
    let host = Host::new();
    let exported = Exported::attach(host.create("v", "16M", 1));
    let volume = &exported.volume;
    let interface = volume.settled().interface().unwrap();
    let mut client = exported.unix.client();
    client.write(0, &[7; 4096]);
    let count = || fs::read_dir(format!("/proc/{interface}/fd")).unwrap().count();
    let before = count();
    let limit = |most: &str| sh("prlimit", &["--pid", &interface.to_string(), &format!("--nofile={most}:4096")]);
    limit(&before.to_string());
    for _ in 0..20 {
        // Closed, and not left waiting until it gives up.
        let refused = exported.unix.try_stream().and_then(Client::over).expect_err("it was served");
        assert_ne!(refused.kind(), ErrorKind::WouldBlock, "{refused}");
    }
    client.write(4096, &[8; 4096]);
    assert!(client.read(0, 4096) == [7; 4096]);
    until("every descriptor is closed again", || (count() <= before).then_some(()));
    let lines =
        host.interface_log("v").lines().filter(|line| line.contains("RLIMIT") || line.contains("can be taken")).count();
    assert!((1..=12).contains(&lines), "{lines} lines\n{}", host.interface_log("v"));
    limit("1024");
    let mut again = exported.unix.client();
    assert!(again.read(4096, 4096) == [8; 4096]);
    again.end();
    client.send(Kind::Read, 1, 0, 4096, &[]).unwrap();
    assert_eq!(client.reply().unwrap(), (1, 0));
    client.payload(4096);
    client.end();
}
