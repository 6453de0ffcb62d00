//! Where the control module keeps things, unless told otherwise.

use std::{env, io, path::PathBuf};

/// The run and the state directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directories {
    /// Sockets and logs; gone after a restart of the machine.
    pub run: PathBuf,
    /// Volumes, journals and core programs.
    pub state: PathBuf,
}

/// No directory can be derived from the environment.
#[derive(Debug, thiserror::Error)]
pub enum NoDirectory {
    /// No run directory.
    #[error("no run directory: XDG_RUNTIME_DIR is not set; give --run-dir or set EVERDISK_RUN_DIR")]
    Run,
    /// No state directory.
    #[error("no state directory: neither XDG_STATE_HOME nor HOME is set; give --state-dir or set EVERDISK_STATE_DIR")]
    State,
    /// It is named relative to the working directory, which is unknown, or by nothing.
    #[error("the directory {0:?} cannot be used: {1}")]
    Relative(PathBuf, io::Error),
}

impl Directories {
    /// The given directories, else the defaults: `/run/everdisk` and `/var/lib/everdisk` as root,
    /// `$XDG_RUNTIME_DIR/everdisk` and `$XDG_STATE_HOME/everdisk` (`~/.local/state/everdisk`) otherwise.
    ///
    /// # Errors
    /// [`NoDirectory`] when the environment lacks what the default needs.
    pub fn resolve(run: Option<PathBuf>, state: Option<PathBuf>, root: bool) -> Result<Self, NoDirectory> {
        let variable = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let run = match run {
            Some(path) => path,
            None if root => PathBuf::from("/run/everdisk"),
            None => variable("XDG_RUNTIME_DIR").ok_or(NoDirectory::Run)?.join("everdisk"),
        };
        let state = match state {
            Some(path) => path,
            None if root => PathBuf::from("/var/lib/everdisk"),
            None => variable("XDG_STATE_HOME")
                .or_else(|| variable("HOME").map(|home| home.join(".local/state")))
                .ok_or(NoDirectory::State)?
                .join("everdisk"),
        };
        let absolute = |path: PathBuf| std::path::absolute(&path).map_err(|e| NoDirectory::Relative(path, e));
        Ok(Self { run: absolute(run)?, state: absolute(state)? })
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.run.join("control.sock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_directories_win_and_root_has_fixed_ones() {
        let root = Directories::resolve(None, None, true).unwrap();
        assert_eq!(root.control_socket(), PathBuf::from("/run/everdisk/control.sock"));
        let given = Directories::resolve(Some("/a".into()), Some("/b".into()), false).unwrap();
        assert_eq!(given, Directories { run: "/a".into(), state: "/b".into() });
        let nothing = Directories::resolve(Some("".into()), None, true).unwrap_err();
        assert!(nothing.to_string().starts_with("the directory \"\" cannot be used"), "{nothing}");
    }
}
