//! What the logs say: one line for each event, with its actor, its reason and its outcome, and no more.

use std::{
    io::{Read, Write},
    time::{Duration, Instant},
};

use everdisk_tests::{
    host::Host,
    load::Load,
    nbd::Exported,
    processes,
    programs::{core_next, scripted_core},
    wait::until,
};

/// 9: a crash is logged once: which process, how it ended, in which generation, which core took over and how quickly.
#[test]
fn a_crash_is_logged_as_one_and_a_normal_upgrade_is_not() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 1);
    load.goes_on(20);
    let before = volume.settled();
    volume.upgrade(&core_next());
    volume.settled();
    let cores = || (0..16).map(|n| host.volume_run("v").join(format!("core-{n}.log")));
    let texts = || cores().filter_map(|path| std::fs::read_to_string(path).ok()).collect::<String>();
    for log in [host.daemon_log(), host.interface_log("v"), texts()] {
        assert!(!log.contains(" WARN ") && !log.contains("ERROR"), "a normal upgrade is no trouble: {log}");
        assert!(!log.contains("lost the connection"), "{log}");
    }
    assert_eq!(host.logged(&["core_crashed"]), Vec::<String>::new());
    let ended = host.logged(&["upgrade_ended"]);
    assert!(ended.len() == 1 && ended[0].contains("outcome=\"committed\"") && !ended[0].contains("Some("), "{ended:?}");
    let now = volume.settled();
    let (core, standby, interface) = (now.core().unwrap(), now.standby().unwrap(), now.interface().unwrap());
    assert_ne!(Some(core), before.core());
    let generation = format!("generation={}", now.generation());
    processes::kill(core);
    load.goes_on(20);
    let words =
        ["WARN", "core_crashed", &format!("pid={core} "), "signal: 9", &generation, &format!("successor={standby}")];
    until("the crash", || (host.logged(&words).len() == 1).then_some(()));
    let in_interface = host.interface_log("v");
    assert_eq!(in_interface.matches("core_crashed").count(), 1, "{in_interface}");
    // A standby's death is logged as such, and an interface's with its own process id.
    let now = volume.settled();
    processes::kill(now.standby().unwrap());
    let words = ["WARN", "core_ended", &format!("pid={} ", now.standby().unwrap()), "signal: 9", "did not serve"];
    until("the standby's death", || (host.logged(&words).len() == 1).then_some(()));
    volume.settled();
    processes::kill(interface);
    let words = ["WARN", "interface_ended", &format!("pid={interface} "), "signal: 9"];
    until("the interface's death", || (host.logged(&words).len() == 1).then_some(()));
    until("its successor", || (host.logged(&["interface_restored", "took_ms="]).len() == 1).then_some(()));
    assert_eq!(host.logged(&["core_crashed"]).len(), 1);
    load.stop();
    volume.settled();
    volume.detach();
    volume.attach(&[]);
    volume.settled();
    // Events of the attachment before are not reported in this one.
    assert_eq!((host.logged(&["core_crashed"]).len(), host.logged(&["core_ended"]).len()), (1, 1));
    volume.detach();
}

/// 9: every act of an operator, done or refused, is logged with the user that asked.
#[test]
fn the_acts_of_operators_are_logged() {
    let host = Host::new();
    let volume = host.create("v", "16M", 1);
    host.everdisk(&["volume", "resize", "v", "32M"]).ok();
    volume.try_attach(&["--owner", "0:0"]).ok();
    volume.try_attach(&[]).refused(1, &["already attached"]);
    volume.settled();
    volume.ask("suspend", &["--lease", "20s"]).ok();
    volume.ask("resume", &[]).ok();
    volume.ask("resume", &[]).refused(1, &[]);
    volume.ask("flush", &[]).ok();
    volume.upgrade_fails(&scripted_core(host.root(), "exit"), &["--soak", "0s"], "aborted", &[]);
    volume.settled();
    volume.ask("detach", &["--force"]).ok();
    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
    for act in ["create", "resize", "suspend", "resume", "flush", "delete"] {
        let told = host.logged(&["INFO", "operator", &format!("act=\"{act}\""), "volume=\"v\"", "uid=0"]);
        assert_eq!(told.len(), 1, "{act}: {}", host.daemon_log());
    }
    assert_eq!(host.logged(&["WARN", "operator", "act=\"attach\"", "already attached"]).len(), 1);
    assert_eq!(host.logged(&["WARN", "operator", "act=\"resume\"", "not suspended"]).len(), 1);
    assert_eq!(host.logged(&["WARN", "operator", "act=\"forced detach\"", "by force"]).len(), 1);
    assert_eq!(host.logged(&["INFO", "volume_attached"]).len(), 1);
    assert_eq!(host.logged(&["WARN", "upgrade_ended", "outcome=\"aborted\"", "scripted to fail"]).len(), 1);
}

/// 9: what a client can have the programs write is bounded: nonsense on an NBD socket is a line a second, with a count.
#[test]
fn a_client_that_speaks_nonsense_floods_no_log() {
    let host = Host::new();
    let exported = Exported::attach(host.create("v", "16M", 1));
    let size = || -> u64 {
        let logs = std::fs::read_dir(host.volume_run("v")).unwrap().flatten();
        logs.filter(|entry| entry.path().extension().is_some_and(|e| e == "log"))
            .map(|e| e.metadata().unwrap().len())
            .sum()
    };
    let before = size();
    let began = Instant::now();
    let mut tries = 0_u32;
    while began.elapsed() < Duration::from_secs(4) {
        let mut client = exported.unix.stream();
        let mut hello = [0; 18];
        client.read_exact(&mut hello).unwrap();
        // The flags of a client, EXPORT_NAME of the default export, then what is no request.
        client.write_all(&[0, 0, 0, 3]).unwrap();
        client.write_all(b"IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00").unwrap();
        let _ = client.write_all(&[0xff; 64]);
        let mut rest = Vec::new();
        let _ = client.read_to_end(&mut rest);
        tries += 1;
    }
    let (seconds, grown) = (began.elapsed().as_secs() + 1, size() - before);
    assert!(tries > 50, "{tries} tries");
    assert!(grown < seconds * 1500, "{tries} tries in {seconds} s have written {grown} bytes");
    exported.volume.settled();
}
