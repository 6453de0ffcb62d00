use everdisk_api::operation::OperationName;
use everdisk_proto::{
    frame::{CoreAnswer, CoreRequest, NodeStatus},
    identity::{Component, Identity},
    node::NodeState,
    version::BUFFER,
};

use super::*;
use crate::{child::Child, fake, volume::tests::volume};

struct World {
    volume: Arc<Volume>,
    interface: fake::Interface,
    old: Child,
    new: Child,
    _dir: tempfile::TempDir,
}

fn build(program: &str) -> Build {
    Build { program: program.into(), identity: Identity::current(Component::Core), digest: None }
}

/// A process that does nothing, recorded as a core.
fn start_core(volume: &Volume, program: &str) -> Child {
    let mut command = std::process::Command::new("sleep");
    command.arg("60");
    let child = Child::start(command, &volume.paths.core_log(0), || {}).unwrap();
    let known = KnownCore { process: child.id, program: program.into(), digest: None };
    volume.update_attachment(|attachment| attachment.cores.push(known)).unwrap();
    child
}

/// An old core serves, a new one is armed; both are processes that do nothing.
fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let interface = fake::Interface::start(&volume);
    let (old, new) = (start_core(&volume, "/old"), start_core(&volume, "/new"));
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

/// D15: while the interface does not answer, nobody knows whether it is the new core that serves.
#[test]
fn the_gate_does_not_count_as_given_back_while_the_interface_is_silent_and_a_new_core_lives() {
    let world = world();
    std::fs::remove_file(world.volume.paths.interface_socket()).unwrap();
    let hand_back = || {
        world.act(|a| {
            a.settled_within = Duration::ZERO;
            a.hand_back()
        })
    };
    let fault = hand_back().unwrap_err();
    assert!(fault.0.contains("interface"), "{}", fault.0);
    world.new.id.end(Duration::from_secs(10));
    assert_eq!(hand_back().unwrap(), GivenBack { had_switched: false });
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
fn the_program_of_a_core_is_the_recorded_one() {
    let world = world();
    let runs = |pid| world.act(|a| a.runs(pid, &build("/new")));
    assert_eq!([world.new.id.pid, world.old.id.pid, 1].map(runs), [true, false, false]);
}

/// beyond 5: an upgrade is called off, a rollback that is resumed is not: it is what is wanted.
#[test]
fn a_rollback_is_wanted_of_an_upgrade_and_not_of_a_rollback() {
    let world = world();
    let pid = world.new.id.pid;
    for (rollback, called_off, wanted) in [(false, false, false), (false, true, true), (true, true, false)] {
        let observed = world.act(|a| {
            (a.rollback, a.called_off) = (rollback, called_off);
            a.observe(pid)
        });
        assert_eq!(observed.unwrap().rollback_wanted, wanted);
    }
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
    world.act(|a| a.commit(&build("/new"), pid, LIMIT)).unwrap();
    let record = world.volume.record();
    assert_eq!((record.current, record.previous), (Some(build("/new")), Some(build("/old"))));
}

/// Before the commit is on record, no core is left that could bring the old version back by taking the gate.
#[test]
fn the_standby_that_an_earlier_control_module_had_started_will_do() {
    let world = world();
    let standby = start_core(&world.volume, "/new");
    let pid = world.new.id.pid;
    world.interface.set(|status| {
        status.serving = Some(pid);
        status.cores.push(fake::core(standby.id.pid, 2));
    });
    world.act(|a| a.commit(&build("/new"), pid, LIMIT)).unwrap();
    assert!(!world.old.id.alive() && world.new.id.alive() && standby.id.alive());
    assert_eq!(world.volume.record().attachment.unwrap().started, 0);
    standby.id.end(Duration::ZERO);
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
    let refused = world.act(|a| a.commit(&build("/new"), pid, LIMIT)).unwrap_err();
    assert!(refused.0.contains("no longer serves"), "{refused}");
    world.interface.set(|status| status.serving = Some(pid));
    block_record(&world.volume);
    let refused = world.act(|a| a.commit(&build("/new"), pid, LIMIT)).unwrap_err();
    assert!(refused.0.contains("cannot be recorded"), "{refused}");
    assert_eq!(world.volume.record().current, Some(build("/old")));
    assert!(world.old.id.alive(), "it was known before");
}

fn block_record(volume: &Volume) {
    let record = volume.paths.record();
    std::fs::remove_file(&record).unwrap();
    std::fs::create_dir_all(record.join("in the way")).unwrap();
}

/// The disk fills up while the standby is waited for.
#[test]
fn a_program_that_may_be_on_record_is_not_removed_and_the_old_cores_stay_without_a_standby() {
    let world = world();
    let pid = world.new.id.pid;
    world.interface.set(|status| status.serving = Some(pid));
    let program = stage::next_program(&world.volume, Component::Core).unwrap();
    std::fs::create_dir_all(program.parent().unwrap()).unwrap();
    std::fs::write(&program, "#!/bin/sh\nexec sleep 60\n").unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let never_arms = Build { program: program.clone(), identity: Identity::current(Component::Core), digest: None };
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(LIMIT / 2);
            block_record(&world.volume);
        });
        world.act(|a| {
            let refused = a.commit(&never_arms, pid, LIMIT).unwrap_err();
            assert!(refused.0.contains("cannot be recorded"), "{refused}");
            a.unstage();
        });
    });
    assert!(program.exists(), "the record may name it");
    assert!(world.old.id.alive());
    let started = world.volume.attachment().unwrap().cores.into_iter().find(|core| core.program == program).unwrap();
    started.process.end(Duration::ZERO);
}

