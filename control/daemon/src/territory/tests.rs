use std::{fs, os::unix::fs::symlink};

use everdisk_proto::{
    frame::FileAttach,
    volume::{NodeSpec, NodeUrl},
};
use uuid::Uuid;

use super::*;
use crate::{
    process::{ProcessId, boot_id},
    record::Phase,
};

fn spec(name: &str, nodes: &[PathBuf]) -> VolumeSpec {
    let text = include_str!("../../../../proto/golden/volume-v1.json");
    let mut spec: VolumeSpec = serde_json::from_str(text).unwrap();
    spec.name = name.parse().unwrap();
    let node = |path: &PathBuf| NodeSpec { url: NodeUrl::Dir(path.clone()), uuid: Uuid::new_v4() };
    spec.nodes = nodes.iter().map(node).collect();
    spec
}

fn attached(path: &Path, lives: bool) -> Attachment {
    let interface = ProcessId::of(std::process::id()).filter(|_| lives);
    Attachment {
        boot_id: boot_id(),
        phase: Phase::Attached,
        file: Some(FileAttach {
            path: path.to_owned(),
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
        cores: Vec::new(),
        started: 0,
        home: None,
    }
}

#[test]
fn a_front_end_lies_in_no_node_of_any_volume() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("a/deep")).unwrap();
    fs::create_dir(at("b")).unwrap();
    symlink(at("a"), at("link")).unwrap();
    let territory = Territory::of(&[(spec("v", &[at("link")]), None), (spec("w", &[at("b"), at("gone")]), None)]);
    let why = |path: &str, volume: &str| {
        let name = volume.parse().unwrap();
        territory.refuse_front_end("/f", &at(path), &name).unwrap_err().to_string()
    };
    for path in ["a/data", "a/deep/f", "link/f", "b/../a/f"] {
        let (own, other) = (why(path, "v"), why(path, "w"));
        assert!(own.contains("cannot attach at /f: it lies in the volume's own storage node"), "{own}");
        assert!(other.contains("it lies in storage node") && other.contains("of volume v"), "{other}");
    }
    assert!(why("gone/f", "v").contains("of volume w"), "also where the disk is not mounted");
    for path in ["f", "ab", "bb/f"] {
        territory.refuse_front_end("/f", &at(path), &"v".parse().unwrap()).unwrap();
    }
}

#[test]
fn a_node_lies_neither_in_nor_over_what_another_volume_has() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("a/b")).unwrap();
    symlink(at("a"), at("link")).unwrap();
    fs::write(at("v.img"), "").unwrap();
    let territory = Territory::of(&[(spec("v", &[at("a/b")]), Some(attached(&at("v.img"), true)))]);
    let why = |nodes: &[&str]| {
        let nodes: Vec<PathBuf> = nodes.iter().map(|name| at(name)).collect();
        territory.refuse_nodes(&spec("w", &nodes)).map_err(|e| e.to_string())
    };
    for (node, expected) in [
        ("a/b", "it is storage node"),
        ("link/b", "it is storage node"),
        ("a/b/c", "it lies in storage node"),
        ("a/b/c/../d", "it lies in storage node"),
        ("a", "in it lies storage node"),
        ("link", "in it lies storage node"),
        ("v.img", "where volume v is attached"),
        ("v.img/n", "where volume v is attached"),
    ] {
        let refused = why(&["fine", node]).unwrap_err();
        assert!(refused.contains(expected) && refused.contains("choose another"), "{node}: {refused}");
    }
    for pair in [["n", "n/../n"], ["n", "n/m"], ["n/m", "n"]] {
        let refused = why(&pair).unwrap_err();
        assert!(refused.contains("of the same volume"), "{pair:?}: {refused}");
    }
    why(&["ab", "a/bb", "c"]).unwrap();
}

/// A place that a dead volume had is free. Whether something is mounted there is checked elsewhere.
#[test]
fn the_place_of_a_volume_that_lives_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.img");
    let node = dir.path().join("n");
    let at = |attachment| Territory::of(&[(spec("v", std::slice::from_ref(&node)), Some(attachment))]);
    let ask = |territory: Territory, name: &str| territory.refuse_front_end("/f", &path, &name.parse().unwrap());
    let refused = ask(at(attached(&path, true)), "w").unwrap_err().to_string();
    assert!(refused.contains("volume v is attached there"), "{refused}");
    let attaching = Attachment { phase: Phase::Attaching, ..attached(&path, false) };
    assert!(ask(at(attaching), "w").is_err(), "or is about to be");
    ask(at(attached(&path, false)), "w").unwrap();
    ask(at(Attachment { boot_id: "another".to_owned(), ..attached(&path, true) }), "w").unwrap();
    ask(at(attached(&path, true)), "v").unwrap();
}

#[test]
fn g_an_export_claims_no_ground_and_hides_no_directory_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let [node, socket] = ["node", "s.sock"].map(|name| dir.path().join(name));
    fs::create_dir(&node).unwrap();
    let mut mixed = spec("a", std::slice::from_ref(&node));
    let export = format!("nbd+unix:///x?socket={}", socket.display());
    mixed.nodes.insert(0, NodeSpec { url: export.parse().unwrap(), uuid: Uuid::new_v4() });
    let known = Territory::of(&[(mixed, None)]);
    known.refuse_front_end("it", &socket, &"b".parse().unwrap()).unwrap();
    let inside = known.refuse_front_end("it", &node.join("v"), &"b".parse().unwrap()).unwrap_err().to_string();
    assert!(inside.contains("of volume a"), "{inside}");
    assert!(known.refuse_nodes(&spec("b", &[node])).is_err());
}
