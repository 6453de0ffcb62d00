//! The control module: keeps the volumes of a host, starts and watches their processes, upgrades their cores.
//!
//! It is on no data path and may be killed and started again at any time. What it must remember is in the state
//! directory ([`record`], the journal); everything else it asks the processes.
//!
//! ```text
//!  server ─► commands ─► catalogue ─► nodes   create, resize, delete
//!                      ─► attach, detach, flush   an operation has the volume; one at a time
//!                      ─► upgrade ─► actor    the acts of the pure machine in everdisk-upgrade
//!                      ─► status              asks the processes, never waits for an operation
//!  supervise                                  one thread a volume: interface and standby are there
//!  health                                     one thread a volume: what is wrong, in `status` and in the log (look, audit, limits)
//!  volume                                     what they share of a volume: files, operations, supervision, findings, children
//!  owner · territory · exports · peers · places · start · stage · child · process · programs · origin · durable · paths      what all of them stand on
//! ```
#![forbid(unsafe_code)]

pub mod actor;
pub mod attach;
pub mod audit;
pub mod catalogue;
pub mod child;
pub mod commands;
pub mod detach;
pub mod durable;
pub mod error;
pub mod exports;
pub mod flush;
pub mod give_up;
pub mod health;
pub mod limits;
pub mod nodes;
pub mod origin;
pub mod owner;
pub mod paths;
pub mod peers;
pub mod places;
pub mod poll;
pub mod process;
pub mod programs;
pub mod progress;
pub mod record;
pub mod recover;
pub mod server;
pub mod stage;
pub mod start;
pub mod status;
pub mod stuck;
pub mod supervise;
pub mod territory;
pub mod upgrade;
pub mod users;
pub mod volume;

#[cfg(test)]
mod fake;

use std::{fs, os::unix::fs::MetadataExt, path::Path, sync::Arc, thread, time::Duration};

use everdisk_api::directories::Directories;
use everdisk_proto::version::PRODUCT;
use everdisk_telemetry::event;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};
use tracing::info;

use crate::{
    catalogue::Catalogue,
    error::{Doing, Error, Result},
    programs::Programs,
};

/// Runs the control module until SIGTERM or SIGINT, which end it at once and leave the volumes running.
///
/// # Errors
/// It cannot start: a directory cannot be made, a socket's path is too long, or another one runs.
pub fn run(directories: Directories, hang_limit: Duration) -> Result<()> {
    everdisk_sys::process::raise_limits();
    for path in [&directories.run, &directories.state] {
        durable::make_dir(path).doing(|| format!("make {}", path.display()))?;
        refuse_shared(path)?;
    }
    let socket = directories.control_socket();
    paths::check_socket(&socket).map_err(Error::Failed)?;
    let shortest = "v".parse().expect("it is a volume name");
    paths::VolumePaths::new(&directories, &shortest).check_sockets().map_err(Error::Failed)?;
    let _owned = owner::own(&directories)?;
    let mut signals = Signals::new([SIGINT, SIGTERM]).doing(|| "handle signals".to_owned())?;
    process::read_boot_id().doing(|| "read the identity of this boot".to_owned())?;
    let mut programs = Programs::find().doing(|| "find the programs".to_owned())?;
    programs.hang_limit = hang_limit;
    programs.digest_own().doing(|| "read the program of this process".to_owned())?;
    let catalogue = Arc::new(Catalogue::load(directories, programs)?);
    recover::recover(&catalogue)?;
    let listener = server::listen(&socket).doing(|| format!("listen at {}", socket.display()))?;
    let named = socket.clone();
    let waiting = thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            info!(signal, "ends; the volumes go on");
            // The next one replaces it.
            let _ = fs::remove_file(&named);
            std::process::exit(0);
        }
    });
    waiting.doing(|| "start a thread".to_owned())?;
    info!(event = event::DAEMON_READY, version = PRODUCT, socket = %socket.display(), volumes = catalogue.all().len(), "ready");
    server::serve(&listener, &catalogue);
    Ok(())
}

/// Any other user that can write to an existing directory could command the volumes. The directory may be anything, such
/// as /tmp, so its permissions are left alone.
fn refuse_shared(path: &Path) -> Result<()> {
    let found = fs::metadata(path).doing(|| format!("examine {}", path.display()))?;
    let refused = |why: &str, mend: &str| {
        Err(Error::State(format!("{} {why}: {mend}, or give a directory of its own", path.display())))
    };
    if found.uid() != rustix::process::geteuid().as_raw() {
        return refused(&format!("belongs to user {}", found.uid()), "run the control module as that user");
    }
    if found.mode() & 0o022 != 0 {
        return refused("can be written by others than its owner", "chmod go-w it if it is used for nothing else");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_that_others_can_write_to_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let mode = || fs::metadata(dir.path()).unwrap().mode() & 0o7777;
        for (given, good) in [(0o700, true), (0o755, true), (0o775, false), (0o1777, false)] {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(given)).unwrap();
            assert_eq!(refuse_shared(dir.path()).is_ok(), good, "{given:o}");
            assert_eq!(mode(), given);
        }
        let made = dir.path().join("a/b");
        durable::make_dir(&made).unwrap();
        assert_eq!(fs::metadata(&made).unwrap().mode() & 0o7777, 0o700);
        assert!(refuse_shared(&made).is_ok());
    }

    #[test]
    fn a_directory_of_another_user_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let own = rustix::process::geteuid();
        if own.is_root() {
            std::os::unix::fs::chown(dir.path(), Some(12_345), None).unwrap();
        }
        let foreign = if own.is_root() { dir.path() } else { Path::new("/") };
        assert!(refuse_shared(foreign).unwrap_err().to_string().contains("belongs to user"));
    }
}
