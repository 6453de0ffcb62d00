//! Installs foreign programs on Debian and its kin: those of `programs.rs` that are missing.
//!
//! What is missing is told by its program, not by its package: which package holds a program differs between releases
//! (a backported qemu-utils holds qemu-storage-daemon and conflicts with the older package that did).
//!
//! What a virtual machine needs is in `guest.rs`: it is not installed at all.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::TaskError;
use crate::child::{self, Stdout};
use crate::programs::{Program, first, missing, search_path};

const APT_LIMIT: Duration = Duration::from_secs(10 * 60);

/// Sees to it that every program is there: installs what is missing as root, else says how.
///
/// # Errors
/// A program is missing and could not be installed.
pub(crate) fn run(programs: &[Program]) -> Result<(), TaskError> {
    let path = search_path();
    if missing(programs, &path).is_empty() {
        return Ok(());
    }
    // One that is there, but not from its package, is no reason to stop: a test of the set-up says it.
    let left = |why| {
        let mut absent = missing(programs, &path);
        absent.retain(|program| first(&path, program.name).is_none());
        if absent.is_empty() { Ok(()) } else { Err(TaskError::Failed(advice(&absent, why))) }
    };
    if !rustix::process::geteuid().is_root() {
        return left("and you are not root");
    }
    if first(&path, "apt-get").is_none() {
        return left("and this system has no apt-get");
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
    left("even after the installation")
}

fn apt_get(arguments: &[&str], deadline: Instant) -> Result<(), TaskError> {
    let mut command = Command::new("apt-get");
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    let ended = child::run(&mut command, deadline, Stdout::Inherited)?;
    if ended.is_success() {
        return Ok(());
    }
    Err(TaskError::Failed(format!("apt-get {}: {}", arguments.join(" "), ended.outcome())))
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
    use super::*;
    use crate::programs::{FIO, FUSERMOUNT, QEMU_STORAGE_DAEMON, TESTS};

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
