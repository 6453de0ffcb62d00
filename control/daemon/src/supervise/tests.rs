use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use everdisk_api::operation::OperationName;
use everdisk_proto::{
    frame::Request,
    identity::{Build, Component, Identity},
};

use super::*;
use crate::{fake::Interface, programs::Programs, volume::tests::volume};

#[test]
fn pauses_double_up_to_a_limit_and_a_success_ends_them() {
    for [shortest, longest] in [STARTS, RECORDINGS] {
        let mut pause = BackOff::new([shortest, longest]);
        let now = Instant::now();
        assert!(pause.permits(now));
        pause.failed(now);
        assert!(pause.permits(now));
        let mut expected = shortest;
        for _ in 0..40 {
            pause.failed(now);
            assert!(!pause.permits(now + expected - Duration::from_millis(1)));
            assert!(pause.permits(now + expected));
            expected = (expected * 2).min(longest);
        }
        assert_eq!(expected, longest);
        pause.succeeded();
        assert!(pause.permits(now));
    }
}

fn script(program: &Path, text: &str) {
    fs::write(program, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A core that does nothing for ever.
fn idle(root: &Path) -> Build {
    let program = root.join("everdisk-core");
    script(&program, "exec sleep 60");
    Build { program, identity: Identity::current(Component::Core), digest: None }
}

struct World {
    volume: Arc<Volume>,
    interface: Interface,
    build: Build,
    serving: Child,
    dir: tempfile::TempDir,
}

/// A volume that is served by a process of ours.
fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let mut volume = Arc::into_inner(volume(dir.path())).unwrap();
    volume.programs = Programs::in_directory(&dir.path().join("installed"));
    let volume = Arc::new(volume);
    let build = idle(dir.path());
    // This process passes for the interface.
    let program = dir.path().join("recorded");
    std::os::unix::fs::symlink(std::env::current_exe().unwrap(), &program).unwrap();
    let interface = Build { program, identity: Identity::current(Component::Interface), digest: None };
    volume.update(|record| (record.current, record.interface) = (Some(build.clone()), Some(interface))).unwrap();
    let interface = Interface::start(&volume);
    let serving = start::core(&volume, &build).unwrap();
    interface.set(|status| {
        status.serving = Some(serving.id.pid);
        status.cores = vec![crate::fake::core(serving.id.pid, 0)];
    });
    World { volume, interface, build, serving, dir }
}

impl World {
    fn cores(&self) -> Vec<u32> {
        self.volume.attached().unwrap().live_cores().map(|core| core.process.pid).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for core in self.volume.attached().unwrap().cores {
            core.process.end(Duration::ZERO);
        }
    }
}

#[test]
fn one_standby_is_started_and_a_dead_one_is_replaced() {
    let world = world();
    let mut supervisor = Supervisor::new(&world.volume);
    assert!(supervisor.pass());
    let first = world.cores();
    assert_eq!(first.len(), 2);
    assert!(supervisor.pass());
    assert_eq!(world.cores(), first, "one that is on its way is enough");
    let dead = supervisor.standby.as_ref().unwrap().child.id;
    let socket = world.volume.paths.core_socket(dead.pid);
    fs::write(&socket, "").unwrap();
    dead.end(Duration::ZERO);
    assert!(supervisor.pass());
    assert!(!socket.exists(), "a dead core's socket goes");
    let second = world.cores();
    assert_eq!((second.len(), second[0]), (2, world.serving.id.pid));
    assert_ne!(second, first);
}

#[test]
fn a_standby_too_many_or_of_another_program_or_unknown_is_dismissed() {
    let world = world();
    let other = Build { program: world.build.program.with_file_name("other"), ..world.build.clone() };
    fs::copy(&world.build.program, &other.program).unwrap();
    let old = start::core(&world.volume, &other).unwrap();
    let spare = start::core(&world.volume, &world.build).unwrap();
    let young = start::core(&world.volume, &world.build).unwrap();
    world.interface.set(|status| {
        status.cores.extend([old.id.pid, spare.id.pid, young.id.pid, 1].map(|pid| crate::fake::core(pid, 1)));
    });
    assert!(Supervisor::new(&world.volume).pass());
    assert_eq!(world.cores(), [world.serving.id.pid, young.id.pid]);
    let mut dismissed: Vec<u32> = world
        .interface
        .asked()
        .iter()
        .filter_map(|r| match r {
            Request::Dismiss { core } => Some(*core),
            _ => None,
        })
        .collect();
    dismissed.sort_unstable();
    let mut expected = [old.id.pid, spare.id.pid, 1];
    expected.sort_unstable();
    assert_eq!(dismissed, expected);
}

#[test]
fn an_upgrade_tends_its_cores_itself() {
    let world = world();
    let _operation = world.volume.begin(OperationName::Upgrade).unwrap();
    assert!(Supervisor::new(&world.volume).pass());
    assert_eq!(world.cores().len(), 1);
    // And yet no volume is left without any core.
    world.serving.id.end(Duration::ZERO);
    world.interface.set(|status| {
        status.serving = None;
        status.cores.clear();
    });
    assert!(Supervisor::new(&world.volume).pass());
    assert_eq!(world.cores().len(), 1);
}

#[test]
fn while_nobody_serves_a_core_that_hangs_stays_and_is_not_waited_for() {
    let world = world();
    world.interface.set(|status| {
        status.serving = None;
        status.cores.clear();
    });
    let mut supervisor = Supervisor::new(&world.volume);
    for expected in [2, 3, CORES_MAX / 2, CORES_MAX / 2] {
        let long_ago = Instant::now().checked_sub(ARMED_WITHIN * 2).unwrap();
        supervisor.waiting = world.cores().into_iter().map(|pid| (pid, long_ago)).collect();
        assert!(supervisor.pass());
        assert_eq!(world.cores().len(), expected);
    }
    assert!(world.serving.id.alive());
    let serving = world.serving.id.pid;
    world.interface.set(|status| status.serving = Some(serving));
    supervisor.waiting = world.cores().into_iter().map(|pid| (pid, Instant::now())).collect();
    assert!(supervisor.pass());
    assert_eq!(world.cores().len(), 2, "served again, one standby is enough");
}

/// The operation that had writes go through has died: writes are buffered again, but not while another operation wants them to go through.
#[test]
fn writes_that_an_operation_left_to_go_through_are_buffered_again() {
    let world = world();
    let mut buffer = crate::fake::buffer(0);
    buffer.synchronous = true;
    world.interface.set(|status| status.buffer = Some(buffer));
    let mut supervisor = Supervisor::new(&world.volume);
    let operation = world.volume.begin(OperationName::Upgrade).unwrap();
    assert!(supervisor.pass());
    assert!(world.interface.modes().is_empty());
    drop(operation);
    assert!(supervisor.pass());
    assert!(supervisor.pass());
    assert_eq!(world.interface.modes(), [false]);
}

/// D13: an interface that takes the place of a dead one is of the program on record. The installed one takes turns with it only once it has
/// failed again and again, and does not come on record by being started.
#[test]
fn d13_a_dead_interface_is_replaced_by_the_one_on_record() {
    let world = world();
    let recorded = world.volume.record().interface;
    let (told, installed) = (world.dir.path().join("told"), world.volume.programs.interface());
    fs::create_dir(installed.parent().unwrap()).unwrap();
    fs::remove_file(&recorded.as_ref().unwrap().program).unwrap();
    for (program, name) in [(recorded.clone().unwrap().program, "recorded"), (installed, "installed")] {
        script(&program, &format!("echo {name} >> {}; echo cannot >&2; exit 1", told.display()));
    }
    world.volume.update_attachment(|attachment| attachment.interface = None).unwrap();
    let mut supervisor = Supervisor::new(&world.volume);
    let restored = |supervisor: &mut Supervisor<'_>| {
        supervisor.interface_pause.succeeded();
        assert!(supervisor.pass());
        supervisor.interface.as_ref().unwrap().child.ended_by_now().unwrap();
    };
    (0..6).for_each(|_| restored(&mut supervisor));
    let order = ["recorded", "recorded", "recorded", "installed", "recorded", "installed"];
    assert_eq!(fs::read_to_string(&told).unwrap().lines().collect::<Vec<_>>(), order);
    assert_eq!(world.volume.record().interface, recorded);
    // Once one has restored the volume, the count begins anew.
    supervisor.recorded = ProcessId::of(std::process::id());
    world.volume.update_attachment(|attachment| attachment.interface = ProcessId::of(std::process::id())).unwrap();
    assert!(supervisor.pass());
    world.volume.update_attachment(|attachment| attachment.interface = None).unwrap();
    restored(&mut supervisor);
    assert_eq!(fs::read_to_string(&told).unwrap().lines().last(), Some("recorded"));
    // One that cannot even be started counts as one that does not restore.
    fs::remove_file(recorded.unwrap().program).unwrap();
    for _ in 0..2 {
        supervisor.interface_pause.succeeded();
        assert!(supervisor.pass());
    }
    restored(&mut supervisor);
    assert_eq!(fs::read_to_string(&told).unwrap().lines().last(), Some("installed"));
}

