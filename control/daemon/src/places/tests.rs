use std::os::unix::{
    fs::symlink,
    net::{UnixDatagram, UnixListener},
};

use super::*;

fn name() -> VolumeName {
    "v".parse().unwrap()
}

#[test]
fn what_cannot_be_mounted_on_is_refused_and_links_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let why = |path: &Path| resolve_file(path, &name(), &Territory::default()).unwrap_err().to_string();
    fs::write(at("file"), "").unwrap();
    symlink(at("file"), at("link")).unwrap();
    symlink(at("nowhere"), at("dangling")).unwrap();
    let real = fs::canonicalize(dir.path()).unwrap();
    assert_eq!(resolve_file(&at("new"), &name(), &Territory::default()).unwrap(), real.join("new"));
    assert_eq!(resolve_file(&at("link"), &name(), &Territory::default()).unwrap(), real.join("file"));
    assert!(why(&at("dangling")).contains("leads nowhere"));
    assert!(why(dir.path()).contains("is a directory"));
    assert!(why(Path::new("/dev/null")).contains("not a regular file"));
    assert!(why(&at("none/new")).contains("directory does not exist"));
    assert!(why(Path::new("/")).contains("path of a file"));
    assert!(why(Path::new("v")).contains("absolute path"));
}

#[test]
fn a_path_in_a_node_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let node = dir.path().join("node");
    fs::create_dir_all(node.join("deep")).unwrap();
    symlink(&node, dir.path().join("link")).unwrap();
    let mut spec = crate::volume::tests::volume(dir.path()).spec();
    spec.nodes[0].url = everdisk_proto::volume::NodeUrl::Dir(dir.path().join("link"));
    let territory = Territory::of(&[(spec, None)]);
    for inside in ["link/file", "node/deep/file"] {
        let path = dir.path().join(inside);
        let refused = resolve_socket(&path, &name(), &territory).unwrap_err().to_string();
        assert!(refused.contains("own storage node"), "{refused}");
        let file = FileOptions { path, mode: 0o600, owner: None, allow_other: false };
        let refused = look_at(Some(&file), &[], &name(), &territory).unwrap_err().to_string();
        assert!(refused.contains("own storage node"), "{refused}");
    }
}

#[test]
fn what_is_mounted_on_is_made_or_was_there_empty_and_is_the_one_that_was_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| fs::canonicalize(dir.path()).unwrap().join(name);
    fs::write(at("full"), "precious").unwrap();
    assert!(
        resolve_file(&at("full"), &name(), &Territory::default())
            .unwrap_err()
            .to_string()
            .contains("it is not empty (8 bytes)")
    );
    assert!(make_target(&at("full")).is_err());
    fs::write(at("empty"), "").unwrap();
    assert!(resolve_file(&at("empty"), &name(), &Territory::default()).is_ok());
    assert!(!make_target(&at("empty")).unwrap().is_ours, "it was there before");
    let made = make_target(&at("new")).unwrap();
    assert!(made.is_ours && resolve_file(&at("new"), &name(), &Territory::default()).is_ok());
    if rustix::process::geteuid().is_root() {
        assert!(fs::write(at("new"), "x").is_err(), "nobody writes into it");
        assert_eq!(make_target(&at("new")).unwrap(), made, "one that was left is taken up");
    }
    remove_target(&at("new"), made.id);
    assert!(!at("new").exists());
}

#[test]
fn a_socket_takes_the_place_of_nothing_or_of_one_that_nobody_has() {
    let dir = tempfile::tempdir().unwrap();
    let free = Territory::default();
    let at = |name: &str| dir.path().join(name);
    let why = |name: &str| resolve_socket(&at(name), &self::name(), &free).unwrap_err().to_string();
    let real = fs::canonicalize(dir.path()).unwrap();
    fs::create_dir(at("sub")).unwrap();
    symlink(at("sub"), at("link")).unwrap();
    assert_eq!(resolve_socket(&at("link/new"), &name(), &free).unwrap(), NbdAddress::Unix(real.join("sub/new")));
    drop(UnixListener::bind(at("stale")).unwrap());
    assert!(resolve_socket(&at("stale"), &name(), &free).is_ok());
    let _listener = UnixListener::bind(at("stream")).unwrap();
    let _datagram = UnixDatagram::bind(at("datagram")).unwrap();
    let _packet = packet::listen(&at("packet")).unwrap();
    for taken in ["stream", "datagram", "packet"] {
        assert!(why(taken).contains("a process has that socket"), "{}", why(taken));
    }
    fs::write(at("file"), "x").unwrap();
    symlink(at("stale"), at("to-socket")).unwrap();
    for foreign in ["file", "sub", "to-socket"] {
        assert!(why(foreign).contains("not a socket is there"), "{}", why(foreign));
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
fn only_sockets_that_were_made_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| fs::canonicalize(dir.path()).unwrap().join(name);
    for name in ["ours", "other"] {
        drop(UnixListener::bind(at(name)).unwrap());
    }
    fs::write(at("file"), "").unwrap();
    let (directory, ours) =
        file::pin_parent(&at("ours")).map(|(directory, name)| (directory, name.to_owned())).unwrap();
    let bound = file::look_at(directory.as_fd(), &ours).unwrap().map(|found| found.id);
    let listen =
        |address: String, bound| NbdListen { address: address.parse().unwrap(), mode: 0o600, uid: 0, gid: 0, bound };
    let unix = |name: &str, bound| listen(format!("unix:{}", at(name).display()), bound);
    let all = [
        unix("other", bound),
        unix("other", None),
        unix("file", bound),
        unix("none", bound),
        unix("none/deep", bound),
        listen("tcp:localhost:1".to_owned(), None),
    ];
    remove_sockets(&all);
    assert!(at("ours").exists() && at("other").exists() && at("file").exists());
    remove_sockets(&[unix("ours", bound)]);
    assert!(!at("ours").exists());
}

#[test]
fn a_set_of_front_ends_is_looked_at_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let free = Territory::default();
    let real = fs::canonicalize(dir.path()).unwrap();
    fs::create_dir(real.join("sub")).unwrap();
    symlink(real.join("sub"), real.join("link")).unwrap();
    let file = |name: &str| FileOptions { path: real.join(name), mode: 0o640, owner: None, allow_other: true };
    let nbd = |text: &str| NbdOptions { address: text.parse().unwrap(), mode: 0o660, owner: Some((1, 2)) };
    let unix = |name: &str| nbd(&format!("unix:{}", real.join(name).display()));
    let all = look_at(Some(&file("file")), &[unix("link/s"), nbd("tcp:localhost:0")], &name(), &free).unwrap();
    let found = all.file.unwrap();
    assert_eq!((found.path, found.uid, found.mode), (real.join("file"), rustix::process::geteuid().as_raw(), 0o640));
    let expected =
        |text: String| NbdListen { address: text.parse().unwrap(), mode: 0o660, uid: 1, gid: 2, bound: None };
    let socket = format!("unix:{}", real.join("sub/s").display());
    assert_eq!(all.nbd, [expected(socket), expected("tcp:localhost:0".to_owned())]);
    let why =
        |file: Option<&FileOptions>, nbd: &[NbdOptions]| look_at(file, nbd, &name(), &free).unwrap_err().to_string();
    assert!(why(None, &[]).contains("no front end"));
    assert!(why(None, &[unix("link/s"), unix("sub/s")]).contains("named twice"));
    assert!(why(Some(&file("sub/s")), &[unix("link/s")]).contains("give two paths"));
}
