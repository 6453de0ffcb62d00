//! Where a volume's files and sockets are.

use std::{
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use everdisk_api::directories::Directories;
use everdisk_proto::{file_id::FileId, identity::Component, ids::VolumeName};
use everdisk_sys::file;

use crate::durable::make_dir;

/// Longest path of a unix socket: `sun_path` has 108 bytes with its terminator.
pub const SOCKET_PATH_MAX: usize = 107;
/// The longest name of a socket in a volume's run directory; process ids end at 4194304.
const LONGEST_SOCKET: &str = "core-4194304.sock";
/// Logs of cores that are kept.
const CORE_LOGS: u64 = 16;

/// The directories of one volume.
#[derive(Clone, Debug)]
pub struct VolumePaths {
    /// Durable: description, record, journal, programs.
    pub state: PathBuf,
    /// Sockets and logs.
    pub run: PathBuf,
}

impl VolumePaths {
    /// Those of a volume.
    pub fn new(directories: &Directories, name: &VolumeName) -> Self {
        Self {
            state: directories.state.join("volumes").join(name.as_str()),
            run: directories.run.join("volumes").join(name.as_str()),
        }
    }

    /// The volume's description, read by interface and cores.
    pub fn spec(&self) -> PathBuf {
        self.state.join("volume.json")
    }

    /// What the control module remembers.
    pub fn record(&self) -> PathBuf {
        self.state.join("state.json")
    }

    /// The journal of upgrades.
    pub fn journal(&self) -> PathBuf {
        self.state.join("journal.jsonl")
    }

    /// The staged core programs, one directory each.
    pub fn cores(&self) -> PathBuf {
        self.programs(Component::Core)
    }

    /// The staged programs of a component, one directory each.
    pub fn programs(&self, component: Component) -> PathBuf {
        self.state.join(match component {
            Component::Core => "cores",
            Component::Interface => "interfaces",
            Component::Control => "control",
        })
    }

    /// The interface listens here.
    pub fn interface_socket(&self) -> PathBuf {
        self.run.join("interface.sock")
    }

    /// A core listens here.
    pub fn core_socket(&self, pid: u32) -> PathBuf {
        self.run.join(format!("core-{pid}.sock"))
    }

    /// What the interface says.
    pub fn interface_log(&self) -> PathBuf {
        self.run.join("interface.log")
    }

    /// What the n-th core since the attach says.
    pub fn core_log(&self, n: u64) -> PathBuf {
        self.run.join(format!("core-{}.log", n % CORE_LOGS))
    }

    /// Identity of the state directory.
    ///
    /// # Errors
    /// The operating system's.
    pub fn home(&self) -> io::Result<FileId> {
        let directory = file::pin_directory(&std::fs::canonicalize(&self.state)?)?;
        Ok(file::look(directory.as_fd())?.id)
    }

    /// Makes the run directory.
    ///
    /// # Errors
    /// The operating system's.
    pub fn make_run(&self) -> io::Result<()> {
        make_dir(&self.run)
    }

    /// Removes the sockets that no process listens on any more.
    pub fn remove_sockets(&self) {
        let Ok(entries) = std::fs::read_dir(&self.run) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.extension().is_some_and(|extension| extension == "sock") {
                // One that stays is replaced by the process that listens there next.
                let _ = std::fs::remove_file(path);
            }
        }
    }

    /// Whether the sockets' paths fit a socket address.
    ///
    /// # Errors
    /// What to do about it.
    pub fn check_sockets(&self) -> Result<(), String> {
        check_socket(&self.run.join(LONGEST_SOCKET))
    }
}

/// Whether `path` fits a socket address.
///
/// # Errors
/// What to do about it.
pub fn check_socket(path: &Path) -> Result<(), String> {
    let len = path.as_os_str().len();
    if len <= SOCKET_PATH_MAX {
        return Ok(());
    }
    Err(format!(
        "{} has {len} bytes, a socket's path at most {SOCKET_PATH_MAX}: use a shorter --run-dir or volume name",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_paths_are_bounded() {
        let at = |run: &str, name: &str| {
            let directories = Directories { run: run.into(), state: "/s".into() };
            VolumePaths::new(&directories, &name.parse().unwrap()).check_sockets()
        };
        assert_eq!(at("/run/everdisk", &"x".repeat(64)), Ok(()));
        assert!(at(&format!("/{}", "r".repeat(80)), "v").unwrap_err().contains("shorter --run-dir"));
    }
}
