//! Resize: all of it or nothing, whatever refuses or dies.

use std::{
    fs,
    os::unix::fs::{FileExt, PermissionsExt},
    path::Path,
};

use everdisk_tests::{
    bytes::pattern,
    host::{Host, Identity},
    processes,
    programs::{core, directory, need_root},
    run::Running,
    volume::Volume,
    wait::until,
};

/// Attaches it: it has this size and its data.
fn holds(volume: &Volume<'_>, size: u64, data: &[u8]) {
    volume.attach(&[]);
    let file = volume.open();
    assert_eq!(file.metadata().unwrap().len(), size);
    let mut found = vec![0; data.len()];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == data);
    drop(file);
    volume.detach();
}

/// The first node's file system holds a file of any size, the second one's does not: neither is touched.
#[test]
fn a_resize_that_the_second_node_cannot_hold_changes_nothing() {
    let host = Host::new();
    let disk = tempfile::tempdir_in(directory()).unwrap();
    let nodes = [host.node("v-0"), disk.path().join("b")];
    nodes.iter().for_each(|node| fs::create_dir(node).unwrap());
    let urls = nodes.each_ref().map(|node| format!("dir:{}", node.display()));
    host.everdisk(&["volume", "create", "v", "--size", "64M", "--node", &urls[0], "--node", &urls[1]]).ok();
    let volume = Volume::new(&host, "v");
    let data = pattern(7, 8 << 20);
    volume.attach(&[]);
    volume.open().write_all_at(&data, 0).unwrap();
    volume.detach();
    // ext4 and others have less than the exabytes that a tmpfs takes.
    host.everdisk(&["volume", "resize", "v", "8000P"]).refused(1, &[nodes[1].to_str().unwrap(), "cannot hold"]);
    holds(&volume, 64 << 20, &data);
    // A node that is not there, or cannot be changed.
    let aside = host.root().join("aside");
    fs::rename(&nodes[0], &aside).unwrap();
    host.everdisk(&["volume", "resize", "v", "128M"]).refused(1, &[nodes[0].to_str().unwrap()]);
    fs::rename(&aside, &nodes[0]).unwrap();
    holds(&volume, 64 << 20, &data);
    host.everdisk(&["volume", "resize", "v", "128M"]).ok();
    holds(&volume, 128 << 20, &data);
    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
    assert!(nodes.iter().all(|node| fs::read_dir(node).unwrap().count() == 0), "the operator's own directories stay");
}

/// A core program that, told to resize, does so before or after it has shown that it is there, and then waits.
fn slow_core(host: &Host, first: bool) {
    let real = core();
    let (mark, program) = (host.root().join("mark"), host.root().join("bin/everdisk-core"));
    let resize = format!("\"{}\" \"$@\"", real.display());
    let (before, after) = if first { (resize.as_str(), "") } else { ("", resize.as_str()) };
    let wait = format!("echo $$ > {0}.new; mv {0}.new {0}; sleep 600 & wait", mark.display());
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *--resize*[0-9]) [ -e {0}/slow ] && {{ rm {0}/slow; {before}\n{wait}\n{after}\nexit; }};; esac\nexec \"{1}\" \"$@\"\n",
        host.root().display(),
        real.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
}

fn marked(path: &Path) -> u32 {
    until("the core is told to resize", || fs::read_to_string(path).ok()?.trim().parse().ok())
}

/// The control module dies before the nodes have grown and after they have, before the description says the new size: the volume has
/// its old size, whatever is done next, and the resize can be repeated.
#[test]
fn a_resize_whose_control_module_dies_is_undone_or_repeated() {
    need_root();
    for first in [false, true] {
        for repeat in [false, true] {
            let mut host = Host::idle(Identity::default());
            host.take_programs();
            host.start_daemon();
            let volume = host.volume("v", "16M");
            let data = pattern(7, 1 << 20);
            volume.open().write_all_at(&data, 0).unwrap();
            volume.detach();
            slow_core(&host, first);
            let mark = host.root().join("mark");
            fs::write(host.root().join("slow"), "").unwrap();
            let resizing = Running::start(host.cli(&["volume", "resize", "v", "40M"]));
            let slow = marked(&mark);
            host.kill_daemon();
            drop(resizing);
            let group = i32::try_from(slow).ok().and_then(rustix::process::Pid::from_raw).unwrap();
            rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
            until("the core's end", || (!processes::is_alive(slow)).then_some(()));
            host.start_daemon();
            let volume = Volume::new(&host, "v");
            assert_eq!(volume.status().0["size"].as_u64(), Some(16 << 20));
            if repeat {
                host.everdisk(&["volume", "resize", "v", "24M"]).ok();
                holds(&volume, 24 << 20, &data);
            } else {
                holds(&volume, 16 << 20, &data);
            }
            host.everdisk(&["volume", "resize", "v", "40M"]).ok();
            holds(&volume, 40 << 20, &data);
        }
    }
}
