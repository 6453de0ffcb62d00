//! Hostile peers on the sockets: the volume serves on, and the processes that may command it still can.

use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::PermissionsExt, net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::Command,
};

use everdisk_proto::{
    frame::{CoreAnswer, CoreRequest, FromInterface, LentFile, Request, ToInterface},
    identity::{Component, Identity},
    ids::Slot,
    limits::FRAME_BYTES_MAX,
    version::VersionRange,
};
use everdisk_sys::{link::Link, packet};
use everdisk_tests::{
    host::Host,
    load::Load,
    programs::{core_next, need},
    run::run,
    volume::Volume,
    wait::SOON,
};

fn sockets(volume: &Volume<'_>) -> (PathBuf, PathBuf) {
    let directory = volume.host.volume_run(&volume.name);
    let core = volume.settled().core().unwrap();
    (directory.join("interface.sock"), directory.join(format!("core-{core}.sock")))
}

/// Everything the volume has to be able to do afterwards.
fn works(volume: &Volume<'_>, load: &Load) {
    load.goes_on(50);
    volume.ask("suspend", &["--lease", "20s"]).ok();
    volume.ask("resume", &[]).ok();
    volume.ask("flush", &[]).ok();
    let status = volume.settled();
    assert_eq!(status.crashes(), 0, "{status:?}");
    assert_eq!(status.cores().len(), 2, "{status:?}");
    load.goes_on(50);
}

fn devices(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| fs::File::open("/dev/null").unwrap().into()).collect()
}

fn say(path: &Path, bytes: &[u8], fds: &[OwnedFd]) -> Option<OwnedFd> {
    let socket = packet::connect(path).ok()?;
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    // A packet that is larger than the socket's buffer does not even leave.
    let _ = packet::send(socket.as_fd(), bytes, &fds);
    Some(socket)
}

fn nonsense() -> Vec<(Vec<u8>, usize)> {
    let frame = |body: &str| format!("{{\"abi\":1,\"id\":1,\"body\":{body}}}").into_bytes();
    vec![
        (Vec::new(), 0),
        (vec![0], 0),
        (vec![0xff; 100], 0),
        (vec![b'{'; FRAME_BYTES_MAX], 0),
        (vec![b' '; FRAME_BYTES_MAX + 1], 0),
        (vec![b'['; 200_000], 0),
        (b"{}".to_vec(), 0),
        (b"null".to_vec(), 1),
        (frame("\"armed\""), 0),
        (frame("\"armed\""), 3),
        (frame("\"explode\""), 0),
        (frame("{\"request\":\"status\"}"), 1),
        (frame("{\"request\":\"status\"}"), 16),
        (frame("{\"request\":{\"dismiss\":{\"core\":0}}}"), 0),
        (frame("{\"request\":{\"dismiss\":{\"core\":4294967295}}}"), 0),
        (frame("{\"request\":{\"handover\":{\"to\":1,\"budget_ms\":18446744073709551615}}}"), 0),
        (frame("{\"request\":{\"suspend\":{\"lease_ms\":0}}}"), 0),
        (frame("{\"request\":{\"suspend\":{\"lease_ms\":18446744073709551615}}}"), 0),
        (frame("{\"returned\":{\"file\":null}}"), 1),
        (frame("{\"returned\":{\"file\":{\"path\":\"/x\",\"channels\":2}}}"), 3),
        (frame("{\"hello\":{\"identity\":null,\"slot\":200}}"), 0),
        (frame("{\"verify\":{\"blocks\":4294967295}}"), 0),
        (b"{\"op\":\"detach\",\"name\":\"../v\",\"force\":true}\n".to_vec(), 0),
    ]
}

/// SO_PEERCRED, D11: garbage, frames that are too long, unsolicited descriptors, on the interface's and the
/// core's socket.
#[test]
fn garbage_on_the_sockets_of_interface_and_core_does_no_harm() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 2);
    let (interface, core) = sockets(&volume);
    let mut open = Vec::new();
    for path in [&interface, &core] {
        for (bytes, fds) in nonsense() {
            open.extend(say(path, &bytes, &devices(fds)));
        }
        load.goes_on(20);
    }
    works(&volume, &load);
    drop(open);
    works(&volume, &load);
    volume.upgrade(&core_next());
    load.stop();
    volume.detach();
}

