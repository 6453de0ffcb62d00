//! File systems on a loop device on the file, through upgrades.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::Duration,
};

use everdisk_testkit::at_end::at_end;
use everdisk_tests::{
    bytes::{Random, pattern},
    guards::{Loop, Mount},
    host::Host,
    programs::need,
    run::{run, sh},
    volume::Volume,
};

const LIMIT: Duration = Duration::from_secs(120);

/// A tree of `files` files of many sizes in a few hundred directories, with links, and its checksums.
fn make_tree(root: &Path, files: u64) {
    let mut random = Random::new(42);
    for number in 0..files {
        let directory = root.join(format!("d{}/e{}", number % 17, number % 13));
        fs::create_dir_all(&directory).unwrap();
        let largest = [100, 5_000, 40_000, 300_000][usize::try_from(number % 4).unwrap()];
        let len = usize::try_from(random.below(largest)).unwrap();
        let path = directory.join(format!("file-{number}"));
        fs::write(&path, pattern(number, len)).unwrap();
        if number % 50 == 0 {
            std::os::unix::fs::symlink(&path, directory.join(format!("link-{number}"))).unwrap();
        }
    }
}

fn checksums(root: &Path) -> String {
    let mut command = Command::new("sh");
    command.current_dir(root).args(["-c", "find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum"]);
    run(command, LIMIT).ok()
}

/// Upgrades there and back until `stop` is set; returns the number of upgrades.
fn upgrade_until(volume: &Volume<'_>, stop: &AtomicBool) -> u32 {
    let mut upgrades = 0;
    while !stop.load(SeqCst) || upgrades < 3 {
        volume.turn();
        upgrades += 1;
    }
    upgrades
}

fn through_upgrades(kind: &str, files: u64, check: &[&str], options: &[&str]) {
    need(check[0]);
    let host = Host::new();
    let volume = host.volume("v", "1G");
    let source = host.root().join("tree");
    make_tree(&source, files);
    let archive = host.root().join("tree.tar");
    sh("tar", &["-C", source.to_str().unwrap(), "-cf", archive.to_str().unwrap(), "."]);
    let expected = checksums(&source);
    let target = host.root().join("mnt");
    fs::create_dir(&target).unwrap();

    let device = Loop::on(&volume.path);
    let mut mkfs = vec![device.device()];
    mkfs.splice(0..0, options.iter().copied());
    sh(&format!("mkfs.{kind}"), &mkfs);
    let verify = || {
        let mut command = Command::new(check[0]);
        command.args(&check[1..]).arg(device.device());
        run(command, LIMIT).ok()
    };
    let stop = AtomicBool::new(false);
    let upgrades = thread::scope(|scope| {
        let upgrades = scope.spawn(|| upgrade_until(&volume, &stop));
        let let_go = at_end(|| stop.store(true, SeqCst));
        let mount = Mount::new(&["-t", kind, device.device()], &target);
        let unpack = |name: &str| {
            let to = target.join(name);
            fs::create_dir(&to).unwrap();
            let mut command = Command::new("tar");
            command.arg("-C").arg(&to).arg("-xf").arg(&archive);
            run(command, LIMIT).ok();
            sh("sync", &["-f", to.to_str().unwrap()]);
        };
        unpack("a");
        unpack("b");
        fs::remove_dir_all(target.join("a")).unwrap();
        sh("fstrim", &[&target]);
        unpack("c");
        drop(mount);
        drop(let_go);
        upgrades.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause))
    });
    println!("{kind}: {} files unpacked three times through {upgrades} upgrades", files);
    verify();
    let mount = Mount::new(&["-t", kind, device.device()], &target);
    for name in ["b", "c"] {
        assert_eq!(checksums(&target.join(name)), expected, "{kind}: tree {name}");
    }
    drop(mount);
    drop(device);
    volume.detach();
}

/// M1 M5: ext4 on a loop device on the file, a tree of 6000 files unpacked through upgrades: clean, and nothing differs.
#[test]
fn m1_m5_ext4_on_a_loop_device_stays_whole_through_upgrades() {
    through_upgrades("ext4", 6000, &["e2fsck", "-fn"], &["-q", "-F"]);
}

/// The same with xfs.
#[test]
fn m1_m5_xfs_on_a_loop_device_stays_whole_through_upgrades() {
    through_upgrades("xfs", 1500, &["xfs_repair", "-n"], &["-q", "-f"]);
}

/// While a loop device has the file, it is in use: detach says so.
#[test]
fn a_file_that_is_in_use_is_not_detached() {
    let host = Host::new();
    let volume = host.volume("v", "32M");
    let device = Loop::on(&volume.path);
    volume.ask("detach", &[]).refused(1, &["in use", "--force"]);
    assert_eq!(volume.settled().state(), "serving");
    sh("mkfs.ext4", &["-q", "-F", device.device()]);
    drop(device);
    volume.detach();
}
