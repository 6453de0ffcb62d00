//! The control module: keeps the volumes of a host, starts and watches their processes, upgrades their cores.
//!
//! It is on no data path and may be killed and started again at any time. What it must remember is in the state
//! directory ([`record`], the journal); everything else it asks the processes.
//!
//! ```text
//!  server ─► commands ─► catalogue            create, resize, delete
//!                      ─► attach, detach      an operation has the volume; one at a time
//!                      ─► upgrade ─► actor    the acts of the pure machine in everdisk-upgrade
//!                      ─► status              asks the processes, never waits for an operation
//!  supervise                                  one thread a volume: interface and standby are there
//!  peers · start · child · process · programs · durable · paths      what all of them stand on
//! ```
#![forbid(unsafe_code)]

pub mod actor;
pub mod attach;
pub mod catalogue;
pub mod child;
pub mod commands;
pub mod detach;
pub mod durable;
pub mod error;
pub mod paths;
pub mod peers;
pub mod process;
pub mod programs;
pub mod progress;
pub mod record;
pub mod server;
pub mod start;
pub mod status;
pub mod supervise;
pub mod take_over;
pub mod upgrade;
pub mod volume;

#[cfg(test)]
mod fake;

use std::{
    fs::{self, File, TryLockError},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
    thread,
};

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
pub fn run(directories: Directories) -> Result<()> {
    for path in [&directories.run, &directories.state] {
        durable::make_dir(path).doing(|| format!("make {}", path.display()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).doing(|| format!("close {}", path.display()))?;
    }
    let socket = directories.control_socket();
    paths::check_socket(&socket).map_err(Error::Failed)?;
    let shortest = "v".parse().map_err(|_| Error::Failed("no volume name".to_owned()))?;
    paths::VolumePaths::new(&directories, &shortest).check_sockets().map_err(Error::Failed)?;
    // The lock is released when this process ends, however it does.
    let _lock = only_one(&directories.run.join("everdiskd.lock"))?;
    let mut signals = Signals::new([SIGINT, SIGTERM]).doing(|| "handle signals".to_owned())?;
    let programs = Programs::find().doing(|| "find the programs".to_owned())?;
    let catalogue = Arc::new(Catalogue::load(directories, programs)?);
    take_over::take_over(&catalogue)?;
    let listener = server::listen(&socket).doing(|| format!("listen at {}", socket.display()))?;
    let named = socket.clone();
    let waiting = thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            info!(signal, "ends; the volumes go on");
            let _ = fs::remove_file(&named);
            std::process::exit(0);
        }
    });
    waiting.doing(|| "start a thread".to_owned())?;
    info!(event = event::DAEMON_READY, version = PRODUCT, socket = %socket.display(), volumes = catalogue.all().len());
    server::serve(&listener, &catalogue);
    Ok(())
}

fn only_one(path: &Path) -> Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(path);
    let file = file.doing(|| format!("open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::State(format!(
            "another everdiskd runs with this run directory ({} is locked): stop it first, or give another --run-dir",
            path.display()
        ))),
        Err(TryLockError::Error(source)) => Err(Error::Io { doing: format!("lock {}", path.display()), source }),
    }
}