/// A peer that says it is a core: with another ABI, with a slot that is another's, without ever doing anything.
#[test]
fn peers_that_pretend_to_be_cores_do_no_harm() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 2);
    let (interface, _) = sockets(&volume);
    let connect = || Link::<ToInterface, FromInterface>::connect(&interface).unwrap();
    let hello = |slot| ToInterface::Hello { identity: Identity::current(Component::Core), slot, keeps_locks: false };

    let foreign = connect();
    let abi = VersionRange { min: 7, max: 9 };
    let identity = Identity { abi, ..Identity::current(Component::Core) };
    foreign.send(1, ToInterface::Hello { identity, slot: None, keeps_locks: false }, &[]).unwrap();
    let (answer, _) = foreign.recv_within(SOON).unwrap();
    assert!(matches!(&answer.body, FromInterface::Refused { reason } if reason.contains("ABI")), "{answer:?}");

    // The serving core's slot, claimed by this process: it may get another one, never that.
    let thief = connect();
    let serving = volume.status();
    let taken = (0..8).filter_map(Slot::new).find(|slot| slot.index() == 0);
    thief.send(1, hello(taken), &[]).unwrap();
    match thief.recv_within(SOON).unwrap().0.body {
        FromInterface::Welcome { slot, .. } => assert_ne!(slot.index(), 0, "the serving core's slot was given away"),
        other => assert!(matches!(other, FromInterface::Refused { .. }), "{other:?}"),
    }
    assert_eq!(volume.status().core(), serving.core());
    // It returns descriptors that it was not asked for.
    let file = LentFile { path: "/x".into(), channels: 1, source: None };
    let null: Vec<OwnedFd> = devices(2);
    let fds: Vec<_> = null.iter().map(AsFd::as_fd).collect();
    let _ = thief.send(2, ToInterface::Returned { file: Some(file), nbd: Vec::new(), connections: 0, locks: 0 }, &fds);
    load.goes_on(50);
    drop((foreign, thief));

    // More of them than there are slots. They live in this process, whose id never dies: they leave by dismissal.
    let crowd: Vec<_> = (0..20).map(|_| connect()).collect();
    for link in &crowd {
        link.send(1, hello(None), &[]).unwrap();
    }
    load.goes_on(50);
    drop(crowd);
    load.goes_on(50);
    assert_eq!(volume.status().core(), serving.core());
    load.goes_on(50);
    load.stop();
    assert_eq!(volume.status().state(), "serving");
    volume.detach();
}

/// Peers that connect and say nothing: they do not keep the control module out.
#[test]
fn a_hundred_silent_peers_on_every_socket_keep_nobody_out() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 2);
    let (interface, core) = sockets(&volume);
    let control = host.control_socket();
    let mut silent: Vec<OwnedFd> = Vec::new();
    let mut streams = Vec::new();
    for _ in 0..100 {
        silent.extend(packet::connect(&interface));
        silent.extend(packet::connect(&core));
    }
    assert!(silent.len() >= 100, "{} connections", silent.len());
    // The next command is executed without waiting for the peers that are already silent.
    works(&volume, &load);
    for _ in 0..100 {
        streams.extend(UnixStream::connect(&control));
    }
    load.goes_on(50);
    host.everdisk(&["status", "v"]).ok();
    works(&volume, &load);
    drop((silent, streams));
    works(&volume, &load);
    volume.upgrade(&core_next());
    load.stop();
    volume.detach();
}

