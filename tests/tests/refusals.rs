//! What the CLI refuses: 2 for wrong usage, 1 for what cannot be done, with one clear line on stderr.

use std::{fs, process::Command};

use everdisk_tests::{
    host::{Host, Identity},
    programs::{core_next, need_root},
    run::{Output, run},
    volume::Volume,
    wait::SOON,
};

/// Wrong usage: exit status 2, and the daemon is not even asked.
#[test]
fn wrong_usage_ends_with_status_2() {
    let host = Host::new();
    let node = format!("dir:{}", host.node("n").display());
    let node = node.as_str();
    let cases: Vec<Vec<&str>> = vec![
        vec![],
        vec!["explode"],
        vec!["status", "../v"],
        vec!["status", ""],
        vec!["status", "-v"],
        vec!["volume", "create", "a/b", "--size", "1G", "--node", node],
        vec!["volume", "create", ".hidden", "--size", "1G", "--node", node],
        vec!["volume", "create", "v", "--size", "ten", "--node", node],
        vec!["volume", "create", "v", "--size", "1.5G", "--node", node],
        vec!["volume", "create", "v", "--size", "-1", "--node", node],
        vec!["volume", "create", "v", "--size", "99999999999999999999", "--node", node],
        vec!["volume", "create", "v", "--size", "1G"],
        vec!["volume", "create", "v", "--node", node],
        vec!["volume", "create", "v", "--size", "1G", "--node", "dir:relative"],
        vec!["volume", "create", "v", "--size", "1G", "--node", "/no/scheme"],
        vec!["volume", "create", "v", "--size", "1G", "--node", "ftp://host/x"],
        vec!["attach", "v"],
        vec!["attach", "v", "--file", "/x", "--mode", "0999"],
        vec!["attach", "v", "--file", "/x", "--owner", "root"],
        vec!["suspend", "v", "--lease", "5"],
        vec!["suspend", "v", "--lease", "soon"],
        vec!["upgrade", "v"],
        vec!["upgrade", "--core", "/x"],
        vec!["upgrade", "v", "--core", "/x", "--handover", "jump"],
        vec!["upgrade", "v", "--core", "/x", "--pause-budget", "fast"],
        vec!["upgrade", "v", "--all", "--core", "/x"],
        vec!["volume", "resize", "v"],
        vec!["volume", "resize", "v", "big"],
        vec!["volume", "resize", "v", "10"],
        vec!["volume", "create", "v", "--size", "0", "--node", node],
        vec!["volume", "create", "v", "--size", "10", "--node", node],
        vec!["volume", "create", "v", "--size", "4095", "--node", node],
        vec!["volume", "create", "v", "--size", "9000P", "--node", node],
        vec!["volume", "create", "v", "--size", "1G", "--stripe", "1K", "--node", node],
        vec!["volume", "create", "v", "--size", "1G", "--stripe", "100000", "--node", node],
        vec!["volume", "create", "v", "--size", "1G", "--stripe", "2G", "--node", node],
        vec!["volume", "create", "v", "--size", "1G", "--buffer", "4K", "--node", node],
        vec!["volume", "create", "v", "--size", "1G", "--buffer", "2G", "--node", node],
        vec!["volume", "create", "v", "--size", "1G", "--replicas", "2", "--node", node],
        vec!["suspend", "v", "--lease", "101s"],
        vec!["suspend", "v", "--lease", "2h"],
        vec!["suspend", "v", "--lease", "0s"],
        vec!["upgrade", "v", "--core", "/x", "--pause-budget", "10s"],
        vec!["upgrade", "v", "--core", "/x", "--handover", "overlap"],
        vec!["upgrade", "v", "--package", "/x"],
        vec!["detach", "v", "--yes"],
    ];
    for arguments in cases {
        let output = host.everdisk(&arguments);
        assert_eq!(output.code(), 2, "{arguments:?}: {output:?}");
        assert!(!output.stderr.trim().is_empty() && output.stdout.is_empty(), "{output:?}");
    }
    let list = host.everdisk(&["--json", "volume", "list"]).ok();
    assert!(list.trim().is_empty(), "{list}");
}

