use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use everdisk_api::{operation::OperationName, status::State};
use everdisk_proto::{
    frame::{CoreAnswer, NbdListen, NbdStatus, Request},
    identity::{Build, Component, Identity},
};
use everdisk_sys::packet;

use super::*;
use crate::{child::Child, fake, start, status::status, volume::tests::volume};

/// A volume whose interface is a process that sleeps.
fn attached(root: &Path, seconds: &str) -> (Arc<Volume>, fake::Interface, Child) {
    let volume = volume(root);
    let fake = fake::Interface::start(&volume);
    let mut command = Command::new("sleep");
    command.arg(seconds);
    let process = Child::start(command, &root.join("log"), || {}).unwrap();
    volume.update_attachment(|attachment| attachment.interface = Some(process.id)).unwrap();
    (volume, fake, process)
}

#[test]
fn a_stopped_interface_is_asked_in_vain_and_killed_by_force() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, fake, process) = attached(dir.path(), "60");
    drop(fake);
    // Takes the place of the scripted one: it listens and never answers.
    let _listener = packet::listen(&volume.paths.interface_socket()).unwrap();
    let pid = i32::try_from(process.id.pid).ok().and_then(rustix::process::Pid::from_raw).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let began = Instant::now();
    assert_eq!(status(&volume).state, State::Recovering);
    assert!(detach(&volume, Force::No, &Progress::silent()).unwrap_err().to_string().contains("stays attached"));
    assert!(process.id.alive());
    let asked = detach(&volume, Force::Asked, &Progress::silent()).unwrap_err();
    assert!(matches!(&asked, Error::GivesUp(words) if words.contains("nobody can tell how much")), "{asked}");
    assert!(process.id.alive());
    assert_eq!(detach(&volume, Force::Agreed, &Progress::silent()).unwrap(), None);
    assert!(!process.id.alive());
    assert_eq!(status(&volume).state, State::Detached);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn a_last_flush_that_fails_is_told_and_the_volume_is_detached_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, _fake, interface) = attached(dir.path(), "0");
    let program = dir.path().join("core");
    let build = Build { program: program.clone(), identity: Identity::current(Component::Core), digest: None };
    let before = volume.record().attachment;
    for (script, why) in [
        ("exit 0", None),
        ("echo 'the last flush failed: disk' >&2; exit 1", Some("the last flush failed: disk")),
        ("kill -9 $$", Some("signal: 9")),
    ] {
        volume.update(|record| record.attachment.clone_from(&before)).unwrap();
        volume.paths.make_run().unwrap();
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let core = start::core(&volume, &build).unwrap();
        let ended = finish(&volume, &volume.attached().unwrap(), Some(core.id.pid));
        assert_eq!(volume.record().attachment, None);
        match why {
            None => drop(ended.unwrap()),
            Some(why) => {
                let told = ended.unwrap_err().to_string();
                assert!(told.contains("is detached, and yet") && told.contains(why), "{told}");
            }
        }
    }
    assert!(!interface.id.alive());
}

#[test]
fn a_detach_that_was_left_is_ended_where_nothing_is_mounted_and_undone_where_the_file_is_in_use() {
    for in_use in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (volume, fake, process) = attached(dir.path(), if in_use { "60" } else { "0" });
        volume.update_attachment(|attachment| attachment.phase = Phase::Detaching).unwrap();
        if in_use {
            fake.is_in_use();
        }
        resume_unfinished(&volume, &volume.begin(OperationName::Detach).unwrap()).unwrap();
        assert_eq!(volume.record().attachment.map(|a| a.phase), in_use.then_some(Phase::Attached));
        process.id.end(Duration::ZERO);
    }
}

