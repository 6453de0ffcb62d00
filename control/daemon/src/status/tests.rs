use everdisk_api::operation::OperationName;
use everdisk_proto::{
    frame::{BufferStatus, CoreStatus, FileAttach, NbdListen, NbdStatus, Suspension},
    identity::{Component, Identity},
    ids::{Generation, Slot},
};

use super::*;
use crate::{
    fake,
    process::{ProcessId, boot_id},
    record::KnownCore,
    volume::tests::volume,
};

fn seen(gate: GateState) -> InterfaceStatus {
    let core = |pid, slot, armed| CoreStatus {
        pid,
        slot: Slot::new(slot).unwrap(),
        identity: Identity::current(Component::Core),
        armed,
        requests: 0,
        io_errors: 0,
        writing: 0,
    };
    InterfaceStatus {
        version: "1".to_owned(),
        identity: Some(Identity::current(Component::Interface)),
        segment_abi: Some(4),
        pid: 9,
        gate,
        generation: Generation(7),
        serving: Some(10),
        cores: vec![core(10, 0, true), core(11, 1, true), core(12, 2, false)],
        file: None,
        nbd: Vec::new(),
        in_flight: 3,
        waiting: Some(4),
        lease_ms: None,
        crashes_survived: 2,
        last_suspension: Suspension::default(),
        buffer: None,
        deaths: Vec::new(),
        undrained: 0,
    }
}

fn attachment(interface: Option<ProcessId>, core: Option<ProcessId>) -> Attachment {
    let known = |process| KnownCore { process, program: "/p".into(), digest: Some("d".to_owned()) };
    Attachment {
        boot_id: boot_id(),
        phase: Phase::Attached,
        file: Some(FileAttach {
            path: "/srv/v".into(),
            mode: 0o600,
            uid: 0,
            gid: 0,
            allow_other: false,
            source: None,
            target: None,
        }),
        nbd: Vec::new(),
        created_file: false,
        interface,
        cores: core.map(known).into_iter().collect(),
        started: 1,
        home: None,
    }
}

#[test]
fn the_state_follows_the_gate_the_processes_and_the_operation() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let own = ProcessId::of(std::process::id());
    let state = |a: Option<&Attachment>, s: Option<GateState>| {
        judge(&volume, volume.operations.running(), a, s.map(seen).as_ref()).0
    };
    let (alive, dead, headless) = (attachment(own, own), attachment(None, None), attachment(None, own));
    assert_eq!(state(None, None), State::Detached);
    assert_eq!(state(Some(&dead), None), State::Failed);
    assert_eq!(state(Some(&headless), None), State::Recovering);
    assert_eq!(state(Some(&alive), None), State::Recovering);
    assert_eq!(state(Some(&alive), Some(GateState::Serving)), State::Serving);
    assert_eq!(state(Some(&alive), Some(GateState::Suspended)), State::Suspended);
    assert_eq!(state(Some(&alive), Some(GateState::Recovering)), State::Recovering);
    let operation = volume.begin(OperationName::Upgrade).unwrap();
    assert_eq!(
        judge(&volume, volume.operations.running(), Some(&alive), Some(&seen(GateState::Serving))).0,
        State::Upgrading
    );
    drop(operation);
    let attaching = Attachment { phase: Phase::Attaching, ..alive };
    assert_eq!(state(Some(&attaching), None), State::Detached);
}

#[test]
fn what_the_interface_says_is_entered_and_a_core_that_is_not_armed_is_no_standby() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let mut status = status(&volume);
    assert_eq!((status.state, status.nodes.len()), (State::Detached, 2));
    assert!(status.nodes.iter().all(|node| node.state == NodeState::Unknown));
    enter(&mut status, &volume, seen(GateState::Serving));
    assert_eq!(status.core.unwrap().pid, 10);
    assert_eq!(status.standby.unwrap().pid, 11);
    assert_eq!((status.generation, status.in_flight, status.crashes_survived), (7, 3, 2));
    assert_eq!(status.cores.len(), 3);
}