/// Wishes that are well-formed and cannot be fulfilled.
#[test]
fn what_cannot_be_done_is_refused_with_the_reason_and_what_to_do() {
    let host = Host::new();
    let node = |name: &str| format!("dir:{}", host.node(name).display());
    let create = |size: &str, stripe: &str, extra: &[&str]| {
        let n = node("n");
        let mut arguments = vec!["volume", "create", "w", "--size", size, "--stripe", stripe, "--node", &n];
        arguments.extend(extra);
        host.everdisk(&arguments)
    };
    for unfinished in [
        &["--replicas", "2"][..],
        &["--node", "rbd:pool/image"],
        &["--node", "s3://bucket/prefix"],
        &["--node", "nbds://host/export"],
    ] {
        let output = create("1G", "4M", unfinished);
        assert_eq!(output.code(), 2, "{output:?}");
        assert!(output.stderr.contains("not"), "{}", output.stderr);
        assert!(!host.node("n").exists(), "{unfinished:?}");
    }
    create("1G", "4M", &[]).refused(1, &["no such directory", "--create-dir", host.node("n").to_str().unwrap()]);
    assert!(!host.node("n").exists());
    host.everdisk(&["status", "w"]).refused(1, &["there is no volume w"]);
    let long = "x".repeat(64);
    let n = node("long");
    let deep = host.everdisk(&["volume", "create", &long, "--size", "16M", "--node", &n, "--create-dir"]);
    assert!(deep.code() == 0 || deep.stderr.contains("--run-dir"), "{deep:?}");

    for command in ["attach", "detach", "status", "suspend", "resume", "upgrade", "rollback", "flush"] {
        let next = core_next();
        let mut arguments = vec![command, "nowhere"];
        match command {
            "attach" => arguments.extend(["--file", "/tmp/nowhere.img"]),
            "upgrade" => arguments.extend(["--core", next.to_str().unwrap()]),
            _ => {}
        }
        host.everdisk(&arguments).refused(1, &["there is no volume nowhere"]);
        arguments.insert(0, "--json");
        host.everdisk(&arguments).refused(1, &["there is no volume nowhere"]);
    }
    for command in ["show", "delete", "resize"] {
        let mut arguments = vec!["volume", command, "nowhere"];
        match command {
            "delete" => arguments.push("--yes"),
            "resize" => arguments.push("2G"),
            _ => {}
        }
        host.everdisk(&arguments).refused(1, &["there is no volume nowhere"]);
    }
}