/// D13: the program of an interface that serves is put on record, where it is not there: again and again, with pauses, until it succeeds,
/// and never while an operation could remove the copy.
#[test]
fn d13_recording_the_program_of_an_interface_is_tried_again_with_pauses() {
    let world = world();
    let recorded = world.volume.record().interface;
    world.volume.update(|record| record.interface = None).unwrap();
    // It serves, and its program cannot be recorded: it is none of ours.
    let mut sleeps = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    world.volume.update_attachment(|attachment| attachment.interface = ProcessId::of(sleeps.id())).unwrap();
    let mut supervisor = Supervisor::new(&world.volume);
    let tries = |supervisor: &mut Supervisor<'_>| {
        assert!(supervisor.pass());
        supervisor.recording_pause.failures
    };
    let operation = world.volume.begin(OperationName::Flush).unwrap();
    assert_eq!(tries(&mut supervisor), 0);
    drop(operation);
    assert_eq!((tries(&mut supervisor), tries(&mut supervisor), tries(&mut supervisor)), (1, 2, 2));
    supervisor.recording_pause.not_before = None;
    assert_eq!(tries(&mut supervisor), 3);
    // Another one is on record than the one that serves, which an earlier module has started.
    world.volume.update(|record| record.interface = recorded).unwrap();
    let mut supervisor = Supervisor::new(&world.volume);
    assert_eq!((tries(&mut supervisor), supervisor.recorded), (1, None));
    // The same one, by its digest.
    let digest = crate::programs::digest(&mut fs::File::open(format!("/proc/{}/exe", sleeps.id())).unwrap()).unwrap();
    world.volume.update(|record| record.interface.as_mut().unwrap().digest = Some(digest)).unwrap();
    let mut supervisor = Supervisor::new(&world.volume);
    assert_eq!((tries(&mut supervisor), supervisor.recorded), (0, ProcessId::of(sleeps.id())));
    sleeps.kill().unwrap();
    sleeps.wait().unwrap();
}

/// An interface that hangs while it restores the volume is one that does not restore: it is killed in time, and counted.
#[test]
fn an_interface_that_hangs_while_it_restores_is_killed_and_counted() {
    let world = world();
    let recorded = world.volume.record().interface.unwrap().program;
    fs::remove_file(&recorded).unwrap();
    script(&recorded, "exec sleep 60");
    world.volume.update_attachment(|attachment| attachment.interface = None).unwrap();
    fs::remove_file(world.volume.paths.interface_socket()).unwrap();
    let mut supervisor = Supervisor::new(&world.volume);
    assert!(supervisor.pass() && supervisor.pass());
    let hangs = world.volume.attached().unwrap().interface.unwrap();
    assert!(hangs.alive());
    // It is silent for a short time, however long ago it was started.
    supervisor.interface.as_mut().unwrap().at -= SILENT_FOR * 2;
    assert!(supervisor.pass());
    assert!(hangs.alive());
    supervisor.silent.as_mut().unwrap().1 -= SILENT_FOR;
    assert!(supervisor.pass());
    assert!(!hangs.alive());
    assert!(supervisor.pass());
    assert_eq!(supervisor.unrestored_times, 1);
    world.volume.attached().unwrap().interface.unwrap().end(Duration::ZERO);
}
