//! Paths: what is mounted, unmounted, bound or removed is identified by itself, not by its name. Nothing of others is hidden, unmounted or deleted.

use std::{
    fs,
    io::ErrorKind,
    os::unix::{
        fs::{FileExt, symlink},
        net::UnixListener,
    },
    path::Path,
};

use everdisk_tests::{
    guards::Mount,
    host::Host,
    load::Load,
    processes::{self, mount_on, mounts_in},
    run::{Output, Running, sh},
    second::Second,
    volume::Volume,
    wait::{SOON, until_true},
};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn attach(host: &Host, name: &str, path: &Path) -> Output {
    host.everdisk(&["attach", name, "--file", text(path)])
}

/// Every process of a volume, the control module first, so that nothing is restored.
fn kill_all(host: &mut Host, name: &str) {
    let status = Volume::new(host, name).settled();
    let all: Vec<u32> = status.cores().into_iter().chain(status.interface()).collect();
    host.kill_daemon();
    processes::kill_together(&all);
    host.start_daemon();
}

/// A file mounted over another volume's data would be served to that volume's next core.
#[test]
fn a_front_end_lies_in_no_node_of_any_volume_and_no_node_in_what_another_has() {
    let host = Host::new();
    let (e, f) = (host.create("e", "16M", 1), host.create("f", "16M", 1));
    let node = e.node(0);
    let (link, bound) = (host.file("link"), host.file("bound"));
    symlink(&node, &link).unwrap();
    fs::create_dir(&bound).unwrap();
    let _bind = Mount::new(&["--bind", text(&node)], &bound);
    let refuse = || {
        attach(&host, "f", &link.join("../e-0/new")).refused(1, &["storage node", "volume e"]);
        for inside in ["data", "superblock", "new"] {
            for directory in [&node, &link, &bound] {
                attach(&host, "f", &directory.join(inside)).refused(1, &["storage node", "volume e"]);
            }
        }
        let socket = format!("unix:{}", node.join("s").display());
        host.everdisk(&["attach", "f", "--nbd", &socket]).refused(1, &["storage node", "volume e"]);
        let create = |path: &Path| {
            let url = format!("dir:{}", path.display());
            host.everdisk(&["volume", "create", "g", "--size", "16M", "--node", &url, "--create-dir"])
        };
        for inside in ["", "deep", "deep/er", "deep/../else"] {
            for directory in [&node, &link, &bound] {
                create(&directory.join(inside)).refused(1, &["storage node", "volume e", "choose another"]);
            }
        }
        create(host.node("").as_path()).refused(1, &["in it lies storage node"]);
        assert_eq!(fs::read_dir(&node).unwrap().count(), 2, "nothing was made there");
    };
    refuse();
    e.attach(&[]);
    refuse();
    let over = format!("dir:{}", e.path.display());
    let output = host.everdisk(&["volume", "create", "g", "--size", "16M", "--node", &over, "--create-dir"]);
    output.refused(1, &["where volume e is attached"]);
    let twice = format!("dir:{}", host.node("twice").display());
    let again = format!("dir:{}/../twice", host.node("twice").display());
    let output =
        host.everdisk(&["volume", "create", "g", "--size", "16M", "--node", &twice, "--node", &again, "--create-dir"]);
    output.refused(1, &["of the same volume"]);
    e.detach();
    assert_eq!(f.status().state(), "detached");
}

/// A file that is mounted over a node's file, by any user, is not the node's file.
#[test]
fn d11_a_node_whose_file_is_covered_is_refused() {
    let host = Host::new();
    let volume = host.create("v", "16M", 1);
    let stranger = host.file("stranger");
    fs::copy(volume.node(0).join("data"), &stranger).unwrap();
    let covered = Mount::new(&["--bind", text(&stranger)], &volume.node(0).join("data"));
    volume.try_attach(&[]).refused(1, &["something is mounted over it"]);
    host.everdisk(&["volume", "delete", "v", "--yes"]).refused(1, &["something is mounted over it"]);
    drop(covered);
    volume.attach(&[]);
    volume.detach();
}

