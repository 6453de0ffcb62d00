//! Detach: refused while the file is used anywhere, and by force only with what it gives up said before.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use everdisk_sys::packet;
use everdisk_tests::{
    bytes::pattern,
    guards::{Loop, Mount},
    host::Host,
    processes::mount_on,
    run::sh,
    volume::Volume,
};

/// A volume attached to its file, and another place for it.
fn bound(host: &Host) -> (Volume<'_>, PathBuf) {
    let volume = host.volume("v", "16M");
    let other = host.file("bound.img");
    File::create(&other).unwrap();
    (volume, other)
}

fn refused(volume: &Volume<'_>, words: &[&str]) {
    volume.ask("detach", &[]).refused(1, &[&["volume v is in use", "--force"], words].concat());
    assert!(mount_on(&volume.path).is_some(), "it is mounted as before");
    assert_eq!(volume.status().state(), "serving");
}

/// The file stays usable for a process that has it open.
fn writes(file: &File) {
    file.write_all_at(b"application", 4096).unwrap();
    file.sync_all().unwrap();
}

/// Through its own path, another mount of it, and a loop device on that.
#[test]
fn detach_refuses_while_the_file_is_open_mounted_elsewhere_or_under_a_loop_device() {
    let host = Host::new();
    let (volume, other) = bound(&host);
    let own = std::process::id().to_string();
    let file = volume.open();
    refused(&volume, &[&format!("process {own} (")]);
    writes(&file);
    drop(file);
    {
        let _bind = Mount::new(&["--bind", volume.path.to_str().unwrap()], &other);
        refused(&volume, &[&format!("mounted at {} too", other.display())]);
        let file = File::options().read(true).write(true).open(&other).unwrap();
        refused(&volume, &[&format!("process {own} ("), "has it open"]);
        writes(&file);
        drop(file);
        let device = Loop::on(&other);
        refused(&volume, &[&format!("{} is on it", device.device())]);
        writes(&File::options().read(true).write(true).open(device.device()).unwrap());
    }
    volume.detach();
}

/// A process in a mount namespace of its own; it ends with this.
struct Elsewhere(Child);

