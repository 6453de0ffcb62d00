//! Storage nodes that are not what they should be.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use everdisk_tests::{
    bytes::pattern, guards::Mount, host::Host, processes::mount_on, programs::core_next, volume::Volume,
};
use rustix::io::Errno;

/// Attach is refused with these words and leaves nothing behind.
fn refused(volume: &Volume<'_>, words: &[&str]) {
    volume.try_attach(&[]).refused(1, words);
    assert_eq!(volume.status().state(), "detached");
    assert_eq!(volume.processes(), []);
    assert_eq!(mount_on(&volume.path), None);
    assert!(!volume.path.exists(), "the file that attach made stays behind");
}

/// D11: each damage of a storage node is refused with its reason, and mended it is attached again.
#[test]
fn d11_a_damaged_or_foreign_storage_node_is_refused_with_the_reason() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let data = pattern(3, 300_000);
    let file = volume.open();
    file.write_all_at(&data, 1_000_000).unwrap();
    file.sync_all().unwrap();
    drop(file);
    volume.detach();
    let other = host.create("other", "64M", 2);
    let node = volume.node(1);
    let (superblock, contents) = (node.join("superblock"), node.join("data"));
    let aside = host.root().join("aside");
    let sound = fs::read(&superblock).unwrap();
    let name = node.to_str().unwrap();

    // Missing.
    fs::rename(&node, &aside).unwrap();
    refused(&volume, &[name]);
    // Another volume's.
    fs::create_dir(&node).unwrap();
    fs::copy(other.node(1).join("superblock"), &superblock).unwrap();
    fs::copy(other.node(1).join("data"), &contents).unwrap();
    refused(&volume, &[name, "belongs to"]);
    fs::remove_dir_all(&node).unwrap();
    // The volume's other node in this one's place.
    fs::create_dir(&node).unwrap();
    fs::copy(volume.node(0).join("superblock"), &superblock).unwrap();
    fs::copy(volume.node(0).join("data"), &contents).unwrap();
    refused(&volume, &[name]);
    fs::remove_dir_all(&node).unwrap();
    // An empty directory, a file, a link that leads in a circle.
    fs::create_dir(&node).unwrap();
    refused(&volume, &[name]);
    fs::remove_dir(&node).unwrap();
    fs::write(&node, "no directory").unwrap();
    refused(&volume, &[name]);
    fs::remove_file(&node).unwrap();
    fs::rename(&aside, &node).unwrap();
    // The superblock: every kind of damage.
    let damages: [(&str, Vec<u8>); 5] = [
        ("damaged", sound.iter().enumerate().map(|(i, b)| if i == 50 { b ^ 1 } else { *b }).collect()),
        ("bytes instead of", sound[..1000].to_vec()),
        ("bytes instead of", Vec::new()),
        ("no Everdisk superblock", vec![0; 4096]),
        ("format", sound.iter().enumerate().map(|(i, b)| if i == 8 { 9 } else { *b }).collect()),
    ];
    for (word, bytes) in damages {
        fs::write(&superblock, bytes).unwrap();
        refused(&volume, &[name, word]);
    }
    fs::write(&superblock, &sound).unwrap();
    // The data: short, long, gone, a fifo in its place.
    let file = File::options().write(true).open(&contents).unwrap();
    let len = file.metadata().unwrap().len();
    for wrong in [len - 4096, 0, len + 4096] {
        fs::copy(&contents, &aside).unwrap();
        file.set_len(wrong).unwrap();
        refused(&volume, &[name]);
        fs::copy(&aside, &contents).unwrap();
    }
    fs::rename(&contents, &aside).unwrap();
    refused(&volume, &[name]);
    everdisk_tests::run::sh("mkfifo", &[&contents]);
    refused(&volume, &[name]);
    fs::remove_file(&contents).unwrap();
    fs::rename(&aside, &contents).unwrap();

    volume.attach(&[]);
    let mut found = vec![0; data.len()];
    volume.open().read_exact_at(&mut found, 1_000_000).unwrap();
    assert!(found == data);
    volume.detach();
}

