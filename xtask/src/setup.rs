//! Foreign programs that the tests, the demo and the bench call, and their installation on Debian and its kin.
//!
//! What is missing is told by its program on PATH, not by its package: which package holds a program differs between
//! releases (a backported qemu-utils holds qemu-storage-daemon and conflicts with the older package that did).
//!
//! What a virtual machine needs is in `guest.rs`: it is not installed at all.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::TaskError;
use crate::child::{self, Stdout};

pub(crate) const APT_LIMIT: Duration = Duration::from_secs(10 * 60);

/// A program that something here calls.
pub(crate) struct Program {
    name: &'static str,
    /// The Debian packages to try, one after another, until the program is there.
    packages: &'static [&'static str],
    purpose: &'static str,
}

const FIO: Program = Program { name: "fio", packages: &["fio"], purpose: "loads volumes with I/O and verifies it" };
const FUSERMOUNT: Program =
    Program { name: "fusermount3", packages: &["fuse3"], purpose: "mounts and unmounts without privilege" };
const QEMU_STORAGE_DAEMON: Program = Program {
    name: "qemu-storage-daemon",
    packages: &["qemu-utils", "qemu-system-common"],
    purpose: "is the peer that the bench measures against",
};

const NBDKIT: Program =
    Program { name: "nbdkit", packages: &["nbdkit"], purpose: "is a peer that the bench measures NBD against" };
const QEMU_NBD: Program =
    Program { name: "qemu-nbd", packages: &["qemu-utils"], purpose: "is a peer that the bench measures NBD against" };
const NBD_SERVER: Program =
    Program { name: "nbd-server", packages: &["nbd-server"], purpose: "is a peer that the bench measures NBD against" };

/// What the demo calls.
pub(crate) const DEMO: &[Program] = &[FIO, FUSERMOUNT];
/// What the bench calls.
pub(crate) const BENCH: &[Program] = &[FIO, FUSERMOUNT, QEMU_STORAGE_DAEMON, NBDKIT, QEMU_NBD, NBD_SERVER];
/// What the tests call.
pub(crate) const TESTS: &[Program] = &[
    FIO,
    FUSERMOUNT,
    QEMU_STORAGE_DAEMON,
    Program { name: "mkfs.ext4", packages: &["e2fsprogs"], purpose: "makes file systems on volumes" },
    Program { name: "e2fsck", packages: &["e2fsprogs"], purpose: "proves that they are whole" },
    Program { name: "mkfs.xfs", packages: &["xfsprogs"], purpose: "makes file systems on volumes" },
    Program { name: "losetup", packages: &["mount"], purpose: "makes block devices of volumes" },
    Program { name: "findmnt", packages: &["util-linux"], purpose: "shows what is mounted" },
    Program { name: "blkdiscard", packages: &["util-linux"], purpose: "discards on volumes" },
    Program { name: "qemu-img", packages: &["qemu-utils"], purpose: "reads volumes as QEMU does" },
    Program { name: "python3", packages: &["python3"], purpose: "speaks to sockets as another user" },
    Program { name: "qemu-io", packages: &["qemu-utils"], purpose: "does I/O as QEMU does" },
    Program { name: "nbdinfo", packages: &["libnbd-bin"], purpose: "asks NBD servers what they can do" },
    Program { name: "nbdcopy", packages: &["libnbd-bin"], purpose: "copies to and from NBD servers" },
    Program { name: "nbdsh", packages: &["python3-libnbd"], purpose: "sends NBD servers what no other client sends" },
];

/// Sees to it that every program is there: installs what is missing as root, else says how.
///
/// # Errors
/// A program is missing and could not be installed.
pub(crate) fn run(programs: &[Program]) -> Result<(), TaskError> {
    let path = search_path();
    if missing(programs, &path).is_empty() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        return Err(TaskError::Failed(advice(&missing(programs, &path), "and you are not root")));
    }
    if !is_on(&path, "apt-get") {
        return Err(TaskError::Failed(advice(&missing(programs, &path), "and this system has no apt-get")));
    }
    let deadline = Instant::now() + APT_LIMIT;
    apt_get(&["update"], deadline)?;
    for turn in 0.. {
        let missing = missing(programs, &path);
        let packages = packages(&missing, turn);
        if packages.is_empty() {
            break;
        }
        for program in &missing {
            println!("missing: {} ({})", program.name, program.purpose);
        }
        let mut arguments = vec!["install", "-y", "--no-install-recommends"];
        arguments.extend(&packages);
        apt_get(&arguments, deadline)?;
    }
    let missing = missing(programs, &path);
    if missing.is_empty() { Ok(()) } else { Err(TaskError::Failed(advice(&missing, "even after the installation"))) }
}

pub(crate) fn apt_get(arguments: &[&str], deadline: Instant) -> Result<(), TaskError> {
    let mut command = Command::new("apt-get");
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    let ended = child::run(&mut command, deadline, Stdout::Inherited)?;
    if ended.is_success() {
        return Ok(());
    }
    Err(TaskError::Failed(format!("apt-get {}: {}", arguments.join(" "), ended.outcome())))
}

/// The directories of PATH, and those of the administrator's programs, which PATH often lacks.
pub(crate) fn search_path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(administrators).collect()
}

fn missing<'a>(programs: &'a [Program], path: &[PathBuf]) -> Vec<&'a Program> {
    programs.iter().filter(|program| !is_on(path, program.name)).collect()
}

pub(crate) fn is_on(path: &[PathBuf], name: &str) -> bool {
    path.iter().any(|directory| is_program(&directory.join(name)))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// The packages to try for these programs at this turn, each once.
fn packages(missing: &[&Program], turn: usize) -> BTreeSet<&'static str> {
    missing.iter().filter_map(|program| program.packages.get(turn).copied()).collect()
}

fn advice(missing: &[&Program], why: &str) -> String {
    let mut lines = vec![format!("programs are missing, {why}:")];
    for program in missing {
        lines.push(format!("  {:<20} {} (package {})", program.name, program.purpose, program.packages.join(" or ")));
    }
    let packages = packages(missing, 0).into_iter().collect::<Vec<_>>().join(" ");
    lines
        .push(format!("on Debian and Ubuntu: apt-get update && apt-get install -y --no-install-recommends {packages}"));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_program_is_looked_for_on_the_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = [directory.path().to_path_buf()];
        assert!(!is_on(&path, "fio"));
        let program = directory.path().join("fio");
        std::fs::write(&program, "").unwrap();
        assert!(!is_on(&path, "fio"), "not executable");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(is_on(&path, "fio"));
        let left: Vec<&str> = missing(DEMO, &path).iter().map(|program| program.name).collect();
        assert_eq!(left, ["fusermount3"]);
    }

    #[test]
    fn the_second_package_is_asked_for_only_when_the_first_did_not_bring_the_program() {
        let all: Vec<&Program> = TESTS.iter().collect();
        assert!(packages(&all, 0).contains("qemu-utils"));
        assert!(!packages(&all, 0).contains("qemu-system-common"));
        assert_eq!(packages(&[&QEMU_STORAGE_DAEMON], 1).into_iter().collect::<Vec<_>>(), ["qemu-system-common"]);
        assert!(packages(&[&FIO], 1).is_empty(), "nothing more to try");
    }

    #[test]
    fn advice_names_programs_and_the_line_to_type() {
        let advice = advice(&[&FIO, &FUSERMOUNT], "and you are not root");
        assert!(advice.contains("fusermount3"));
        assert!(advice.contains("apt-get install -y --no-install-recommends fio fuse3"), "{advice}");
    }
}
