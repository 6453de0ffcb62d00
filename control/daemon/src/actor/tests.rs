use everdisk_proto::version::CoreIdentity;

use super::*;
use crate::{child::Child, fake, volume::tests::volume};

struct World {
    volume: Arc<Volume>,
    interface: fake::Interface,
    old: Child,
    new: Child,
    _dir: tempfile::TempDir,
}

fn build(program: &str) -> CoreBuild {
    CoreBuild { program: program.into(), identity: CoreIdentity::current() }
}

/// An old core serves, a new one is armed; both are processes that do nothing.
fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let interface = fake::Interface::start(&volume);
    let start = |program: &str| {
        let mut command = std::process::Command::new("sleep");
        command.arg("60");
        let child = Child::start(command, &dir.path().join("log"), || {}).unwrap();
        let known = KnownCore { process: child.id, program: program.into() };
        volume.update_attachment(|attachment| attachment.cores.push(known)).unwrap();
        child
    };
    let (old, new) = (start("/old"), start("/new"));
    volume.update(|record| record.current = Some(build("/old"))).unwrap();
    interface.set(|status| {
        status.serving = Some(old.id.pid);
        status.cores = vec![fake::core(old.id.pid, 0), fake::core(new.id.pid, 1)];
    });
    World { volume, interface, old, new, _dir: dir }
}

impl Drop for World {
    fn drop(&mut self) {
        self.old.id.end(Duration::ZERO);
        self.new.id.end(Duration::ZERO);
    }
}

impl World {
    fn act<T>(&self, act: impl FnOnce(&mut Actor<'_>) -> T) -> T {
        act(&mut Actor::new(&self.volume, 1, Path::new("/new"), &Progress::silent()))
    }
}

const BUDGET: Duration = Duration::from_millis(100);

#[test]
fn a_hand_over_is_commanded_once_and_not_at_all_when_the_new_core_serves_already() {
    let world = world();
    let to = world.new.id.pid;
    assert_eq!(world.act(|a| a.hand_over(to, BUDGET)).unwrap().failure, None);
    assert_eq!(world.interface.hand_overs(), [to]);
    assert_eq!(world.act(|a| a.hand_over(to, BUDGET)).unwrap().failure, None);
    assert_eq!(world.interface.hand_overs(), [to]);
}

#[test]
fn an_unanswered_hand_over_is_settled_by_who_serves() {
    for switches in [true, false] {
        let world = world();
        let to = world.new.id.pid;
        world.interface.hang_up_on_hand_over(switches);
        let report = world.act(|a| a.hand_over(to, BUDGET)).unwrap();
        assert_eq!(report.failure.is_none(), switches);
        assert!(!report.failure.is_some_and(|failure| failure.switched));
    }
}

#[test]
fn the_gate_is_given_back_only_when_the_new_core_has_it() {
    let world = world();
    assert_eq!(world.act(|a| a.hand_back()).unwrap(), GivenBack { had_switched: false });
    assert!(world.interface.hand_overs().is_empty());
    world.interface.set(|status| status.serving = Some(world.new.id.pid));
    assert_eq!(world.act(|a| a.hand_back()).unwrap(), GivenBack { had_switched: true });
    assert_eq!(world.interface.hand_overs(), [world.old.id.pid]);
}

#[test]
fn a_new_core_that_does_not_let_go_is_killed() {
    let world = world();
    let (old, new) = (world.old.id.pid, world.new.id);
    world.interface.set(|status| status.serving = Some(new.pid));
    world.interface.refuse_hand_over();
    world.interface.when_gone(new, old);
    assert_eq!(world.act(|a| a.hand_back()).unwrap(), GivenBack { had_switched: true });
    assert!(!new.alive());
}

#[test]
fn dismissing_spares_the_old_cores() {
    let world = world();
    world.act(|a| a.dismiss());
    assert!(world.old.id.alive());
    assert!(!world.new.id.alive());
}

#[test]
fn the_commit_records_the_program_and_the_one_before() {
    let world = world();
    world.interface.set(|status| status.serving = Some(world.new.id.pid));
    let pid = world.new.id.pid;
    world.act(|a| a.commit(&build("/new"), pid, BUDGET)).unwrap();
    let record = world.volume.record();
    assert_eq!((record.current, record.previous), (Some(build("/new")), Some(build("/old"))));
    assert!(!world.old.id.alive());
    assert!(world.new.id.alive());
}

#[test]
fn a_core_that_has_the_gate_or_may_get_it_is_spared() {
    let world = world();
    let (old, new) = (world.old.id, world.new.id);
    world.interface.set(|status| status.serving = None);
    world.act(|a| a.end_cores(Unserved::Stays, None, |_| true));
    assert!(old.alive() && new.alive());
    world.act(|a| a.end_cores(Unserved::Goes, None, |core| core.process == new));
    assert!(!new.alive());
    world.interface.set(|status| status.serving = Some(old.pid));
    world.act(|a| a.end_cores(Unserved::Goes, None, |_| true));
    assert!(old.alive());
}

#[test]
fn what_cannot_be_recorded_or_does_not_serve_is_not_committed() {
    let world = world();
    let pid = world.new.id.pid;
    let refused = world.act(|a| a.commit(&build("/new"), pid, BUDGET)).unwrap_err();
    assert!(refused.0.contains("no longer serves"), "{refused}");
    world.interface.set(|status| status.serving = Some(pid));
    let record = world.volume.paths.record();
    std::fs::remove_file(&record).unwrap();
    std::fs::create_dir_all(record.join("in the way")).unwrap();
    let program = start::next_program(&world.volume).unwrap();
    std::fs::create_dir_all(program.parent().unwrap()).unwrap();
    world.act(|a| {
        let refused = a.commit(&build("/new"), pid, BUDGET).unwrap_err();
        assert!(refused.0.contains("cannot be recorded"), "{refused}");
        a.unstage();
    });
    assert!(program.parent().unwrap().exists(), "the record may name it");
    assert_eq!(world.volume.record().current, Some(build("/old")));
    assert!(world.old.id.alive());
}
