//! A virtual machine: Debian's kernel under QEMU's own interpreter (no KVM), on an initramfs that is made here. It has no
//! network but to this machine's loopback, as 10.0.2.2, and does what one shell script says.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{
    programs,
    run::{Running, run},
    wait::{SOON, until_within},
};

/// Modules, in the order of their dependencies. Those for virtio, and the kernel's NBD client.
const MODULES: &[&str] = &[
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "drivers/block/nbd",
];

/// What the machine begins with. It ends with its script, and says how.
const INIT: &str = "\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module || echo \"guest: no $module\"; done
ip link set lo up; ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up
sh -e /script; echo \"guest: ended with $?\"
poweroff -f
";

/// Where `cargo xtask setup` unpacks what is needed: whole, with the C library and its loader, and /usr merged
/// (`xtask/src/guest.rs`). Nothing of this machine's is used beside it.
fn unpacked() -> PathBuf {
    let directory = programs::directory().parent().expect("target/").join("guest");
    assert!(directory.join("packages").is_file(), "{} is missing: `cargo xtask setup`", directory.display());
    directory
}

/// The only file in `directory` whose name starts like this.
fn starting(directory: &Path, start: &str) -> PathBuf {
    let entries = fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display())).flatten();
    let mut paths = entries.map(|entry| entry.path());
    let found = paths.find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start)));
    found.unwrap_or_else(|| panic!("no {start}* in {}", directory.display()))
}

/// An archive as the kernel unpacks it (cpio, "newc").
#[derive(Debug, Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        let links = 1;
        let numbers: [usize; 13] = [0, mode as usize, 0, 0, links, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        self.0.extend_from_slice(b"070701");
        for number in numbers {
            self.0.extend_from_slice(format!("{number:08x}").as_bytes());
        }
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self.pad();
        self.0.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// A file, and every directory above it.
    fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        for (at, _) in path.match_indices('/') {
            self.entry(&path[..at], 0o040_755, &[]);
        }
        self.entry(path, 0o100_000 | mode, content);
    }

    fn copy(&mut self, path: &str, source: &Path) {
        let content = fs::read(source).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
        self.file(path, 0o755, &content);
    }

    fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.0
    }
}

/// Where the libraries are, and the loader of programs.
fn libraries(unpacked: &Path) -> PathBuf {
    unpacked.join("usr/lib/x86_64-linux-gnu")
}

/// Has the unpacked loader do something with an unpacked program.
fn loader(unpacked: &Path) -> Command {
    let libraries = libraries(unpacked);
    let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(&libraries).env_remove("LD_LIBRARY_PATH").env_remove("LD_PRELOAD");
    command
}

/// A program with every library that it loads.
fn with_libraries(archive: &mut Archive, path: &str, program: &Path) {
    archive.copy(path, program);
    let mut list = loader(&unpacked());
    list.arg("--list").arg(program);
    for line in run(list, SOON).ok().lines() {
        // `NAME => PATH (ADDRESS)`, the loader's name being a path as well.
        let mut words = line.split_whitespace();
        if let Some(library) = words.rfind(|word| word.starts_with('/')) {
            let at = if library.contains("ld-linux") { "lib64" } else { "lib" };
            let name = Path::new(library).file_name().expect("a name").to_string_lossy().into_owned();
            archive.copy(&format!("{at}/{name}"), Path::new(library));
        }
    }
}

fn initramfs(unpacked: &Path, script: &str) -> Vec<u8> {
    let mut archive = Archive::default();
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("script", 0o755, script.as_bytes());
    archive.copy("bin/busybox", &unpacked.join("usr/bin/busybox"));
    with_libraries(&mut archive, "bin/nbd-client", &unpacked.join("usr/sbin/nbd-client"));
    let kernel = starting(&unpacked.join("usr/lib/modules"), "").join("kernel");
    let mut order = String::new();
    for module in MODULES {
        let (directory, name) = module.rsplit_once('/').expect("a directory");
        let file = starting(&kernel.join(directory), &format!("{name}.ko"));
        let name = file.file_name().expect("a name").to_string_lossy().into_owned();
        archive.copy(&format!("modules/{name}"), &file);
        order += &format!("{name}\n");
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    archive.end()
}

/// The machine. Dropping it ends it.
#[derive(Debug)]
pub struct Guest {
    qemu: Running,
    console: PathBuf,
}

impl Guest {
    /// Boots it. `directory` takes its files; `drives` are values of QEMU's `-drive`, `/dev/vda` the first one.
    pub fn boot(directory: &Path, drives: &[String], script: &str) -> Self {
        let unpacked = unpacked();
        let (archive, console) = (directory.join("initramfs"), directory.join("console"));
        fs::write(&archive, initramfs(&unpacked, script)).expect("write the initramfs");
        let mut command = loader(&unpacked);
        command.arg(unpacked.join("usr/bin/qemu-system-x86_64"));
        command.env("QEMU_MODULE_DIR", libraries(&unpacked).join("qemu"));
        for firmware in ["usr/share/seabios", "usr/share/qemu"] {
            command.arg("-L").arg(unpacked.join(firmware));
        }
        command.args(["-accel", "tcg,thread=multi", "-smp", "1", "-m", "256M", "-display", "none", "-no-reboot"]);
        command.args(["-nodefaults", "-no-user-config", "-netdev", "user,id=n", "-device"]);
        command.arg("virtio-net-pci,netdev=n,romfile=");
        for drive in drives {
            command.args(["-drive", drive]);
        }
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-kernel").arg(starting(&unpacked.join("boot"), "vmlinuz")).arg("-initrd").arg(&archive);
        command.args(["-append", "console=ttyS0 quiet panic=-1 rdinit=/init"]);
        Self { qemu: Running::start(command), console }
    }

    /// What it has printed so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.qemu.has_ended()
    }

    /// Waits until it has printed `words`.
    pub fn says(&mut self, words: &str, limit: Duration) {
        until_within(limit, words, || {
            let (ended, console) = (self.has_ended(), self.console());
            assert!(!ended || console.contains(words), "the machine ended without {words:?}:\n{console}");
            console.contains(words).then_some(())
        });
    }

    /// Waits for its end; its script has to have succeeded.
    pub fn end(self, limit: Duration) -> String {
        let console = self.console.clone();
        self.qemu.end(limit).ok();
        let text = String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
        assert!(text.contains("guest: ended with 0"), "the machine's script failed:\n{text}");
        assert!(!text.contains("I/O error"), "the machine's kernel saw an error:\n{text}");
        text
    }
}