/// D13: of every process its build; of an interface that does not tell, the ABI of its segment is the one that its program makes.
#[test]
fn d13_every_process_is_shown_with_its_build() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let process = ProcessId { pid: 10, started: 1 };
    let of = |line: &str| Build {
        program: "/i".into(),
        identity: Identity::parse(line).unwrap(),
        digest: Some("i".to_owned()),
    };
    volume
        .update(|record| {
            record.attachment = Some(attachment(None, Some(process)));
            record.interface = Some(of("everdisk-interface 0.1.0 (abi 3)"));
        })
        .unwrap();
    let entered = |seen: InterfaceStatus| {
        let mut status = empty("v".to_owned());
        enter(&mut status, &volume, seen);
        status
    };
    let now = entered(seen(GateState::Serving));
    let build = |program: Option<Program>| program.unwrap().build;
    assert_eq!(now.segment_abi, Some(4));
    assert_eq!((build(now.core).as_deref(), build(now.standby)), (Some("d"), None), "a standby that is not on record");
    let interface = now.interface.unwrap();
    assert_eq!((interface.build.as_deref(), interface.abi), (Some("i"), Some(everdisk_proto::version::ABI_RANGE)));
    let before = entered(InterfaceStatus { identity: None, segment_abi: None, ..seen(GateState::Serving) });
    assert_eq!((before.segment_abi, before.interface.unwrap().abi), (Some(3), None));
}

#[test]
fn the_mode_and_what_is_buffered_are_the_interfaces_word_and_detached_the_descriptions() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let detached = status(&volume);
    assert_eq!((detached.mode, detached.buffer_bytes), (WriteMode::Synchronous, 0), "a volume of version 1");
    let mut spec = volume.spec();
    (spec.spec_version, spec.buffer) = (2, 4 << 20);
    volume.set_spec(spec).unwrap();
    let detached = status(&volume);
    assert_eq!((detached.mode, detached.buffer_bytes), (WriteMode::WriteBack, 4 << 20));

    let buffer = fake::buffer(8192);
    let entered = |buffer| {
        let mut status = status(&volume);
        enter(&mut status, &volume, InterfaceStatus { buffer, ..seen(GateState::Serving) });
        status
    };
    let full = entered(Some(buffer));
    assert_eq!((full.mode, full.buffered_bytes, full.buffer_bytes), (WriteMode::WriteBack, 8192, 64 << 20));
    assert_eq!((full.damaged_ranges, full.reason), (0, None));
    assert_eq!(entered(Some(BufferStatus { synchronous: true, ..buffer })).mode, WriteMode::Synchronous);
    let without = entered(None);
    assert_eq!((without.mode, without.buffer_bytes), (WriteMode::Synchronous, 0));
    volume.findings.set_warning(Some("beware".to_owned()));
    let damaged = entered(Some(BufferStatus { damaged_ranges: 3, ..buffer }));
    assert_eq!(damaged.damaged_ranges, 3);
    let reason = damaged.reason.unwrap();
    assert!(reason.starts_with("beware; buffered data of 3 ranges was found damaged"), "{reason}");
}

#[test]
fn front_ends_are_as_recorded_and_nbd_is_as_the_interface_says() {
    let listen =
        |address: &str| NbdListen { address: address.parse().unwrap(), mode: 0o600, uid: 0, gid: 0, bound: None };
    let nbd = vec![listen("unix:/run/v.sock"), listen("tcp:localhost:0")];
    let attached = Attachment { nbd, ..attachment(None, None) };
    let shown = |attachment: &Attachment, nbd| {
        let seen = InterfaceStatus { nbd, ..seen(GateState::Serving) };
        serde_json::to_string(&frontends(attachment, Some(&seen))).unwrap()
    };
    let recorded = r#"[{"kind":"file","address":"/srv/v"},{"kind":"nbd","address":"unix:/run/v.sock"},{"kind":"nbd","address":"tcp:localhost:0"}]"#;
    assert_eq!(serde_json::to_string(&frontends(&attached, None)).unwrap(), recorded);
    assert_eq!(shown(&attached, Vec::new()), recorded, "it has not got them back yet");
    let bound = |address: &str, connections| NbdStatus {
        address: address.parse().unwrap(),
        bound: None,
        connections,
        accepted: 4,
        carried: 2,
        broken: 1,
    };
    let bound = vec![bound("unix:/run/v.sock", 3), bound("tcp:127.0.0.1:4321", 0)];
    let without_file = Attachment { file: None, ..attached };
    assert_eq!(
        shown(&without_file, bound),
        r#"[{"kind":"nbd","address":"unix:/run/v.sock","connections":3,"accepted":4,"carried":2,"broken":1},{"kind":"nbd","address":"tcp:127.0.0.1:4321","connections":0,"accepted":4,"carried":2,"broken":1}]"#
    );
}
