//! Debian packages taken from the archive and unpacked, not installed, whatever is installed here.
//!
//! apt-get works on a state of its own, in which nothing is installed: so it names every package that the wanted ones
//! depend on, in versions that fit each other, and needs no root. The system's own state is not touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::TaskError;
use crate::child::{self, Stdout};
use crate::workspace;

const LIMIT: Duration = Duration::from_secs(10 * 60);

/// apt-get with a state of its own, under one directory.
pub(crate) struct Archive {
    directory: PathBuf,
    deadline: Instant,
}

/// A package in the version that apt-get would install.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
}

impl Archive {
    /// Fetches the lists of what there is.
    ///
    /// # Errors
    /// The directories cannot be made, or apt-get cannot be started. An archive that does not answer is told by what is
    /// missing later: the machine may name others that the wanted packages are not in.
    pub(crate) fn open(directory: &Path) -> Result<Self, TaskError> {
        for part in ["lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(directory.join(part)).map_err(TaskError::io("make a directory for packages"))?;
        }
        fs::write(directory.join("status"), "").map_err(TaskError::io("write that nothing is installed"))?;
        let archive = Self { directory: directory.to_path_buf(), deadline: Instant::now() + LIMIT };
        let updated = child::run(archive.apt_get().arg("update"), archive.deadline, Stdout::Inherited)?;
        if !updated.is_success() {
            eprintln!("apt-get update: {}; going on with what it has", updated.outcome());
        }
        Ok(archive)
    }

    fn apt_get(&self) -> Command {
        let mut command = Command::new("apt-get");
        let at = |path: &str| self.directory.join(path).display().to_string();
        for (option, value) in [
            ("Dir::State", at("")),
            ("Dir::State::lists", at("lists")),
            ("Dir::State::status", at("status")),
            ("Dir::State::extended_states", at("extended_states")),
            ("Dir::Cache", at("cache")),
            ("Dir::Cache::archives", at("cache/archives")),
            // As root, apt-get would do the download as a user of its own that cannot write here.
            ("APT::Sandbox::User", "root".to_owned()),
        ] {
            command.arg("-o").arg(format!("{option}={value}"));
        }
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
        command
    }

    /// Every package that these and what they depend on are, whole.
    ///
    /// # Errors
    /// The archive does not have them.
    pub(crate) fn closure(&self, wanted: &[&str]) -> Result<Vec<Package>, TaskError> {
        let mut command = self.apt_get();
        command.args(["--simulate", "--no-install-recommends", "install"]).args(wanted);
        Ok(to_install(&workspace::output(&mut command)?))
    }

    /// Downloads the packages and unpacks them into `root`, one after another.
    ///
    /// # Errors
    /// One cannot be downloaded or unpacked.
    pub(crate) fn unpack(&self, packages: &[Package], root: &Path) -> Result<(), TaskError> {
        let directory = self.directory.join("packages");
        let names = packages.iter().map(|package| format!("{}={}", package.name, package.version));
        let mut download = self.apt_get();
        download.arg("download").args(names).current_dir(&directory);
        let ended = child::run(&mut download, self.deadline, Stdout::Inherited)?;
        if !ended.is_success() {
            return Err(TaskError::Failed(format!(
                "the packages could not be downloaded: apt-get {}",
                ended.outcome()
            )));
        }
        let files = fs::read_dir(&directory).map_err(TaskError::io("list the packages"))?;
        for file in files.flatten().map(|entry| entry.path()) {
            let mut command = Command::new("dpkg-deb");
            command.arg("--extract").args([&file, root]);
            workspace::output(&mut command)?;
        }
        Ok(())
    }
}

/// `Inst NAME (VERSION ORIGIN …) …`, a line for each package.
fn to_install(simulated: &str) -> Vec<Package> {
    let lines = simulated.lines().filter_map(|line| line.strip_prefix("Inst "));
    let package = |line: &str| {
        let (name, rest) = line.split_once(' ')?;
        let (_, version) = rest.split_once('(')?;
        let version = version.split([' ', ')']).next()?;
        Some(Package { name: name.to_owned(), version: version.to_owned() })
    };
    lines.filter_map(package).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_installed_is_read() {
        let simulated = "Reading package lists...\nThe following NEW packages will be installed:\n  seabios\n\
                         Inst libc6 (2.36-9 Debian:12/stable [amd64]) []\nInst libgcc-s1 [1] (12.2.0-14 Debian [amd64])\n\
                         Conf libc6 (2.36-9 Debian:12/stable [amd64])\n";
        let package = |name: &str, version: &str| Package { name: name.into(), version: version.into() };
        assert_eq!(to_install(simulated), [package("libc6", "2.36-9"), package("libgcc-s1", "12.2.0-14")]);
    }
}
