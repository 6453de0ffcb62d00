//! QEMU's programs on the file, as a virtual machine's disk is used.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use everdisk_tests::{
    bytes::pattern,
    host::Host,
    programs::need,
    run::{Running, run, sh},
    wait::{SOON, until},
};

const LIMIT: Duration = Duration::from_secs(60);

fn qemu_io(image: &[&str], commands: &[String]) -> String {
    need("qemu-io");
    let mut command = Command::new("qemu-io");
    for line in commands {
        command.args(["-c", line]);
    }
    command.args(image);
    let text = run(command, LIMIT).ok();
    let bad = ["failed", "error", "verification"].iter().any(|word| text.to_lowercase().contains(word));
    assert!(!bad, "{text}");
    text
}

/// M5: `cache=none` as in `-drive file=PATH,format=raw,cache=none`.
#[test]
fn m5_qemu_io_and_qemu_img_work_on_the_file_through_upgrades() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let path = volume.path.to_str().unwrap();
    let image = ["-f", "raw", "-t", "none", path];
    for number in 0..4 {
        let byte = 17 + number;
        let at = number * 9;
        let write = format!("write -P {byte} {at}M 3M");
        let odd = format!("write -P {} {}k 7k", byte + 100, at * 1024 + 4096 - 512);
        let write_then_flush = [write, odd, "flush".to_owned()];
        qemu_io(&image, &write_then_flush);
        volume.turn();
        let read = format!("read -P {byte} {at}M 3M");
        let odd = format!("read -P {} {}k 7k", byte + 100, at * 1024 + 4096 - 512);
        qemu_io(&image, &[read, odd]);
    }
    qemu_io(&image, &["discard 0 1M".to_owned(), "read -P 0 0 1M".to_owned()]);
    qemu_io(&image, &["write -z 9M 1M".to_owned(), "read -P 0 9M 1M".to_owned(), "read -P 18 10M 2M".to_owned()]);

    // A benchmark of QEMU's own while the core is replaced. Not with native AIO (-n): qemu-img 10.0 then submits anew from
    // within a completion, and on a file that answers this fast it recurses until its stack is full, upgrade or not.
    let mut bench = Command::new("qemu-img");
    bench.args(["bench", "-f", "raw", "-t", "none", "-w", "-d", "32", "-s", "4k", "-c", "200000", path]);
    let mut bench = Running::start(bench);
    let mut upgrades = 0;
    while !bench.has_ended() {
        volume.turn();
        upgrades += 1;
    }
    println!("{upgrades} upgrades during qemu-img bench");
    let took = Instant::now();
    bench.end(LIMIT).ok();
    assert!(took.elapsed() < LIMIT);

    // Converted in and compared.
    let source = host.root().join("source.raw");
    std::fs::write(&source, pattern(3, 64 << 20)).unwrap();
    let source = source.to_str().unwrap();
    sh("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-t", "none", source, path]);
    volume.turn();
    sh("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, path]);
    volume.detach();
}

fn storage_daemon(image: &Path, socket: &Path) -> Running {
    need("qemu-storage-daemon");
    let mut command = Command::new("qemu-storage-daemon");
    let file = format!(
        "driver=file,node-name=disk,filename={},cache.direct=on,cache.no-flush=off,discard=unmap,aio=threads",
        image.display()
    );
    command.args(["--blockdev", &file]);
    command.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())]);
    command.args(["--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"]);
    let mut daemon = Running::start(command);
    until("qemu-storage-daemon listens", || {
        assert!(!daemon.has_ended(), "qemu-storage-daemon has ended");
        std::os::unix::net::UnixStream::connect(socket).ok()
    });
    daemon
}

/// M1 M5: a long-lived QEMU process has the file open through upgrades and a death of the core, and serves it by NBD.
#[test]
fn m1_m5_qemu_storage_daemon_serves_the_file_through_upgrades() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let socket = host.root().join("nbd.sock");
    let mut daemon = storage_daemon(&volume.path, &socket);
    let url = format!("nbd+unix:///disk?socket={}", socket.display());
    let image = ["-f", "raw", url.as_str()];
    for number in 0..6 {
        let mut commands = Vec::new();
        for block in 0..64 {
            commands.push(format!("aio_write -P {} {}k 64k", 1 + (number * 7 + block) % 200, block * 256 + number * 8));
        }
        commands.push("aio_flush".to_owned());
        commands.push("flush".to_owned());
        for block in 0..64 {
            commands.push(format!("read -P {} {}k 64k", 1 + (number * 7 + block) % 200, block * 256 + number * 8));
        }
        std::thread::scope(|scope| {
            let upgrading = scope.spawn(|| volume.turn());
            qemu_io(&image, &commands);
            upgrading.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause));
        });
        if number == 3 {
            volume.settled();
            volume.kill_core();
        }
        assert!(!daemon.has_ended());
    }
    everdisk_tests::processes::terminate(daemon.pid(), SOON);
    daemon.end(LIMIT).ok();
    volume.detach();
}