/// A storage node that is mounted read-only is refused.
#[test]
fn a_read_only_storage_node_is_refused() {
    let host = Host::new();
    let volume = host.create("v", "16M", 2);
    let node = volume.node(0);
    let text = node.to_str().unwrap();
    {
        let _bind = Mount::new(&["--bind", text], &node);
        everdisk_tests::run::sh("mount", &["-o", "remount,bind,ro", text]);
        refused(&volume, &[text, "Read-only"]);
    }
    volume.attach(&[]);
    volume.detach();
}

fn fill(file: &File, from: u64, to: u64) -> io::Result<()> {
    let block = pattern(9, 64 << 10);
    let mut at = from;
    while at < to {
        file.write_all_at(&block, at)?;
        at += 64 << 10;
    }
    Ok(())
}

/// D5: a full storage node under a volume with a write buffer: the fsync gets ENOSPC, so does a write that finds the buffer full,
/// nothing that was acknowledged is lost, and it reaches the node when there is space again.
#[test]
fn d5_a_full_storage_node_is_told_to_fsync_and_the_buffered_data_is_kept() {
    let host = Host::new();
    let small = host.root().join("nodes/small");
    fs::create_dir(&small).unwrap();
    let tmpfs = Mount::new(&["-t", "tmpfs", "-o", "size=8M", "none"], &small);
    let url = format!("dir:{}", small.join("node").display());
    host.everdisk(&["volume", "create", "v", "--size", "64M", "--buffer", "16M", "--node", &url, "--create-dir"]).ok();
    let volume = Volume::new(&host, "v");
    volume.attach(&[]);
    let file = volume.open();
    let written = pattern(4, 14 << 20);
    file.write_all_at(&written, 0).unwrap();
    let error = file.sync_all().expect_err("8 MiB do not hold 14");
    assert_eq!(Errno::from_io_error(&error), Some(Errno::NOSPC), "{error}");
    let error = fill(&file, 20 << 20, 60 << 20).expect_err("node and buffer are full");
    assert_eq!(Errno::from_io_error(&error), Some(Errno::NOSPC), "{error}");
    let read_back = || {
        let mut found = vec![0; written.len()];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == written, "what was acknowledged before");
    };
    read_back();
    volume.upgrade(&core_next());
    volume.kill_core();
    read_back();
    volume.ask("flush", &[]).refused(1, &["No space left", "kept"]);
    everdisk_tests::run::sh("mount", &["-o", "remount,size=128M", small.to_str().unwrap()]);
    file.sync_all().unwrap();
    fill(&file, 20 << 20, 60 << 20).unwrap();
    read_back();
    drop(file);
    volume.detach();
    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
    drop(tmpfs);
}

/// A full storage node: the application gets ENOSPC, the volume lives on, can be upgraded, and works when there is
/// space again.
#[test]
fn a_full_storage_node_gives_enospc_and_the_volume_lives_on() {
    let host = Host::new();
    let small = host.root().join("nodes/small");
    fs::create_dir(&small).unwrap();
    let tmpfs = Mount::new(&["-t", "tmpfs", "-o", "size=8M", "none"], &small);
    let url = format!("dir:{}", small.join("node").display());
    host.everdisk(&["volume", "create", "v", "--size", "64M", "--buffer", "0", "--node", &url, "--create-dir"]).ok();
    let volume = Volume::new(&host, "v");
    volume.attach(&[]);
    let file = volume.open();
    let kept = pattern(4, 1 << 20);
    file.write_all_at(&kept, 60 << 20).unwrap();
    let error = fill(&file, 0, 60 << 20).expect_err("8 MiB do not hold 60");
    assert_eq!(Errno::from_io_error(&error), Some(Errno::NOSPC), "{error}");
    let status = volume.status();
    assert_eq!(status.state(), "serving", "{status:?}");
    let read_back = |file: &File| {
        let mut found = vec![0; kept.len()];
        file.read_exact_at(&mut found, 60 << 20).unwrap();
        assert!(found == kept, "what was acknowledged before");
    };
    read_back(&file);
    file.sync_all().unwrap();
    volume.settled();
    volume.upgrade(&core_next());
    volume.kill_core();
    read_back(&file);
    let error = fill(&file, 30 << 20, 60 << 20).expect_err("still full");
    assert_eq!(Errno::from_io_error(&error), Some(Errno::NOSPC), "{error}");

    // Space comes back by a discard through the volume, and by the operator.
    use rustix::fs::FallocateFlags as F;
    rustix::fs::fallocate(&file, F::PUNCH_HOLE | F::KEEP_SIZE, 0, 60 << 20).unwrap();
    fill(&file, 0, 2 << 20).unwrap();
    everdisk_tests::run::sh("mount", &["-o", "remount,size=128M", small.to_str().unwrap()]);
    fill(&file, 0, 60 << 20).unwrap();
    read_back(&file);
    drop(file);
    volume.detach();
    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
    drop(tmpfs);
}

