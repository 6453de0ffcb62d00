use std::os::unix::{
    fs::symlink,
    net::{UnixDatagram, UnixListener},
};

use super::*;

fn spec(root: &Path) -> VolumeSpec {
    crate::volume::tests::volume(root).spec()
}

#[test]
fn what_cannot_be_mounted_on_is_refused_and_links_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let why = |path: &Path| resolve_file(path).unwrap_err().to_string();
    fs::write(at("file"), "x").unwrap();
    symlink(at("file"), at("link")).unwrap();
    symlink(at("nowhere"), at("dangling")).unwrap();
    let real = fs::canonicalize(dir.path()).unwrap();
    assert_eq!(resolve_file(&at("new")).unwrap(), real.join("new"));
    assert_eq!(resolve_file(&at("link")).unwrap(), real.join("file"));
    assert!(why(&at("dangling")).contains("leads nowhere"));
    assert!(why(dir.path()).contains("is a directory"));
    assert!(why(Path::new("/dev/null")).contains("no regular file"));
    assert!(why(&at("none/new")).contains("directory does not exist"));
    assert!(why(Path::new("/")).contains("path of a file"));
}

#[test]
fn a_path_in_a_node_of_the_volume_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let node = dir.path().join("node");
    fs::create_dir_all(node.join("deep")).unwrap();
    symlink(&node, dir.path().join("link")).unwrap();
    let mut spec = spec(dir.path());
    spec.nodes[0].url = NodeUrl::Dir(dir.path().join("link"));
    let real = fs::canonicalize(&node).unwrap();
    for inside in ["file", "deep/file"] {
        let refused = refuse_own_nodes("/f", &real.join(inside), &spec).unwrap_err().to_string();
        assert!(refused.contains("/f: it lies in the volume's own storage node"), "{refused}");
        let refused = resolve_socket(&dir.path().join("link").join(inside), &spec).unwrap_err().to_string();
        assert!(refused.contains("own storage node"), "{refused}");
    }
    assert!(refuse_own_nodes("/f", &real.with_file_name("node2"), &spec).is_ok());
}

#[test]
fn a_socket_takes_the_place_of_nothing_or_of_one_that_nobody_has() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let at = |name: &str| dir.path().join(name);
    let why = |name: &str| resolve_socket(&at(name), &spec).unwrap_err().to_string();
    let real = fs::canonicalize(dir.path()).unwrap();
    fs::create_dir(at("sub")).unwrap();
    symlink(at("sub"), at("link")).unwrap();
    assert_eq!(resolve_socket(&at("link/new"), &spec).unwrap(), NbdAddress::Unix(real.join("sub/new")));
    drop(UnixListener::bind(at("stale")).unwrap());
    assert!(resolve_socket(&at("stale"), &spec).is_ok());
    let _listener = UnixListener::bind(at("stream")).unwrap();
    let _datagram = UnixDatagram::bind(at("datagram")).unwrap();
    let _packet = packet::listen(&at("packet")).unwrap();
    for taken in ["stream", "datagram", "packet"] {
        assert!(why(taken).contains("a process has that socket"), "{}", why(taken));
    }
    fs::write(at("file"), "x").unwrap();
    symlink(at("stale"), at("to-socket")).unwrap();
    for foreign in ["file", "sub", "to-socket"] {
        assert!(why(foreign).contains("no socket is there"), "{}", why(foreign));
    }
    assert!(why("none/new").contains("none/new: its directory does not exist; make it first"));
    assert!(why("file/new").contains("cannot attach at"), "{}", why("file/new"));
    fs::create_dir(at(&"d".repeat(100))).unwrap();
    symlink(at(&"d".repeat(100)), at("short")).unwrap();
    assert!(why("short/new").contains("at most 107 bytes"), "{}", why("short/new"));
}

#[test]
fn nobody_who_listens_sees_that_it_was_asked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    assert!(has_owner(&path));
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn only_sockets_that_nobody_has_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    drop(UnixListener::bind(at("stale")).unwrap());
    let _listener = UnixListener::bind(at("taken")).unwrap();
    fs::write(at("file"), "").unwrap();
    let listen = |address: String| NbdListen { address: address.parse().unwrap(), mode: 0o600, uid: 0, gid: 0 };
    let unix = |name: &str| listen(format!("unix:{}", at(name).display()));
    remove_sockets(&[unix("stale"), unix("taken"), unix("file"), unix("none"), listen("tcp:localhost:1".to_owned())]);
    assert!(!at("stale").exists() && at("taken").exists() && at("file").exists());
}

#[test]
fn a_set_of_front_ends_is_looked_at_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let real = fs::canonicalize(dir.path()).unwrap();
    fs::create_dir(real.join("sub")).unwrap();
    symlink(real.join("sub"), real.join("link")).unwrap();
    let file = |name: &str| FileOptions { path: real.join(name), mode: 0o640, owner: None, allow_other: true };
    let nbd = |text: &str| NbdOptions { address: text.parse().unwrap(), mode: 0o660, owner: Some((1, 2)) };
    let unix = |name: &str| nbd(&format!("unix:{}", real.join(name).display()));
    let all = look_at(Some(&file("file")), &[unix("link/s"), nbd("tcp:localhost:0")], &spec).unwrap();
    let found = all.file.unwrap();
    assert_eq!((found.path, found.uid, found.mode), (real.join("file"), rustix::process::geteuid().as_raw(), 0o640));
    let expected = |text: String| NbdListen { address: text.parse().unwrap(), mode: 0o660, uid: 1, gid: 2 };
    let socket = format!("unix:{}", real.join("sub/s").display());
    assert_eq!(all.nbd, [expected(socket), expected("tcp:localhost:0".to_owned())]);
    let why = |file: Option<&FileOptions>, nbd: &[NbdOptions]| look_at(file, nbd, &spec).unwrap_err().to_string();
    assert!(why(None, &[]).contains("no front end"));
    assert!(why(None, &[unix("link/s"), unix("sub/s")]).contains("named twice"));
    assert!(why(Some(&file("sub/s")), &[unix("link/s")]).contains("give two paths"));
}