/// Writes go through from before the flush to the unmount; where that does not come, they are buffered again.
#[test]
fn a_detach_that_is_refused_leaves_writes_buffered_as_before() {
    for (flushed, in_use, words) in [(false, false, "stays attached"), (true, true, "is in use")] {
        let dir = tempfile::tempdir().unwrap();
        let (volume, fake, process) = attached(dir.path(), "60");
        fake.set(|status| {
            status.serving = Some(7);
            status.buffer = Some(fake::buffer(4096));
        });
        let _core = fake::Core::start(&volume, 7, move |_| {
            Some(if flushed { CoreAnswer::Flushed } else { CoreAnswer::Failed { reason: "full".to_owned() } })
        });
        if in_use {
            fake.is_in_use();
        }
        let told = detach(&volume, Force::No, &Progress::silent()).unwrap_err().to_string();
        assert!(told.contains(words) && told.contains("--force"), "{told}");
        assert_eq!(fake.modes(), [true, false]);
        assert!(!fake.status().buffer.unwrap().synchronous);
        let unmounts = fake.asked().iter().filter(|r| matches!(r, Request::Detach { .. })).count();
        assert_eq!(unmounts, usize::from(flushed));
        assert_eq!(volume.record().attachment.map(|a| a.phase), Some(Phase::Attached));
        process.id.end(Duration::ZERO);
    }
}

/// Nothing is mounted that could tell: the front ends are given up once no process is left that has their sockets.
#[test]
fn a_detach_without_a_file_that_was_left_is_ended_when_the_cores_have_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, fake, process) = attached(dir.path(), "0");
    drop(fake);
    volume.paths.remove_sockets();
    let program = dir.path().join("core");
    fs::write(&program, "#!/bin/sh\nexec sleep 1\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let core =
        start::core(&volume, &Build { program, identity: Identity::current(Component::Core), digest: None }).unwrap();
    volume.update_attachment(|attachment| (attachment.phase, attachment.file) = (Phase::Detaching, None)).unwrap();
    assert!(process.id.gone_within(GONE_WITHIN));
    let ended = thread::scope(|scope| {
        let ending = scope.spawn(|| resume_unfinished(&volume, &volume.begin(OperationName::Detach).unwrap()));
        thread::sleep(POLL_INTERVAL * 2);
        assert!(volume.record().attachment.is_some(), "a core lives");
        ending.join().unwrap()
    });
    ended.unwrap();
    assert!(!core.id.alive());
    assert_eq!(volume.record().attachment, None);
}

#[test]
fn whoever_cannot_detach_hears_which_front_ends_are_in_use_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let fake = fake::Interface::start(&volume);
    let address = |text: &str| text.parse().unwrap();
    let listen = |text| NbdListen { address: address(text), mode: 0o600, uid: 0, gid: 0, bound: None };
    let seen = |text, connections| NbdStatus {
        address: address(text),
        bound: None,
        connections,
        accepted: 9,
        carried: 0,
        broken: 0,
    };
    volume.update_attachment(|a| a.nbd = vec![listen("unix:/run/v.sock"), listen("tcp:[::1]:10809")]).unwrap();
    fake.set(|status| status.nbd = vec![seen("unix:/run/v.sock", 2), seen("tcp:[::1]:10809", 0)]);
    fake.is_in_use();
    let refused = || detach(&volume, Force::No, &Progress::silent()).unwrap_err().to_string();
    // What it takes to get that far: a core that has nothing to flush.
    fake.set(|status| status.serving = Some(7));
    let _core = fake::Core::start(&volume, 7, |_| Some(CoreAnswer::Flushed));
    let file = "close /srv/v where it is open (fuser -vm /srv/v shows who has it)";
    let force = "or cut off its users with `everdisk detach v --force`";
    let clients = "disconnect the NBD clients of unix:/run/v.sock";
    assert_eq!(refused(), format!("volume v is in use (scripted): {file} and {clients}, {force}"));
    volume.update_attachment(|a| a.file = None).unwrap();
    assert_eq!(refused(), format!("volume v is in use (scripted): {clients}, {force}"));
    fake.set(|status| status.nbd.clear());
    assert_eq!(refused(), format!("volume v is in use (scripted): {clients} and tcp:[::1]:10809, {force}"));
    assert_eq!(volume.attached().unwrap().phase, Phase::Attached);
}

