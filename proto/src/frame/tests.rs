use proptest::prelude::*;

use super::*;
use crate::{
    file_id::FileId,
    identity::Identity,
    ids::{Generation, Slot},
};

fn golden<B: Body + PartialEq + std::fmt::Debug>(text: &str, body: B, fds: usize) {
    let abi = (1..=ABI).find(|abi| text.contains(&format!("\"abi\":{abi},"))).unwrap();
    let frame = Frame { abi, id: 7, body };
    // Frames of earlier versions are read, and written no more.
    if abi == ABI {
        assert_eq!(String::from_utf8(encode(&frame).unwrap()).unwrap(), text);
    }
    assert_eq!(decode::<B>(text.as_bytes(), fds).unwrap(), frame);
}

/// What ABI 4 has in addition to the frames of ABI 1 to 3, byte for byte: a program's identity, and the ABI of the
/// segment.
pub(crate) fn golden_frames_of_abi_4(text: &str) {
    let line = |program: &str| Identity::parse(&format!("{program} 0.1.0 (abi 4..4, buffer 2..2)")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let hello = ToInterface::Hello { identity: line("everdisk-core"), slot: Slot::new(1), keeps_locks: true };
    golden(lines[0], hello, 0);
    let status = InterfaceStatus {
        version: "0.1.0".to_owned(),
        identity: Some(line("everdisk-interface")),
        segment_abi: Some(4),
        pid: 42,
        gate: GateState::Serving,
        generation: Generation(3),
        serving: Some(43),
        cores: Vec::new(),
        file: None,
        nbd: Vec::new(),
        in_flight: 0,
        waiting: None,
        lease_ms: None,
        crashes_survived: 0,
        last_suspension: Suspension::default(),
        buffer: None,
        deaths: Vec::new(),
        undrained: 0,
    };
    golden(lines[1], FromInterface::Answer(Answer::Status(Box::new(status))), 0);
    assert_eq!(lines.len(), 2);
}

/// What was added to ABI 3 as optional, byte for byte: the owner of a volume's places and nodes.
pub(crate) fn golden_frames_about_owners(text: &str) {
    let identity = Identity::parse("everdisk-core 0.1.0 (abi 3..3, buffer 0..1)").unwrap();
    let id = || Some(FileId { device: 65024, inode: 12, born_ns: Some(1_700_000_000_000_000_001) });
    let address = || "unix:/run/v.sock".parse().unwrap();
    let source = || Some("everdisk:v:1".to_owned());
    let file = FileAttach {
        path: "/srv/v".into(),
        mode: 0o600,
        uid: 0,
        gid: 0,
        allow_other: false,
        source: source(),
        target: Some(FileId { device: 65024, inode: 11, born_ns: None }),
    };
    let listen = NbdListen { address: address(), mode: 0o600, uid: 0, gid: 0, bound: id() };
    let lent = LentFile { path: "/srv/v".into(), channels: 1, source: source() };
    let lines: Vec<&str> = text.lines().collect();
    golden(lines[0], ToInterface::Hello { identity, slot: None, keeps_locks: true }, 0);
    golden(lines[1], ToInterface::Request(Request::Attach { file: Some(file), nbd: vec![listen], core: 42 }), 0);
    golden(lines[2], ToInterface::Returned { file: Some(lent), nbd: Vec::new(), connections: 0, locks: 2 }, 2);
    golden(lines[3], ToInterface::ReturnedLocks { locks: 2 }, 2);
    golden(lines[4], FromInterface::LendLocks { from: 16, locks: 2 }, 2);
    let seen = NbdStatus { address: address(), bound: id(), connections: 0, accepted: 0, carried: 0, broken: 0 };
    assert_eq!(serde_json::to_string(&seen).unwrap(), lines[5]);
    assert_eq!(serde_json::from_str::<NbdStatus>(lines[5]).unwrap(), seen);
    assert_eq!(lines.len(), 6);
}

/// What ABI 4 has for connections to NBD storage nodes, byte for byte. They came after its first release, whose programs have no such
/// nodes.
pub(crate) fn golden_frames_about_nodes(text: &str) {
    let lines: Vec<&str> = text.lines().collect();
    let connection = NodeConnection { node: 2, number: 7 };
    golden(lines[0], FromInterface::Welcome { slot: Slot::FIRST, fronts: 1, keeps_nodes: true }, 1);
    golden(lines[1], ToInterface::KeepNode(connection), 2);
    golden(lines[2], ToInterface::DropNode(connection), 0);
    assert_eq!(lines.len(), 3);
}

/// What ABI 3 has in addition to the frames of ABI 1 and 2, byte for byte.
pub(crate) fn golden_frames_of_abi_3(text: &str) {
    let listen =
        |address: &str| NbdListen { address: address.parse().unwrap(), mode: 0o600, uid: 0, gid: 0, bound: None };
    let lines: Vec<&str> = text.lines().collect();
    let nbd = || vec![listen("unix:/run/v.sock"), listen("tcp:127.0.0.1:10809")];
    golden(lines[0], ToInterface::Request(Request::Attach { file: None, nbd: nbd(), core: 42 }), 0);
    golden(lines[1], ToInterface::Returned { file: None, nbd: nbd(), connections: 2, locks: 0 }, 3);
    golden(lines[2], ToInterface::ReturnedConnection(LentConnection { number: 9, listener: 1 }), 2);
    golden(lines[3], FromInterface::LendNbd { nbd: nbd() }, 2);
    golden(lines[4], FromInterface::LendConnection(LentConnection { number: 9, listener: 1 }), 2);
    assert_eq!(lines.len(), 5);
}

/// What ABI 2 has beside the frames of ABI 1, byte for byte.
pub(crate) fn golden_frames_of_abi_2(text: &str) {
    let identity = Identity::parse("everdisk-core 0.1.0 (abi 2..2, buffer 0..1)").unwrap();
    let lines: Vec<&str> = text.lines().collect();
    golden(lines[0], ToInterface::Hello { identity, slot: None, keeps_locks: false }, 0);
    golden(lines[1], ToInterface::Request(Request::Synchronous { on: true }), 0);
    golden(lines[2], CoreRequest::Flush { limit_ms: 250 }, 0);
    golden(lines[3], CoreRequest::Follow, 0);
    golden(lines[4], CoreAnswer::Flushing { buffered_bytes: 4096 }, 0);
    golden(lines[5], CoreAnswer::Following { buffered_bytes: 4096 }, 0);
    let report = HandoverReport {
        failure: None,
        generation: Generation(3),
        suspension: Suspension {
            closed_ns: 5,
            drained_us: Some(1),
            opened_us: Some(2),
            first_request_us: None,
            held: 4,
        },
        probe_blocks: 2,
        carried_bytes: 8192,
        adopted_us: Some(2),
    };
    golden(lines[6], FromInterface::Answer(Answer::Handover(report)), 0);
    assert_eq!(lines.len(), 7);
}

/// The frames of ABI 1, byte for byte.
pub(crate) fn golden_frames_of_abi_1(text: &str) {
    let identity = Identity::parse("everdisk-core 0.1.0 (abi 1..1, buffer 0..0)").unwrap();
    let lent = || LentFile { path: "/srv/v".into(), channels: 2, source: None };
    let lines: Vec<&str> = text.lines().collect();
    golden(lines[0], ToInterface::Hello { identity, slot: None, keeps_locks: false }, 0);
    golden(lines[1], ToInterface::Armed { fronts: 1 }, 0);
    golden(lines[2], ToInterface::Returned { file: Some(lent()), nbd: Vec::new(), connections: 0, locks: 0 }, 3);
    golden(lines[3], ToInterface::Request(Request::Handover { to: 42, budget_ms: 100 }), 0);
    golden(lines[4], FromInterface::Welcome { slot: Slot::new(3).unwrap(), fronts: 1, keeps_nodes: false }, 1);
    golden(lines[5], FromInterface::LendFile(lent()), 2);
    golden(lines[6], FromInterface::Answer(Answer::Done), 0);
    golden(lines[7], CoreRequest::Verify { blocks: 64 }, 0);
    golden(lines[8], CoreAnswer::Failed { reason: "no".into() }, 0);
    assert_eq!(lines.len(), 9);
}

#[test]
fn a_manifest_that_differs_from_what_came_is_refused() {
    let bytes =
        encode(&Frame::new(1, FromInterface::Welcome { slot: Slot::FIRST, fronts: 0, keeps_nodes: false })).unwrap();
    assert!(matches!(decode::<FromInterface>(&bytes, 0), Err(BadFrame::Fds { announced: 1, came: 0 })));
    assert!(matches!(decode::<FromInterface>(&bytes, 2), Err(BadFrame::Fds { announced: 1, came: 2 })));
}

#[test]
fn an_unknown_body_and_an_impossible_slot_are_refused() {
    assert!(decode::<ToInterface>(br#"{"abi":1,"id":1,"body":{"format_disk":{}}}"#, 0).is_err());
    assert!(decode::<FromInterface>(br#"{"abi":1,"id":1,"body":{"welcome":{"slot":200}}}"#, 1).is_err());
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512), fds in 0usize..20) {
        let _ = decode::<ToInterface>(&bytes, fds);
        let _ = decode::<FromInterface>(&bytes, fds);
        let _ = decode::<CoreRequest>(&bytes, fds);
        let _ = decode::<CoreAnswer>(&bytes, fds);
    }
}
