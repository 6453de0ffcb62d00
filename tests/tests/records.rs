//! What is deleted, what is kept, and what happens to damaged records.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use everdisk_tests::{bytes::pattern, guards::Mount, host::Host, run::Output, volume::Volume};

fn url(node: &Path) -> String {
    format!("dir:{}", node.display())
}

fn create(host: &Host, nodes: &[&PathBuf], options: &[&str]) -> Output {
    let urls: Vec<String> = nodes.iter().map(|node| url(node)).collect();
    let mut arguments = vec!["volume", "create", "v", "--size", "16M"];
    urls.iter().for_each(|url| arguments.extend(["--node", url]));
    arguments.extend(options);
    host.everdisk(&arguments)
}

fn written(volume: &Volume<'_>) -> Vec<u8> {
    let data = pattern(3, 1 << 20);
    volume.attach(&[]);
    volume.open().write_all_at(&data, 0).unwrap();
    volume.detach();
    data
}

fn holds(volume: &Volume<'_>, data: &[u8]) {
    volume.attach(&[]);
    let mut found = vec![0; data.len()];
    volume.open().read_exact_at(&mut found, 0).unwrap();
    assert!(found == data);
    volume.detach();
}

/// A node whose directory is not there is not made unless that was asked for, and what was made goes with the volume.
#[test]
fn directories_are_made_when_that_is_asked_for_and_only_those_are_removed() {
    let host = Host::new();
    let (own, made) = (host.node("own"), host.node("deep/made"));
    fs::create_dir(&own).unwrap();
    create(&host, &[&own, &made], &[]).refused(1, &[made.to_str().unwrap(), "--create-dir"]);
    assert!(!made.exists() && fs::read_dir(&own).unwrap().count() == 0);
    create(&host, &[&own, &made], &["--create-dir"]).ok();
    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
    assert!(own.exists() && fs::read_dir(&own).unwrap().count() == 0, "the operator's own directory stays, empty");
    assert!(!made.exists());
}

/// A file system that is smaller than the volume's part is reported when the volume is made or grows.
#[test]
fn a_volume_that_its_node_cannot_take_whole_is_made_with_a_warning() {
    let host = Host::new();
    let small = host.node("small");
    fs::create_dir(&small).unwrap();
    let _tmpfs = Mount::new(&["-t", "tmpfs", "-o", "size=18M", "none"], &small);
    let output = create(&host, &[&small], &[]);
    assert!(!output.stderr.contains("warning"), "{output:?}");
    output.ok();
    let grown = host.everdisk(&["volume", "resize", "v", "32M"]);
    assert!(
        grown.stderr.contains("everdisk: warning: the file system of dir:") && grown.stderr.contains("32M"),
        "{grown:?}"
    );
    grown.ok();
    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
}

/// The disk of a node is not mounted: nothing is deleted, and the volume is whole when it is mounted again. By force the rest is deleted, and
/// what stays is said.
#[test]
fn a_delete_while_a_nodes_disk_is_not_mounted_touches_nothing() {
    let host = Host::new();
    let (a, b) = (host.node("a"), host.node("b"));
    [&a, &b].into_iter().for_each(|node| fs::create_dir(node).unwrap());
    let disk = host.root().join("disk");
    fs::create_dir(&disk).unwrap();
    let _disk = Mount::new(&["-t", "tmpfs", "none"], &disk);
    let mounted = || Mount::new(&["--bind", disk.to_str().unwrap()], &b);
    let volume = Volume::new(&host, "v");
    let data = {
        let _mounted = mounted();
        create(&host, &[&a, &b], &[]).ok();
        written(&volume)
    };
    let refused = host.everdisk(&["volume", "delete", "v", "--yes"]);
    refused.refused(
        1,
        &["volume v is not deleted", "nothing of it was touched", b.to_str().unwrap(), "Mount the disk", "--force"],
    );
    assert!(b.exists());
    {
        let _mounted = mounted();
        holds(&volume, &data);
    }
    let deleted = host.everdisk(&["volume", "delete", "v", "--yes", "--force"]);
    assert!(deleted.stderr.contains(&url(&b)) && deleted.stderr.contains("not mounted"), "{deleted:?}");
    deleted.ok();
    assert!(a.exists() && fs::read_dir(&a).unwrap().count() == 0);
    assert!(disk.join("data").exists(), "what was not there is as it was");
    host.everdisk(&["status", "v"]).refused(1, &["there is no volume v"]);
}