impl Elsewhere {
    /// Runs a script there, and waits until it has said that it is ready.
    fn start(script: &str) -> Self {
        let mut command = Command::new("unshare");
        command.args(["-m", "--propagation", "private", "bash", "-c", script]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start unshare");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self(child)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// In another mount namespace; a copy of the mount that no process uses there is no obstacle.
#[test]
fn detach_refuses_while_the_file_is_open_in_another_mount_namespace() {
    let host = Host::new();
    let (volume, other) = bound(&host);
    let path = volume.path.display();
    let user = Elsewhere::start(&format!("exec 8<>{path}; echo ready; read"));
    refused(&volume, &[&format!("process {} (bash) has it open", user.0.id())]);
    drop(user);
    let user = Elsewhere::start(&format!("mount --bind {path} {0}; echo ready; read", other.display()));
    let words = format!("mounted at {} in the mount namespace of process {} (bash)", other.display(), user.0.id());
    refused(&volume, &[&words]);
    drop(user);
    let _idle = Elsewhere::start("echo ready; read");
    volume.detach();
}

/// A descriptor on its way through a socket, of a mount that has gone: no process has it. The kernel is asked after the unmount, and
/// no user is cut off.
#[test]
fn what_holds_the_file_and_shows_nowhere_is_not_cut_off() {
    let host = Host::new();
    let (volume, other) = bound(&host);
    let hold = || {
        sh("mount", &["--bind", volume.path.to_str().unwrap(), other.to_str().unwrap()]);
        let file = File::options().read(true).write(true).open(&other).unwrap();
        sh("umount", &["-l", other.to_str().unwrap()]);
        file
    };
    let file = hold();
    refused(&volume, &["process "]);
    let (ours, theirs) = packet::pair().unwrap();
    packet::send(ours.as_fd(), b"x", &[file.as_fd()]).unwrap();
    drop(file);
    volume.ask("detach", &[]).refused(1, &["volume v is in use", "served on", "--force"]);
    assert_eq!(mount_on(&volume.path), None);
    assert_eq!(volume.settled().state(), "serving");
    let file: OwnedFd = packet::recv(theirs.as_fd()).unwrap().unwrap().fds.pop().unwrap();
    let file = File::from(file);
    writes(&file);
    volume.ask("detach", &[]).refused(1, &[&format!("process {} (", std::process::id())]);
    writes(&file);
    drop(file);
    volume.detach();
    volume.attach(&[]);
    let mut found = [0; 11];
    volume.open().read_exact_at(&mut found, 4096).unwrap();
    assert_eq!(&found, b"application");
    volume.detach();
}

/// Acknowledged data that a full node does not take: said, asked for, and logged as a loss. Where nothing is at stake nothing is asked.
#[test]
fn a_forced_detach_says_what_it_gives_up_and_logs_it_as_a_loss() {
    let host = Host::new();
    let small = host.node("v-0");
    fs::create_dir(&small).unwrap();
    let _tmpfs = Mount::new(&["-t", "tmpfs", "-o", "size=4M", "none"], &small);
    let volume = host.create_with("v", "64M", 1, &["--buffer", "16M"]);
    volume.attach(&[]);
    volume.open().write_all_at(&pattern(4, 12 << 20), 0).unwrap();
    volume.wait("a full node", |status| status.0["nodes"][0]["state"] == "failed");
    volume.ask("detach", &[]).refused(1, &["No space left", "stays attached", "--force"]);
    let asked = volume.ask("detach", &["--force"]).refused(1, &["gives up", "MiB", "No space left", "s old", "--yes"]);
    assert!(!asked.stderr.contains("nobody can tell"), "{}", asked.stderr);
    let status = volume.settled();
    assert!(status.buffered() > 0 && status.mode() == "write-back", "{status:?}");
    assert!(!host.daemon_log().contains("data_given_up"));
    let done = host.json(&["detach", "v", "--force", "--yes"]);
    assert!(done["given_up_bytes"].as_u64().unwrap() > 0, "{done}");
    let log = host.daemon_log();
    assert!(log.lines().any(|line| line.contains("ERROR") && line.contains("data_given_up")), "{log}");
    assert_eq!(volume.processes(), []);

    sh("mount", &["-o", "remount,size=128M", small.to_str().unwrap()]);
    volume.attach(&[]);
    volume.open().write_all_at(b"small", 0).unwrap();
    assert_eq!(host.json(&["detach", "v", "--force"])["given_up_bytes"].as_u64(), Some(0));
    volume.attach(&[]);
    let mut found = [0; 5];
    volume.open().read_exact_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"small");
    volume.detach();
}

/// A file system that holds every write up, until it is thawed.
struct Frozen<'a>(&'a Path);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(self.0).status();
    }
}

/// A thread that hangs in the kernel for a node cannot be killed: process, file and node are named, and what to do.
#[test]
fn what_does_not_end_on_a_hung_node_is_named() {
    let host = Host::new();
    let image = host.root().join("image");
    File::create(&image).unwrap().set_len(128 << 20).unwrap();
    sh("mkfs.ext4", &["-q", image.to_str().unwrap()]);
    let disk = host.root().join("nodes/disk");
    fs::create_dir(&disk).unwrap();
    let _mount = Mount::new(&["-o", "loop", image.to_str().unwrap()], &disk);
    let node = disk.join("node");
    fs::create_dir(&node).unwrap();
    let url = format!("dir:{}", node.display());
    host.everdisk(&["volume", "create", "v", "--size", "32M", "--node", &url]).ok();
    let volume = Volume::new(&host, "v");
    volume.attach(&[]);
    volume.open().write_all_at(&pattern(1, 1 << 20), 0).unwrap();
    volume.ask("flush", &[]).ok();
    sh("fsfreeze", &["-f", disk.to_str().unwrap()]);
    let frozen = Frozen(&disk);
    volume.open().write_all_at(&pattern(2, 1 << 20), 0).unwrap();
    let core = volume.status().core().unwrap();
    volume.ask("detach", &["--force"]).refused(1, &["gives up", "--yes"]);
    let stuck = volume.ask("detach", &["--force", "--yes"]);
    let words = [&format!("process {core} ("), node.to_str().unwrap(), &url, "restart the machine", "--force` again"];
    stuck.refused(1, &words);
    let status = volume.status();
    assert!(
        status.0["reason"].as_str().is_some_and(|reason| reason.contains(&format!("process {core} ("))),
        "{status:?}"
    );
    drop(frozen);
    volume.wait("its end", |_| !everdisk_tests::processes::is_alive(core));
    volume.ask("detach", &["--force"]).ok();
    assert_eq!((volume.status().state(), volume.processes()), ("detached", Vec::new()));
    volume.attach(&[]);
    volume.detach();
}
