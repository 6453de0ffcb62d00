//! What the end-to-end tests boot as a virtual machine: QEMU with its modules and firmware, Debian's cloud kernel, busybox
//! and nbd-client, unpacked under `target/guest` and not installed.
//!
//! The packages would not go in beside what is there: a backported qemu-utils conflicts with the release's
//! qemu-system-common, busybox-static with busybox, and a kernel wants to be booted. They come from the archive whole,
//! with every library down to the C library and its loader, so that nothing of them is this machine's ([`crate::archive`]).
//! Where they are in `target/guest`, `tests/src/guest.rs` knows too.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::TaskError;
use crate::archive::{Archive, Package};
use crate::child::{self, Stdout};
use crate::programs::{first, search_path};
use crate::workspace::Workspace;

/// The programs and what they load, and nothing that a package wants for its installation.
const PROGRAMS: &[&str] = &["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios", "nbd-client"];
const KERNEL: &str = "linux-image-cloud-amd64";
const SHELL: &str = "busybox-static";
/// Which packages that brings is named here; written last: they are there as a whole.
const STAMP: &str = "packages";
/// The rule by which it was laid out. A `target/guest` of another one is made anew.
const LAYOUT: &str = "layout 2";

/// What has to be there, under the merged `usr` of [`merge`].
const NEEDED: &[(&str, &str)] = &[
    ("usr/bin/qemu-system-x86_64", "QEMU (package qemu-system-x86)"),
    ("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "the loader of programs (package libc6)"),
    ("usr/lib/x86_64-linux-gnu/qemu", "QEMU's modules (package qemu-system-common)"),
    ("usr/share/seabios/bios-256k.bin", "the firmware (package seabios)"),
    ("usr/share/qemu", "QEMU's data (package qemu-system-data)"),
    ("usr/bin/busybox", "the shell of the machine (package busybox-static)"),
    ("usr/sbin/nbd-client", "the kernel's NBD client (package nbd-client)"),
    ("usr/lib/modules", "the kernel's modules (package linux-image-*-cloud-amd64)"),
];
/// An interpreted machine on a busy one.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// Sees to it that `target/guest` is there and boots.
///
/// # Errors
/// A package could not be downloaded or unpacked, or what is there does not boot; it says what is lacking.
pub(crate) fn run() -> Result<(), TaskError> {
    let directory = Workspace::load()?.target_directory.join("guest");
    if !fs::read_to_string(directory.join(STAMP)).is_ok_and(|found| found.starts_with(LAYOUT)) {
        for tool in ["apt-get", "dpkg-deb"] {
            if first(&search_path(), tool).is_none() {
                let (what, whither) = ([PROGRAMS, &[KERNEL, SHELL]].concat().join(", "), directory.display());
                return Err(TaskError::Failed(format!(
                    "the virtual machine's Debian packages are missing ({what}), and this system has no {tool}: run \
                     `cargo xtask setup` on a Debian system, and copy {whither} from there"
                )));
            }
        }
        make(&directory)?;
    }
    check(&directory)
}

fn make(directory: &Path) -> Result<(), TaskError> {
    println!("missing: {}", directory.display());
    if directory.exists() {
        fs::remove_dir_all(directory).map_err(TaskError::io(format!("remove {}", directory.display())))?;
    }
    let work = directory.join("archive");
    let archive = Archive::open(&work)?;
    let packages = needed(&archive.closure(PROGRAMS)?, &archive.closure(&[KERNEL, SHELL])?);
    archive.unpack(&packages, directory)?;
    for part in ["bin", "sbin", "lib", "lib64"] {
        merge(&directory.join(part), &directory.join("usr").join(part))?;
    }
    fs::remove_dir_all(&work).map_err(TaskError::io("remove packages that were unpacked"))?;
    let names = packages.iter().map(|Package { name, version }| format!("{name} {version}\n"));
    let stamp = format!("{LAYOUT}\n{}", names.collect::<String>());
    fs::write(directory.join(STAMP), stamp).map_err(TaskError::io("note what was unpacked"))
}

/// Of all that an installation would bring: the programs, the libraries that they depend on, and the kernel. What a
/// package wants for its installation only (debconf, adduser, udev, initramfs-tools) is left where it is.
fn needed(programs: &[Package], kernel: &[Package]) -> Vec<Package> {
    // Some that are named like libraries have programs, or files for them.
    let beside = ["-bin", "-common", "-data", "-modules", "-modules-bin"];
    let is_library = |name: &str| name.starts_with("lib") && !beside.iter().any(|end| name.ends_with(end));
    let programs = programs.iter().filter(|package| PROGRAMS.contains(&&*package.name) || is_library(&package.name));
    // "linux-image-cloud-amd64" is empty, and depends on the package of the day's kernel.
    let is_kernel = |name: &str| name.starts_with("linux-image-") && name != KERNEL;
    let kernel = kernel.iter().filter(|package| is_kernel(&package.name) || package.name == SHELL);
    programs.chain(kernel).cloned().collect()
}

/// Moves what lies in `from` to `to`: packages from before /bin, /sbin and /lib were merged into /usr, and later ones, are
/// found in one place.
fn merge(from: &Path, to: &Path) -> Result<(), TaskError> {
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    let failed = || TaskError::io(format!("move {} to {}", from.display(), to.display()));
    fs::create_dir_all(to).map_err(failed())?;
    for entry in entries.flatten() {
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().map_err(failed())?.is_dir() && target.is_dir() {
            merge(&source, &target)?;
        } else {
            fs::rename(&source, &target).map_err(failed())?;
        }
    }
    fs::remove_dir(from).map_err(failed())
}

/// Checks for every part, and boots the kernel until it finds that it has no root: QEMU, its modules and its firmware work.
fn check(directory: &Path) -> Result<(), TaskError> {
    let absent = lacking(directory);
    let again = format!("remove {} and run `cargo xtask setup`", directory.display());
    if !absent.is_empty() {
        return Err(TaskError::Failed(format!("the virtual machine lacks {}: {again}", absent.join(", "))));
    }
    let kernel = kernel(directory).ok_or_else(|| {
        TaskError::Failed(format!("the virtual machine lacks its kernel (package linux-image-*-cloud-amd64): {again}"))
    })?;
    let (console, complaints) = (directory.join("console"), directory.join("complaints"));
    let _ = fs::remove_file(&console);
    let mut qemu = qemu(directory);
    qemu.args(["-accel", "tcg", "-m", "256M", "-display", "none", "-no-reboot", "-nodefaults", "-no-user-config"]);
    qemu.args(["-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile="]);
    qemu.arg("-serial").arg(format!("file:{}", console.display())).arg("-kernel").arg(kernel);
    qemu.args(["-append", "console=ttyS0 panic=-1"]);
    qemu.stderr(fs::File::create(&complaints).map_err(TaskError::io("make a file for QEMU's messages"))?);
    let ended = child::run(&mut qemu, Instant::now() + BOOT_LIMIT, Stdout::Inherited)?;
    let said = |path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let (console, complaints) = (said(console), said(complaints));
    if ended.is_success() && console.contains("Unable to mount root") {
        return Ok(());
    }
    let last: Vec<&str> = console.lines().rev().take(5).collect();
    let last: Vec<&str> = last.into_iter().rev().collect();
    Err(TaskError::Failed(format!(
        "the virtual machine does not boot: QEMU {}; it said:\n{}\nthe last of its console:\n{}\n{again}",
        ended.outcome(),
        complaints.trim_end(),
        last.join("\n")
    )))
}

fn lacking(directory: &Path) -> Vec<&'static str> {
    NEEDED.iter().filter(|(path, _)| !directory.join(path).exists()).map(|(_, what)| *what).collect()
}

