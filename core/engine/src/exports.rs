//! Volumes whose storage nodes are exports of NBD servers.

use std::{fs, os::unix::fs::FileExt};

use everdisk_harness::servers::Server;
use everdisk_proto::{
    superblock::Superblock,
    volume::{Bypass, NbdExport, NodeSpec, NodeUrl, SPEC_VERSION, Timeouts, VolumeSpec},
};
use uuid::Uuid;

use crate::{Creation, Engine, OpenError, layout::Layout};

const STRIPE: u64 = 64 << 10;

fn spec(servers: &[Server], size: u64) -> VolumeSpec {
    let node = |(n, server): (u128, &Server)| NodeSpec { url: server.url(), uuid: Uuid::from_u128(n) };
    VolumeSpec {
        spec_version: SPEC_VERSION,
        name: "v".parse().unwrap(),
        uuid: Uuid::from_u128(9),
        size,
        stripe: STRIPE,
        buffer: 0,
        bypass: Bypass::Auto,
        timeouts: Timeouts::default(),
        nodes: (1..).zip(servers).map(node).collect(),
    }
}

/// The life of a volume whose nodes are exports, one of which has two names at first. What a node says of its own length agrees with
/// the layout at every size.
#[test]
fn a_volume_on_exports_is_made_grown_and_removed() {
    let servers: Vec<_> = (0..3).map(|_| Server::nbdkit_file(2 << 20, &[])).collect();
    let mut spec = spec(&servers, 500_000 & !4095);
    // nbdkit serves the same under any name.
    spec.nodes[2].url = NodeUrl::Nbd(NbdExport { name: "alias".to_owned(), ..servers[0].export().clone() });
    let error = Engine::create(&spec).unwrap_err();
    assert!(matches!(error, OpenError::SameNode(_)) && error.to_string().contains("same export"), "{error}");
    spec.nodes[2].url = servers[2].url();
    Engine::check_directories(&spec).unwrap();
    assert_eq!(Engine::create(&spec).unwrap(), [0; 0], "what the failed attempt had made was undone");
    assert_eq!(Engine::short_of_room(&spec, 1 << 50), [], "what a server has left is unknown");
    let data: Vec<u8> = (0..251).cycle().take(400_000).collect();
    let engine = Engine::open(&spec).unwrap();
    engine.write(1234, &data).unwrap();
    engine.flush().unwrap();
    drop(engine);
    for size in [600_064, 1 << 20, (1 << 20) + 8192, 3 << 20] {
        let size = size & !4095;
        Engine::check_resize(&spec, size).unwrap();
        Engine::resize(&spec, size).unwrap();
        spec.size = size;
        let engine = Engine::open(&spec).unwrap();
        let mut found = vec![1; usize::try_from(size).unwrap()];
        engine.read(0, &mut found).unwrap();
        assert!(found[1234..401_234] == data && found[401_234..].iter().all(|byte| *byte == 0), "{size}");
    }
    let error = Engine::check_resize(&spec, (3 << 20) + 4096).unwrap_err();
    assert!(matches!(error, OpenError::Node(everdisk_store::OpenError::TooSmall { .. })), "{error}");
    Engine::check_destroy(&spec).unwrap();
    assert_eq!(Engine::destroy(&spec).unwrap(), [0; 0]);
    assert_eq!(Engine::destroy(&spec).unwrap(), [0, 1, 2], "nothing was left there");
    // Something else lies there now.
    fs::File::options().write(true).open(servers[1].image()).unwrap().write_all_at(b"dear", 77).unwrap();
    let error = Engine::create(&spec).unwrap_err();
    assert!(error.to_string().contains("the byte at 77 is 0x64"), "{error}");
    Engine::create_with(&spec, Creation { force: true }).unwrap();
    let mut found = vec![1; 3 << 20];
    Engine::open(&spec).unwrap().read(0, &mut found).unwrap();
    assert!(found.iter().all(|byte| *byte == 0));
}

#[test]
fn the_length_of_a_node_follows_from_its_superblock() {
    for (nodes, size) in [(1, 0), (1, 4096), (3, STRIPE), (3, 3 * STRIPE), (3, 10 * STRIPE + 4096), (64, 777 << 20)] {
        for index in 0..nodes {
            let superblock =
                Superblock { volume: Uuid::from_u128(1), node: Uuid::from_u128(2), size, stripe: STRIPE, index, nodes };
            let by_layout = Layout::new(STRIPE, nodes as usize).node_len(index as usize, size);
            assert_eq!(everdisk_store::superblock::node_len(&superblock), by_layout, "node {index} of {nodes}, {size}");
        }
    }
}