/// Garbage on the control socket is answered with an error, and the daemon lives.
#[test]
fn garbage_on_the_control_socket_is_refused() {
    let host = Host::new();
    let volume = host.volume("v", "32M");
    let load = Load::start(&volume, 1);
    let pid = host.daemon_pid();
    let long = vec![b'x'; 1 << 20];
    let deep = [vec![b'['; 60_000], b"\n".to_vec()].concat();
    let cases: [&[u8]; 8] = [
        b"\n",
        b"\0\0\0\0\n",
        b"{}\n",
        b"{\"op\":\"upgrade\"}\n",
        b"{\"op\":\"volume-delete\",\"name\":\"../../etc\"}\n",
        b"GET / HTTP/1.1\r\n\r\n",
        &deep,
        &long,
    ];
    for case in cases {
        let mut stream = UnixStream::connect(host.control_socket()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let _ = stream.write_all(case);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        // The daemon may close before it has read all: then there is a reset instead of an answer.
        if stream.read_to_string(&mut answer).is_ok() {
            assert!(answer.contains("\"error\""), "{answer}");
        }
    }
    works(&volume, &load);
    assert_eq!(host.daemon_pid(), pid);
    load.stop();
    volume.detach();
}

/// The sockets are their owner's: another user is kept out by their mode, and behind it by SO_PEERCRED.
#[test]
fn another_user_is_turned_away_at_every_socket() {
    need("python3");
    let host = Host::new();
    let volume = host.volume("v", "32M");
    let load = Load::start(&volume, 1);
    let (interface, core) = sockets(&volume);
    let control = host.control_socket();
    for socket in [&interface, &core, &control] {
        assert_eq!(fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o600, "{}", socket.display());
        let mut directory = socket.parent();
        while let Some(path) = directory.filter(|path| path.starts_with(host.root())) {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
            directory = path.parent();
        }
    }
    let status = "{\"abi\":1,\"id\":1,\"body\":{\"request\":\"status\"}}";
    let flush = "{\"abi\":1,\"id\":1,\"body\":\"flush\"}";
    let list = "{\"op\":\"volume-list\"}\\n";
    let cases = [(&interface, "SEQPACKET", status), (&core, "SEQPACKET", flush), (&control, "STREAM", list)];
    let ask = |path: &Path, kind: &str, words: &str| {
        let program = format!(
            "import socket,sys\ns=socket.socket(socket.AF_UNIX,socket.SOCK_{kind})\ns.settimeout(10)\n\
             try:\n s.connect('{}')\n s.send(b'{words}')\n print(s.recv(65536))\nexcept OSError as e:\n print('kept out', e)",
            path.display()
        );
        let mut command = Command::new("/usr/bin/env");
        command.args(["python3", "-c", &program]).env("PATH", "/usr/bin:/bin:/usr/local/bin");
        command.uid(65_534).gid(65_534).current_dir("/");
        run(command, SOON).ok()
    };
    for (path, kind, words) in cases {
        let kept_out = ask(path, kind, words);
        assert!(kept_out.contains("Permission denied"), "{}: {kept_out}", path.display());
        // Even where the socket was opened to all users.
        fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
        let answer = ask(path, kind, words);
        let refused = ["kept out", "refused", "another user", "may not command", "b''"];
        assert!(refused.iter().any(|word| answer.contains(word)), "{}: {answer}", path.display());
        assert!(!answer.contains("serving") && !answer.contains("flushed"), "{}: {answer}", path.display());
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }
    works(&volume, &load);
    load.stop();
    volume.detach();
}

/// The interface's own limits also bind the control module that commands it: a core cannot be handed the gate by mistake.
#[test]
fn commands_to_the_interface_that_cannot_be_carried_out_are_refused() {
    let host = Host::new();
    let volume = host.volume("v", "32M");
    let load = Load::start(&volume, 1);
    let (interface, core) = sockets(&volume);
    let status = volume.settled();
    let (serving, standby) = (status.core().unwrap(), status.standby().unwrap());
    let mut link = Link::<ToInterface, FromInterface>::connect(&interface).unwrap();
    let mut refused = |request: Request| {
        let answer = link.ask(ToInterface::Request(request), SOON).unwrap();
        assert!(format!("{answer:?}").contains("Failed"), "{answer:?}");
    };
    refused(Request::Handover { to: serving, budget_ms: 100 });
    refused(Request::Handover { to: 1, budget_ms: 100 });
    refused(Request::Dismiss { core: serving });
    refused(Request::Dismiss { core: 1 });
    refused(Request::Resume);
    refused(Request::Suspend { lease_ms: 0 });
    refused(Request::Suspend { lease_ms: 101_000 });
    refused(Request::Handover { to: standby, budget_ms: 0 });
    refused(Request::Handover { to: standby, budget_ms: u64::MAX });
    load.goes_on(50);
    let mut asked = Link::<CoreRequest, CoreAnswer>::connect(&core).unwrap();
    assert!(matches!(asked.ask(CoreRequest::Flush { limit_ms: 1000 }, SOON).unwrap(), CoreAnswer::Flushed));
    drop((link, asked));
    works(&volume, &load);
    load.stop();
    volume.detach();
    let gone = Link::<ToInterface, FromInterface>::connect(&interface);
    assert!(gone.is_err(), "no process listens after a detach");
}