/// The kernel gives the numbers of mounts and connections to others as soon as they are free.
#[test]
fn the_record_of_a_dead_volume_unmounts_and_removes_nothing_of_another() {
    let mut host = Host::new();
    host.volume("a", "16M");
    host.create("b", "16M", 1);
    let path = host.file("a.img");
    kill_all(&mut host, "a");
    sh("umount", &["-l", text(&path)]);
    attach(&host, "b", &path).ok();
    let mount = mount_on(&path).expect("b is mounted");
    Volume::new(&host, "b").settled();
    let load = Load::start(&Volume { path: path.clone(), ..Volume::new(&host, "b") }, 1);
    host.everdisk(&["detach", "a", "--force"]).ok();
    assert_eq!(mount_on(&path), Some(mount));
    load.goes_on(20);
    load.stop();
    assert_eq!(Volume::new(&host, "b").status().state(), "serving");
    host.everdisk(&["detach", "b"]).ok();
    assert_eq!(mount_on(&path), None);
}

/// A socket, or anything else, that took the place of ours.
#[test]
fn a_detach_removes_its_own_socket_and_nothing_that_took_its_place() {
    let mut host = Host::new();
    host.create("v", "16M", 1);
    let socket = host.file("v.sock");
    let address = format!("unix:{}", socket.display());
    let attach = |host: &Host| host.everdisk(&["attach", "v", "--nbd", &address]).ok();
    attach(&host);
    Volume::new(&host, "v").settled();
    host.everdisk(&["detach", "v"]).ok();
    assert!(!socket.exists(), "its own");

    attach(&host);
    fs::remove_file(&socket).unwrap();
    fs::write(&socket, "precious").unwrap();
    host.everdisk(&["detach", "v"]).ok();
    assert_eq!(fs::read(&socket).unwrap(), b"precious");
    fs::remove_file(&socket).unwrap();

    // Of a volume that is dead: ours goes, although the interface that made it cannot remove it any more.
    attach(&host);
    kill_all(&mut host, "v");
    host.everdisk(&["detach", "v", "--force"]).ok();
    assert!(!socket.exists(), "its own");
    attach(&host);
    kill_all(&mut host, "v");
    fs::remove_file(&socket).unwrap();
    drop(UnixListener::bind(&socket).unwrap());
    host.everdisk(&["detach", "v", "--force"]).ok();
    assert!(socket.exists(), "a socket that another program made, although no process listens there now");
    // A socket that no process has is no obstacle; ours is recognized after a death of the interface too.
    attach(&host);
    let status = Volume::new(&host, "v").settled();
    processes::kill(status.interface().unwrap());
    Volume::new(&host, "v").wait("a new interface", |s| s.interface().is_some() && s.interface() != status.interface());
    Volume::new(&host, "v").settled();
    host.everdisk(&["detach", "v"]).ok();
    assert!(!socket.exists());
}

/// Nothing is hidden.
#[test]
fn a_file_with_something_in_it_and_a_mount_point_are_not_mounted_over() {
    let host = Host::new();
    let volume = host.create("v", "16M", 1);
    fs::write(&volume.path, "precious").unwrap();
    volume.try_attach(&[]).refused(1, &["is not empty", "8 bytes", "give a path"]);
    assert_eq!(fs::read(&volume.path).unwrap(), b"precious");
    fs::write(&volume.path, "").unwrap();
    let stranger = host.file("stranger");
    fs::write(&stranger, "").unwrap();
    let bound = Mount::new(&["--bind", text(&stranger)], &volume.path);
    volume.try_attach(&[]).refused(1, &["is mounted there already"]);
    drop(bound);
    volume.attach(&[]);
    volume.detach();
    assert!(volume.path.exists(), "an empty file that was there before stays");
}