/// What is not empty, or is a node already, is not formatted; a failed creation leaves nothing behind.
#[test]
fn a_used_directory_is_not_formatted() {
    let host = Host::new();
    let create = |name: &str, nodes: &[&Path]| {
        let mut arguments = vec!["volume".to_owned(), "create".to_owned(), name.to_owned()];
        arguments.extend(["--size".to_owned(), "16M".to_owned(), "--create-dir".to_owned()]);
        for node in nodes {
            arguments.extend(["--node".to_owned(), format!("dir:{}", node.display())]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        host.everdisk(&arguments)
    };
    let (a, b) = (host.node("a"), host.node("b"));
    fs::create_dir(&b).unwrap();
    fs::write(b.join("letter"), "keep me").unwrap();
    create("v", &[&a, &b]).refused(1, &[b.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(b.join("letter")).unwrap(), "keep me");
    assert!(!a.exists(), "the first node of a failed creation stays behind");
    host.everdisk(&["status", "v"]).refused(1, &["there is no volume v"]);
    fs::remove_dir_all(&b).unwrap();
    create("v", &[&a, &b]).ok();
    let taken = create("w", &[&b]).refused(1, &[b.to_str().unwrap(), "storage node", "volume v"]);
    assert!(!taken.stderr.to_lowercase().contains("delete"), "{}", taken.stderr);
    let taken = create("v", &[&host.node("c")]).refused(1, &["a volume v already"]);
    assert!(!taken.stderr.to_lowercase().contains("delete"), "{}", taken.stderr);
    create("w", &[&host.node("c"), &host.node("c")]).refused(1, &["twice"]);
    create("w", &[&host.node("c"), &host.node("c/../c")]).refused(1, &["same"]);
    assert!(!host.node("c").exists(), "a failed creation leaves a directory behind");
    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
    assert!(!a.exists() && !b.exists(), "delete removes what create made");
}

/// Resize: grows, keeps the data, and refuses to shrink.
#[test]
fn a_detached_volume_grows_and_keeps_its_data() {
    let host = Host::new();
    let volume = host.volume("v", "16M");
    let data = pattern(5, 16 << 20);
    volume.open().write_all_at(&data, 0).unwrap();
    host.everdisk(&["volume", "resize", "v", "32M"]).refused(1, &["detach"]);
    volume.detach();
    host.everdisk(&["volume", "resize", "v", "8M"]).refused(1, &["can only grow"]);
    host.everdisk(&["volume", "resize", "v", "40M"]).ok();
    volume.attach(&[]);
    let file = volume.open();
    assert_eq!(file.metadata().unwrap().len(), 40 << 20);
    let mut found = vec![0; 40 << 20];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found[..16 << 20] == data && found[16 << 20..].iter().all(|b| *b == 0));
    file.write_all_at(&data, 24 << 20).unwrap();
    drop(file);
    volume.detach();
}