fn kernel(directory: &Path) -> Option<PathBuf> {
    let files = fs::read_dir(directory.join("boot")).ok()?;
    let mut files = files.flatten().map(|entry| entry.path());
    files.find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")))
}

/// QEMU with nothing of this machine's: loader, libraries, modules, firmware.
fn qemu(directory: &Path) -> Command {
    let libraries = directory.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(&libraries).arg(directory.join("usr/bin/qemu-system-x86_64"));
    command.env("QEMU_MODULE_DIR", libraries.join("qemu")).env_remove("LD_LIBRARY_PATH").env_remove("LD_PRELOAD");
    for firmware in ["usr/share/seabios", "usr/share/qemu"] {
        command.arg("-L").arg(directory.join(firmware));
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(names: &str) -> Vec<Package> {
        names.split(' ').map(|name| Package { name: name.to_owned(), version: "1".to_owned() }).collect()
    }

    #[test]
    fn what_an_installation_wants_for_itself_is_not_unpacked() {
        let programs = named(
            "libc6 debconf passwd adduser libpam-modules libcap2-bin libasound2-data libasound2 systemd \
                              qemu-system-common libglib2.0-0 qemu-system-x86 ipxe-qemu iso-codes nbd-client",
        );
        let kernel = named(
            "libc6 coreutils udev busybox-static initramfs-tools linux-base linux-image-6.1.0-56-cloud-amd64 \
                            linux-image-cloud-amd64",
        );
        let expected = named(
            "libc6 libasound2 qemu-system-common libglib2.0-0 qemu-system-x86 nbd-client busybox-static \
                              linux-image-6.1.0-56-cloud-amd64",
        );
        assert_eq!(needed(&programs, &kernel), expected);
    }

    #[test]
    fn what_lies_in_two_places_is_found_in_one() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        };
        for path in ["lib/x/a.so", "usr/lib/x/b.so", "lib/modules/6.1/kernel"] {
            write(path);
        }
        merge(&root.path().join("lib"), &root.path().join("usr/lib")).unwrap();
        for path in ["usr/lib/x/a.so", "usr/lib/x/b.so", "usr/lib/modules/6.1/kernel"] {
            assert!(root.path().join(path).is_file(), "{path}");
        }
        assert!(!root.path().join("lib").exists());
        merge(&root.path().join("sbin"), &root.path().join("usr/sbin")).unwrap();
    }

    #[test]
    fn what_is_lacking_is_named_with_its_package() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(lacking(root.path()).len(), NEEDED.len());
        for (path, _) in NEEDED {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        assert!(lacking(root.path()).is_empty());
        fs::remove_dir(root.path().join("usr/lib/x86_64-linux-gnu/qemu")).unwrap();
        let said = check(root.path()).unwrap_err().to_string();
        assert!(
            said.contains("QEMU's modules (package qemu-system-common)") && said.contains("cargo xtask setup"),
            "{said}"
        );
    }
}