/// What the state of a volume does not permit.
#[test]
fn what_a_volumes_state_does_not_permit_is_refused() {
    let host = Host::new();
    let volume = host.create("v", "32M", 2);
    for command in ["detach", "suspend", "resume", "flush"] {
        volume.ask(command, &[]).refused(1, &["not attached"]);
    }
    volume.try_upgrade(&core_next(), &[]).refused(1, &["not attached"]);
    // Where nothing can be mounted.
    let path = |text: &str| host.everdisk(&["attach", "v", "--file", text]);
    path("/nonexistent/dir/v.img").refused(1, &["/nonexistent/dir/v.img", "directory does not exist"]);
    path(host.root().to_str().unwrap()).refused(1, &["is a directory"]);
    path("/dev/null").refused(1, &["not a regular file"]);
    let nbd = |text: &str| host.everdisk(&["attach", "v", "--nbd", text]);
    nbd("unix:/nonexistent/dir/v.sock").refused(1, &["/nonexistent/dir/v.sock", "directory does not exist"]);
    nbd("unix:/dev/null").refused(1, &["/dev/null", "not a socket"]);
    nbd(&format!("unix:{}", host.control_socket().display())).refused(1, &["a process has that socket already"]);
    nbd("http://localhost").refused(2, &["neither unix: nor tcp:"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("its number").port();
    nbd(&format!("tcp:127.0.0.1:{port}")).refused(1, &["cannot listen", "in use"]);
    assert_eq!(volume.status().state(), "detached");

    volume.attach(&[]);
    let status = volume.settled();
    volume.try_attach(&[]).refused(1, &["already attached", "detach"]);
    host.everdisk(&["volume", "delete", "v", "--yes"]).refused(1, &["detach"]);
    host.everdisk(&["volume", "resize", "v", "64M"]).refused(1, &["detach"]);
    let node = format!("dir:{}", volume.node(0).display());
    host.everdisk(&["volume", "create", "v", "--size", "1M", "--node", &node]).refused(1, &["volume v already"]);
    // Another volume at the same place.
    let other = host.create("w", "16M", 1);
    let taken = host.everdisk(&["attach", "w", "--file", volume.path.to_str().unwrap()]);
    taken.refused(1, &["mounted there already"]);
    assert_eq!(other.status().state(), "detached");
    // In use.
    let file = volume.open();
    volume.ask("detach", &[]).refused(1, &["in use", "--force"]);
    assert_eq!(volume.status().core(), status.core());
    volume.ask("detach", &["--force"]).refused(1, &["cuts off", "say --yes"]);
    volume.ask("detach", &["--force", "--yes"]).ok();
    assert!(file.metadata().is_ok() || file.metadata().is_err(), "whatever it says, it says it at once");
    drop(file);
    assert_eq!(volume.status().state(), "detached");
    assert_eq!(volume.processes(), []);
    host.everdisk(&["volume", "delete", "v"]).refused(1, &["--yes"]);
    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
    host.everdisk(&["status", "v"]).refused(1, &["there is no volume v"]);
}

/// Without a control module.
#[test]
fn without_a_control_module_every_command_says_so() {
    need_root();
    let host = Host::idle(Identity::default());
    for arguments in [&["status"][..], &["volume", "list"], &["detach", "v"], &["--json", "status", "v"]] {
        host.everdisk(arguments).refused(1, &["everdiskd is not running", "everdisk daemon"]);
    }
    let version = host.everdisk(&["version"]).ok();
    assert!(version.contains("not running"), "{version}");
    let doctor = host.everdisk(&["--json", "doctor"]);
    assert!(
        serde_json::from_str::<serde_json::Value>(doctor.stdout.lines().next().unwrap_or_default()).is_ok(),
        "{doctor:?}"
    );
}

fn daemon(host: &Host) -> Output {
    run(host.daemon_command(), SOON)
}

/// One control module for each directory, and it says what is wrong with its directories.
#[test]
fn a_second_control_module_is_refused_and_the_first_goes_on() {
    let host = Host::new();
    let volume = host.volume("v", "16M");
    daemon(&host).refused(1, &["another everdiskd runs", "stop it first"]);
    assert_eq!(volume.status().state(), "serving");
    let program = everdisk_tests::programs::program("everdiskd");
    let with = |run_dir: &str, state_dir: &str| {
        let mut command = Command::new(&program);
        command.args(["--run-dir", run_dir, "--state-dir", state_dir]);
        run(command, SOON)
    };
    let file = host.root().join("file");
    fs::write(&file, "").unwrap();
    let file = file.to_str().unwrap();
    let fresh = host.root().join("fresh");
    let fresh = fresh.to_str().unwrap();
    with(file, fresh).refused(1, &[file]);
    with(fresh, file).refused(1, &[file]);
    let long = format!("{fresh}/{}", "d".repeat(120));
    with(&long, fresh).refused(1, &["--run-dir"]);
    volume.detach();
}

/// A stale control socket and stale volume sockets are no obstacle.
#[test]
fn stale_sockets_of_a_killed_control_module_are_no_obstacle() {
    let mut host = Host::new();
    host.create("v", "16M", 1);
    host.kill_daemon();
    assert!(host.control_socket().exists());
    host.everdisk(&["status"]).refused(1, &["everdiskd is not running"]);
    host.start_daemon();
    let volume = Volume::new(&host, "v");
    let directory = host.volume_run("v");
    fs::create_dir_all(&directory).unwrap();
    let _stale = std::os::unix::net::UnixListener::bind(directory.join("interface.sock")).unwrap();
    volume.attach(&[]);
    volume.detach();
}
