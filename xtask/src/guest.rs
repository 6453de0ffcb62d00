//! What the end-to-end tests boot as a virtual machine: QEMU with its firmware, Debian's cloud kernel, busybox and
//! nbd-client, unpacked under `target/guest` and not installed.
//!
//! The packages would not go in beside what is there: a backported qemu-utils conflicts with the release's
//! qemu-system-common, busybox-static with busybox, and a kernel wants to be booted. So apt-get only finds and downloads
//! them, with whatever they depend on and this system lacks, and dpkg-deb unpacks them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::TaskError;
use crate::child::{self, Stdout};
use crate::setup::{APT_LIMIT, apt_get, is_on, search_path};
use crate::workspace::Workspace;

const PACKAGES: &[&str] = &["qemu-system-x86", "linux-image-cloud-amd64", "busybox-static", "nbd-client"];
/// Written last: the packages it names are there as a whole.
const STAMP: &str = "packages";

/// Sees to it that `target/guest` is there.
///
/// # Errors
/// A package could not be downloaded or unpacked.
pub(crate) fn run() -> Result<(), TaskError> {
    let directory = Workspace::load()?.target_directory.join("guest");
    let wanted = PACKAGES.join("\n");
    if fs::read_to_string(directory.join(STAMP)).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    let is_root = rustix::process::geteuid().is_root();
    if !is_root || !is_on(&search_path(), "apt-get") {
        let (what, where_to) = (PACKAGES.join(", "), directory.display());
        let why = if is_root { "this system has no apt-get" } else { "you are not root" };
        return Err(TaskError::Failed(format!(
            "the virtual machine's Debian packages are missing ({what}), and {why}: run `cargo xtask setup` once as root on a \
             Debian system, which unpacks them under {where_to}"
        )));
    }
    println!("missing: {} ({})", directory.display(), PACKAGES.join(", "));
    let _ = fs::remove_dir_all(&directory);
    let archives = directory.join("archives");
    fs::create_dir_all(archives.join("partial")).map_err(TaskError::io("make a directory for packages"))?;
    download(&archives)?;
    for package in packages(&archives)? {
        unpack(&package, &directory)?;
    }
    fs::remove_dir_all(&archives).map_err(TaskError::io("remove packages that were unpacked"))?;
    fs::write(directory.join(STAMP), wanted).map_err(TaskError::io("note what was unpacked"))
}

/// `--reinstall`: what is installed here is downloaded too, its dependencies are not.
fn download(archives: &Path) -> Result<(), TaskError> {
    let deadline = Instant::now() + APT_LIMIT;
    let to = format!("Dir::Cache::archives={}", archives.display());
    let mut arguments = vec!["install", "-y", "--no-install-recommends", "--reinstall", "--download-only", "-o", &to];
    // As root apt-get would hand the download to a user of its own, who cannot write here.
    arguments.extend(["-o", "APT::Sandbox::User=root"]);
    arguments.extend(PACKAGES);
    apt_get(&["update"], deadline)?;
    apt_get(&arguments, deadline)
}

fn packages(archives: &Path) -> Result<Vec<PathBuf>, TaskError> {
    let files = fs::read_dir(archives).map_err(TaskError::io("list the packages"))?;
    let files = files.flatten().map(|entry| entry.path());
    Ok(files.filter(|path| path.extension().is_some_and(|extension| extension == "deb")).collect())
}

fn unpack(package: &Path, directory: &Path) -> Result<(), TaskError> {
    let mut command = Command::new("dpkg-deb");
    command.arg("--extract").args([package, directory]);
    let ended = child::run(&mut command, Instant::now() + APT_LIMIT, Stdout::Inherited)?;
    if ended.is_success() {
        return Ok(());
    }
    Err(TaskError::Failed(format!("dpkg-deb --extract {}: {}", package.display(), ended.outcome())))
}
