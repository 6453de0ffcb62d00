//! The engine on dir nodes against the reference disk: any sequence of operations, unaligned edges, extents that cross
//! stripes, reopening and growing in between (M7).

use everdisk_proto::{
    limits::BLOCK,
    volume::{Bypass, NodeSpec, NodeUrl, SPEC_VERSION, Timeouts, VolumeSpec},
};
use everdisk_testkit::reference_disk::ReferenceDisk;
use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;

use crate::{Engine, Sought};

const STRIPE: u64 = 64 << 10;

#[derive(Clone, Debug)]
enum Op {
    Read(usize, usize),
    Write(usize, usize, u8),
    Discard(usize, usize),
    WriteZeroes(usize, usize),
    Allocate(usize, usize),
    Seek(usize),
    Flush,
    Verify(u32),
    Reopen,
    Grow(u64),
}

/// Offsets and lengths that are prone to errors: around stripes and blocks, at the end and beyond.
fn any_range() -> impl Strategy<Value = (usize, usize)> {
    let offset = prop_oneof![
        4 => 0usize..1_200_000,
        2 => (0usize..20, -3isize..4).prop_map(|(stripe, by)| (stripe << 16).saturating_add_signed(by)),
        1 => (0usize..300).prop_map(|block| block << 12),
    ];
    let len = prop_oneof![
        4 => 0usize..10_000,
        2 => 0usize..400_000,
        1 => (0usize..6).prop_map(|stripes| stripes << 16),
        1 => Just(1 << 20),
    ];
    (offset, len)
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => any_range().prop_map(|(at, len)| Op::Read(at, len)),
        6 => (any_range(), 1u8..).prop_map(|((at, len), seed)| Op::Write(at, len, seed)),
        2 => any_range().prop_map(|(at, len)| Op::Discard(at, len)),
        2 => any_range().prop_map(|(at, len)| Op::WriteZeroes(at, len)),
        1 => any_range().prop_map(|(at, len)| Op::Allocate(at, len)),
        3 => any_range().prop_map(|(at, _)| Op::Seek(at)),
        1 => Just(Op::Flush),
        1 => (0u32..400).prop_map(Op::Verify),
        1 => Just(Op::Reopen),
        1 => (1u64..40).prop_map(Op::Grow),
    ]
}

fn spec(parent: &TempDir, nodes: usize, blocks: u64) -> VolumeSpec {
    let node = |n: usize| NodeSpec {
        url: NodeUrl::Dir(parent.path().join(n.to_string())),
        uuid: Uuid::from_u128(1 + n as u128),
    };
    VolumeSpec {
        spec_version: SPEC_VERSION,
        name: "v".parse().unwrap(),
        uuid: Uuid::from_u128(0xE),
        size: blocks * BLOCK,
        stripe: STRIPE,
        buffer: 0,
        bypass: Bypass::Auto,
        timeouts: Timeouts::default(),
        nodes: (0..nodes).map(node).collect(),
    }
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (usize::from(seed)..).take(len).map(|n| u8::try_from(n % 251).unwrap() + 1).collect()
}

/// Walks all data and holes from `from` on and compares them with the contents: a hole has no data in it.
fn check_seek(engine: &Engine, disk: &ReferenceDisk, from: usize) {
    let seek = |at: usize, what| engine.seek(at as u64, what).unwrap().map(|at| usize::try_from(at).unwrap());
    if from >= disk.size() {
        assert_eq!((seek(from, Sought::Data), seek(from, Sought::Hole)), (None, None));
        return;
    }
    let mut at = from;
    while let Some(data) = seek(at, Sought::Data) {
        assert!(at <= data && data < disk.size());
        assert!(disk.is_zero(at, data - at), "the hole {at}..{data} has data in it");
        let hole = seek(data, Sought::Hole).expect("the end counts as a hole");
        assert!(data < hole && hole <= disk.size(), "data {data}, hole {hole}");
        at = hole;
    }
    assert!(disk.is_zero(at, disk.size() - at), "the hole from {at} on has data in it");
}

struct Both {
    spec: VolumeSpec,
    engine: Engine,
    disk: ReferenceDisk,
}

impl Both {
    /// Does the operation on both. They must agree on whether it is inside the volume and on what is read.
    fn apply(&mut self, op: &Op) {
        let Self { spec, engine, disk } = self;
        match *op {
            Op::Read(at, len) => {
                let mut buf = vec![0xEE; len];
                let ok = engine.read(at as u64, &mut buf).is_ok();
                assert_eq!(ok.then_some(&buf[..]), disk.read(at, len), "{op:?}");
            }
            Op::Write(at, len, seed) => {
                let data = pattern(seed, len);
                assert_eq!(engine.write(at as u64, &data).is_ok(), disk.write(at, &data), "{op:?}");
            }
            Op::Discard(at, len) => {
                assert_eq!(engine.discard(at as u64, len as u64).is_ok(), disk.zero(at, len), "{op:?}");
            }
            Op::WriteZeroes(at, len) => {
                assert_eq!(engine.write_zeroes(at as u64, len as u64).is_ok(), disk.zero(at, len), "{op:?}");
            }
            Op::Allocate(at, len) => {
                assert_eq!(engine.allocate(at as u64, len as u64).is_ok(), disk.read(at, len).is_some(), "{op:?}");
            }
            Op::Seek(at) => check_seek(engine, disk, at),
            Op::Flush => engine.flush().unwrap(),
            Op::Verify(blocks) => {
                assert_eq!(u64::from(engine.verify(blocks).unwrap()), u64::from(blocks).min(spec.size / BLOCK));
                let expected = spec.nodes.len().min(usize::try_from(spec.size.div_ceil(STRIPE)).unwrap());
                assert_eq!(engine.probe().unwrap() as usize, expected);
            }
            Op::Reopen => *engine = Engine::open(spec).unwrap(),
            Op::Grow(blocks) => {
                Engine::resize(spec, spec.size + blocks * BLOCK).unwrap();
                spec.size += blocks * BLOCK;
                disk.grow(usize::try_from(spec.size).unwrap());
                *engine = Engine::open(spec).unwrap();
                assert_eq!(engine.size(), spec.size);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn engine_agrees_with_the_reference_disk(
        nodes in 1usize..5,
        blocks in 1u64..280,
        ops in prop::collection::vec(any_op(), 1..40),
    ) {
        let parent = TempDir::new_in("/dev/shm").unwrap();
        let spec = spec(&parent, nodes, blocks);
        Engine::create(&spec).unwrap();
        let disk = ReferenceDisk::new(usize::try_from(spec.size).unwrap());
        let mut both = Both { engine: Engine::open(&spec).unwrap(), spec, disk };
        for op in &ops {
            both.apply(op);
        }
        both.apply(&Op::Reopen);
        both.apply(&Op::Read(0, both.disk.size()));
        both.apply(&Op::Seek(0));
        prop_assert!(both.engine.nodes().iter().all(|node| node.state == everdisk_proto::node::NodeState::InStep && node.error.is_none()));
        Engine::destroy(&both.spec).unwrap();
        for node in &both.spec.nodes {
            let path = node.url.as_directory().expect("it was made so");
            prop_assert_eq!(std::fs::read_dir(path).unwrap().count(), 0);
        }
    }
}