fn verified(request: &CoreRequest) -> Option<CoreAnswer> {
    match request {
        CoreRequest::Verify { blocks } => Some(CoreAnswer::Verified { blocks: *blocks }),
        CoreRequest::Status => Some(CoreAnswer::Status { nodes: vec![node(NodeState::InStep, None)] }),
        CoreRequest::Follow => Some(CoreAnswer::Following { buffered_bytes: 0 }),
        CoreRequest::Flush { .. } => Some(CoreAnswer::Flushed),
    }
}

fn node(state: NodeState, error: Option<&str>) -> NodeStatus {
    NodeStatus {
        url: "dir:/a".to_owned(),
        uuid: uuid::Uuid::nil(),
        state,
        error: error.map(str::to_owned),
        written: false,
    }
}

const LIMIT: Duration = Duration::from_secs(1);

#[test]
fn a_new_core_reads_few_blocks_first_and_on_a_slow_node_only_those() {
    let world = world();
    let pid = world.new.id.pid;
    let core = fake::Core::start(&world.volume, pid, verified);
    assert_eq!(world.act(|a| a.read_stores(pid, LIMIT)), Ok(VERIFY_BLOCKS));
    assert_eq!(core.asked(), [FEW_BLOCKS, VERIFY_BLOCKS].map(|blocks| CoreRequest::Verify { blocks }));
    drop(core);
    let core = fake::Core::start(&world.volume, pid, |request| {
        if *request != (CoreRequest::Verify { blocks: FEW_BLOCKS }) {
            thread::sleep(2 * LIMIT);
        }
        verified(request)
    });
    assert_eq!(world.act(|a| a.read_stores(pid, LIMIT)), Ok(FEW_BLOCKS));
    drop(core);
    let _core = fake::Core::start(&world.volume, pid, |_| Some(CoreAnswer::Failed { reason: "disk".to_owned() }));
    let fault = world.act(|a| a.read_stores(pid, LIMIT)).unwrap_err();
    assert!(fault.0.contains("the new core cannot read the volume: disk"), "{fault}");
}

#[test]
fn the_storage_nodes_are_to_blame_when_the_old_core_says_so_or_cannot_read_either() {
    let world = world();
    let pid = world.old.id.pid;
    for (state, error, reads, told) in [
        (NodeState::InStep, None, true, None),
        (NodeState::Stalled, None, true, Some("storage node dir:/a is stalled")),
        (NodeState::Failed, Some("EIO"), true, Some("storage node dir:/a is failed (EIO)")),
        (NodeState::InStep, None, false, Some("the core that serves cannot read it either: disk")),
    ] {
        let _core = fake::Core::start(&world.volume, pid, move |request| match request {
            CoreRequest::Status => Some(CoreAnswer::Status { nodes: vec![node(state, error)] }),
            _ if reads => verified(request),
            _ => Some(CoreAnswer::Failed { reason: "disk".to_owned() }),
        });
        assert_eq!(world.act(|a| a.ailing()).as_deref(), told);
    }
    world.interface.set(|status| status.serving = None);
    assert_eq!(world.act(|a| a.ailing()), None, "nobody tells");
}