/// Another mount over the volume's file stays, and the volume with it.
#[test]
fn what_was_mounted_over_the_file_is_not_unmounted() {
    let host = Host::new();
    let volume = host.volume("v", "16M");
    let stranger = host.file("stranger");
    fs::write(&stranger, "theirs").unwrap();
    let bound = Mount::new(&["--bind", text(&stranger)], &volume.path);
    volume.ask("detach", &[]).refused(1, &["is mounted over it", "umount"]);
    assert_eq!(fs::read(&volume.path).unwrap(), b"theirs");
    assert_eq!(volume.status().state(), "serving");
    drop(bound);
    volume.detach();
}

/// Two volumes at one place at the same time, of one control module and of two: one gets it, the other gets the reason why not.
#[test]
fn two_attaches_at_one_place_at_the_same_time_give_one_volume() {
    let host = Host::new();
    for name in ["a", "b"] {
        host.create(name, "16M", 1);
    }
    let second = Second::start(&host, "run2", "state2");
    let node = format!("dir:{}", host.node("c").display());
    second.everdisk(&["volume", "create", "c", "--size", "16M", "--node", &node, "--create-dir"]).ok();
    let path = host.file("one.img");
    let socket = format!("unix:{}", host.file("one.sock").display());
    for (front, place) in [("--file", text(&path)), ("--nbd", &socket), ("--file", text(&path)), ("--nbd", &socket)] {
        let running = [
            ("a", Running::start(host.cli(&["attach", "a", front, place]))),
            ("b", Running::start(host.cli(&["attach", "b", front, place]))),
            ("c", Running::start(second.cli(&["attach", "c", front, place]))),
        ];
        let ended = running.map(|(name, running)| (name, running.end(SOON)));
        let attached: Vec<_> = ended.iter().filter(|(_, output)| output.code() == 0).map(|(name, _)| *name).collect();
        assert_eq!(attached.len(), 1, "{front}: {ended:?}");
        for (_, output) in ended.into_iter().filter(|(_, output)| output.code() != 0) {
            assert_eq!(output.code(), 1);
            assert!(output.stderr.contains("one."), "{}", output.stderr);
        }
        let mounts = mounts_in(&host.root().join("files")).len();
        assert_eq!(mounts, usize::from(front == "--file"), "nothing is hidden below another mount");
        let detach = ["detach", attached[0]];
        if attached[0] == "c" {
            second.everdisk(&detach).ok()
        } else {
            host.everdisk(&detach).ok()
        };
        until_true("nothing is left", || !path.exists() && !host.file("one.sock").exists());
    }
}

/// After the file was unmounted by hand, a write to its path fails, also for root: the next attach would hide the data.
#[test]
fn what_stays_at_the_path_after_an_unmount_by_hand_takes_no_data() {
    let host = Host::new();
    let volume = host.volume("v", "16M");
    let file = volume.open();
    file.write_all_at(b"kept", 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    volume.settled();
    sh("umount", &[&volume.path]);
    for refused in [fs::write(&volume.path, "lost"), fs::File::options().append(true).open(&volume.path).map(drop)] {
        let error = refused.unwrap_err();
        assert!(!matches!(error.kind(), ErrorKind::NotFound), "it is there: {error}");
    }
    volume.wait_within(SOON, "the end of its processes", |status| status.state() == "failed");
    volume.attach(&[]);
    let mut found = [0; 4];
    volume.open().read_exact_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"kept");
    volume.detach();
    assert!(!volume.path.exists(), "and it goes with the attachment");
}

/// What an attachment that is not on record left behind is taken up, not refused.
#[test]
fn a_placeholder_that_was_left_is_taken_up() {
    let mut host = Host::new();
    host.volume("v", "16M");
    let path = host.file("v.img");
    kill_all(&mut host, "v");
    sh("umount", &["-l", text(&path)]);
    host.stop_daemon();
    fs::remove_file(host.root().join("state/volumes/v/state.json")).unwrap();
    host.start_daemon();
    let volume = Volume::new(&host, "v");
    assert!(fs::symlink_metadata(&path).is_ok() && volume.status().state() == "detached");
    volume.attach(&[]);
    volume.detach();
    assert!(!path.exists());
}