/// A description that cannot be read: the volume is shown as failed, nothing takes its name, and it can be forgotten without harm to its data.
#[test]
fn a_damaged_description_is_shown_and_can_be_put_aside() {
    let mut host = Host::new();
    let volume = host.create("v", "16M", 2);
    let data = written(&volume);
    let sound = host.create("w", "16M", 1);
    assert_eq!(sound.status().state(), "detached");
    host.stop_daemon();
    let file = host.root().join("state/volumes/v/volume.json");
    let text = fs::read(&file).unwrap();
    fs::write(&file, &text[..text.len() / 2]).unwrap();
    host.start_daemon();
    let volume = Volume::new(&host, "v");
    let status = volume.status();
    let reason = status.0["reason"].as_str().unwrap();
    assert_eq!(status.state(), "failed");
    assert!(reason.contains("volume.json is damaged") && reason.contains("volume forget v"), "{reason}");
    for list in [&["volume", "list"][..], &["status"]] {
        let list = host.everdisk(list).ok();
        assert!(list.lines().any(|line| line.starts_with("v ") && line.contains("failed")), "{list}");
        assert!(list.lines().any(|line| line.starts_with("w ") && line.contains("detached")), "{list}");
    }
    let nodes = [volume.node(0), volume.node(1)];
    let taken = create(&host, &[&host.node("c")], &["--create-dir"]).refused(1, &["a volume v already", "damaged"]);
    assert!(!taken.stderr.contains("volume delete"), "{}", taken.stderr);
    for command in [&["volume", "delete", "v", "--yes"][..], &["volume", "show", "v"], &["detach", "v"]] {
        host.everdisk(command).refused(1, &["volume v cannot be used", "volume forget v"]);
    }
    host.everdisk(&["volume", "forget", "v"]).refused(1, &["--yes"]);
    let forgotten = host.json(&["volume", "forget", "v", "--yes"]);
    let files = PathBuf::from(forgotten["files"].as_str().unwrap());
    assert!(nodes.iter().all(|node| node.join("data").exists() && node.join("superblock").exists()));
    host.everdisk(&["status", "v"]).refused(1, &["there is no volume v"]);
    // With a description from a backup it is the volume that it was.
    host.stop_daemon();
    fs::write(files.join("volume.json"), text).unwrap();
    fs::rename(files, host.root().join("state/volumes/v")).unwrap();
    host.start_daemon();
    holds(&Volume::new(&host, "v"), &data);
}

/// A record that cannot be read: the volume is shown as failed, and begins a new one by force.
#[test]
fn a_damaged_record_is_shown_and_begun_anew() {
    let mut host = Host::new();
    let volume = host.create("v", "16M", 2);
    let data = written(&volume);
    host.stop_daemon();
    fs::write(host.root().join("state/volumes/v/state.json"), "{").unwrap();
    host.start_daemon();
    let volume = Volume::new(&host, "v");
    let status = volume.status();
    let reason = status.0["reason"].as_str().unwrap();
    assert_eq!(status.state(), "failed");
    assert!(reason.contains("state.json is damaged") && reason.contains("detach v --force"), "{reason}");
    volume.try_attach(&[]).refused(1, &["state.json is damaged"]);
    volume.ask("detach", &["--force"]).ok();
    holds(&volume, &data);
}

/// The same while it is served: its users are cut off only when the operator agrees.
#[test]
fn a_damaged_record_of_a_volume_that_is_served_costs_nobody_anything() {
    let mut host = Host::new();
    host.volume("v", "16M");
    host.kill_daemon();
    fs::write(host.root().join("state/volumes/v/state.json"), "{").unwrap();
    host.start_daemon();
    let volume = Volume::new(&host, "v");
    assert_eq!(volume.status().state(), "failed");
    let file = volume.open();
    file.write_all_at(b"served", 0).unwrap();
    file.sync_all().unwrap();
    host.everdisk(&["volume", "forget", "v", "--yes"]).refused(1, &["may be serving it"]);
    volume.ask("detach", &["--force"]).refused(1, &["processes of it run", "--yes"]);
    file.write_all_at(b"served", 4096).unwrap();
    drop(file);
    volume.ask("detach", &["--force", "--yes"]).ok();
    assert_eq!(volume.processes(), []);
    everdisk_tests::run::sh("umount", &[&volume.path]);
    volume.attach(&[]);
    let mut found = [0; 6];
    volume.open().read_exact_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"served");
    volume.detach();
}