/// What is buffered and cannot be sent is asked for before it is given up; without anything at stake nothing is asked.
#[test]
fn a_forced_detach_asks_where_something_is_given_up() {
    for (flushed, clients, words) in [
        (false, 0, Some("gives up 4096 bytes")),
        (true, 3, Some("cuts off its users (3 NBD connections)")),
        (true, 0, None),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (volume, fake, process) = attached(dir.path(), "60");
        let buffered = if flushed { 0 } else { 4096 };
        let address = "unix:/run/v.sock".parse().unwrap();
        let client = NbdStatus { address, connections: clients, accepted: 3, carried: 0, broken: 0, bound: None };
        fake.set(|status| {
            status.serving = Some(7);
            status.buffer = Some(fake::buffer(buffered));
            status.nbd = vec![client];
        });
        let _core = fake::Core::start(&volume, 7, move |_| {
            Some(if flushed { CoreAnswer::Flushed } else { CoreAnswer::Failed { reason: "disk full".to_owned() } })
        });
        let told = detach(&volume, Force::Asked, &Progress::silent()).unwrap_err();
        let forced: Vec<bool> = fake
            .asked()
            .iter()
            .filter_map(|asked| match asked {
                Request::Detach { force } => Some(*force),
                _ => None,
            })
            .collect();
        match words {
            Some(words) => {
                assert!(matches!(&told, Error::GivesUp(said) if said.contains(words)), "{told}");
                assert!(flushed || told.to_string().contains("disk full"), "{told}");
                assert!(forced.is_empty(), "nothing was closed");
            }
            None => assert_eq!(forced, [false], "a user that came after the check is not cut off"),
        }
        assert_eq!(volume.record().attachment.map(|a| a.phase), Some(Phase::Attached));
        assert!(!fake.status().buffer.unwrap().synchronous);
        // The scripted interface does not detach: what runs is killed.
        let given_up = detach(&volume, Force::Agreed, &Progress::silent()).unwrap();
        assert_eq!(given_up, Some(buffered));
        assert!(!process.id.alive());
    }
}

/// An interface that stops while the flush goes on keeps no detach from giving the volume up.
#[test]
fn a_forced_detach_ends_although_the_interface_stops_after_the_flush() {
    for force in [Force::No, Force::Agreed] {
        let dir = tempfile::tempdir().unwrap();
        let (volume, fake, process) = attached(dir.path(), "60");
        fake.set(|status| status.serving = Some(7));
        let socket = volume.paths.interface_socket();
        let mut fake = Some(fake);
        let _core = fake::Core::start(&volume, 7, move |_| {
            drop(fake.take());
            // It may be listening for a moment still.
            let _ = fs::remove_file(&socket);
            Some(CoreAnswer::Flushed)
        });
        let ended = detach(&volume, force, &Progress::silent());
        if force == Force::No {
            assert!(matches!(ended, Err(Error::Peer { who: "interface", .. })), "{ended:?}");
            assert_eq!(volume.record().attachment.map(|a| a.phase), Some(Phase::Attached));
            assert!(process.id.alive());
            process.id.end(Duration::ZERO);
        } else {
            assert_eq!(ended.unwrap(), None, "nobody can tell what was written after the flush");
            assert_eq!(volume.record().attachment, None);
            assert!(!process.id.alive());
        }
    }
}

/// By force, an interface that was late with its status is told to detach before anything is given up.
#[test]
fn a_forced_detach_asks_an_interface_that_was_late_with_its_status() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, fake, process) = attached(dir.path(), "60");
    fake.set(|status| status.serving = Some(7));
    let fake = Arc::new(fake);
    let late = Arc::clone(&fake);
    let _core = fake::Core::start(&volume, 7, move |_| {
        late.is_late();
        Some(CoreAnswer::Flushed)
    });
    detach(&volume, Force::Agreed, &Progress::silent()).unwrap();
    assert!(fake.asked().contains(&Request::Detach { force: true }), "{:?}", fake.asked());
    assert!(!process.id.alive());
}

/// A volume that was given up, and of which a process did not end: it is not restored, and detached by a further attempt.
#[test]
fn what_was_given_up_is_not_brought_back() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, fake, process) = attached(dir.path(), "0");
    drop(fake);
    assert!(process.id.gone_within(GONE_WITHIN));
    volume.update_attachment(|attachment| attachment.phase = Phase::Detaching).unwrap();
    detach(&volume, Force::No, &Progress::silent()).unwrap();
    assert_eq!(volume.record().attachment, None);
    let again = detach(&volume, Force::No, &Progress::silent()).unwrap_err().to_string();
    assert_eq!(again, "volume v is not attached: there is nothing to detach");
}