#[test]
fn the_buffer_is_the_serving_cores_and_writes_are_buffered_again_only_where_they_are_not() {
    let world = world();
    assert_eq!(world.act(|a| a.buffer()), Ok(None));
    world.act(|a| a.end_synchronous());
    assert!(world.interface.modes().is_empty(), "without a write buffer there is nothing to end");
    world.interface.set(|status| {
        status.buffer = Some(fake::buffer(4096));
        status.cores[0].identity.version = "the old one".to_owned();
    });
    let buffer = world.act(|a| a.buffer()).unwrap().unwrap();
    assert_eq!((buffer.version, buffer.bytes, buffer.holder.version.as_str()), (BUFFER, 4096, "the old one"));
    world.act(|a| a.synchronous()).unwrap();
    world.act(|a| a.end_synchronous());
    world.act(|a| a.end_synchronous());
    assert_eq!(world.interface.modes(), [true, false]);
}

#[test]
fn a_flush_tells_of_the_storage_node_and_ends_when_a_rollback_is_asked_for() {
    let world = world();
    world.interface.set(|status| status.buffer = Some(fake::buffer(4096)));
    let core = fake::Core::start(&world.volume, world.old.id.pid, verified);
    world.act(|a| a.flush(LIMIT)).unwrap();
    drop(core);
    let _core = fake::Core::start(&world.volume, world.old.id.pid, |_| {
        thread::sleep(10 * LIMIT);
        None
    });
    let _operation = world.volume.begin(OperationName::Upgrade).unwrap();
    assert!(world.volume.operations.want_rollback());
    let began = Instant::now();
    assert!(world.act(|a| a.flush(10 * LIMIT)).unwrap_err().0.contains("it was stopped"));
    assert!(began.elapsed() < LIMIT);
}

/// The core that is to be given the gate first follows what is buffered. A core that does not answer is no obstacle.
#[test]
fn the_core_that_gets_the_gate_is_told_to_follow() {
    let world = world();
    let (old, new) = (world.old.id.pid, world.new.id.pid);
    world.act(|a| a.follow(new));
    let core = fake::Core::start(&world.volume, new, verified);
    world.act(|a| a.follow(new));
    assert_eq!(core.asked(), [CoreRequest::Follow]);
    let core = fake::Core::start(&world.volume, old, verified);
    world.interface.set(|status| status.serving = Some(new));
    world.act(|a| a.hand_back()).unwrap();
    assert_eq!(core.asked(), [CoreRequest::Follow], "on the way back too");
    assert_eq!(world.interface.hand_overs(), [old]);
}

/// The new core dies in the course of the way back, and its standby, which is of the new program as well, is given the gate.
#[test]
fn another_new_core_that_got_the_gate_on_the_way_back_gives_it_back() {
    let world = world();
    let standby = start_core(&world.volume, "/new");
    let (old, new) = (world.old.id.pid, world.new.id);
    world.interface.set(|status| {
        status.serving = Some(new.pid);
        status.cores.push(fake::core(standby.id.pid, 2));
    });
    world.interface.refuse_hand_over();
    world.interface.when_gone(standby.id, old);
    let (asks, asked) = std::sync::mpsc::channel();
    let (goes, go) = std::sync::mpsc::channel::<()>();
    let _core = fake::Core::start(&world.volume, old, move |_| {
        let _ = asks.send(());
        let _ = go.recv();
        None
    });
    thread::scope(|scope| {
        let (interface, second) = (&world.interface, standby.id.pid);
        scope.spawn(move || {
            asked.recv_timeout(Duration::from_secs(20)).unwrap();
            new.end(Duration::ZERO);
            interface.set(|status| status.serving = Some(second));
            drop(goes);
        });
        let given = world.act(|a| a.hand_back());
        let alive = standby.id.alive();
        standby.id.end(Duration::ZERO);
        assert_eq!(given.unwrap(), GivenBack { had_switched: true });
        assert!(!alive);
    });
}
