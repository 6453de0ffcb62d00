//! Starting and ending a volume's processes, each remembered before anything else is done with it.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::{frame::InterfaceStatus, identity::Build};
use everdisk_telemetry::event;
use tracing::{info, warn};

use crate::{
    child::Child,
    error::{Doing, Error, Result},
    record::{Attachment, KnownCore},
    volume::Volume,
};

/// A core arms within this time.
pub const ARMED_WITHIN: Duration = Duration::from_secs(10);
/// A core that was asked to leave is killed after this time.
pub const GONE_WITHIN: Duration = Duration::from_secs(5);
/// An interface answers within this time.
const INTERFACE_WITHIN: Duration = Duration::from_secs(5);
/// Interval at which waits poll.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// What happens to a core that was asked to leave, and refused, while no core serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unserved {
    /// It stays: it may be about to serve.
    Stays,
    /// It goes: it must not serve.
    Goes,
}

/// Starts an interface of a program; `restore`: one that takes the file descriptors back from the cores.
///
/// # Errors
/// It cannot be started or remembered.
pub fn interface(volume: &Arc<Volume>, program: &Path, restore: bool) -> Result<Child> {
    let mut command = Command::new(program);
    command.arg("--volume").arg(volume.paths.spec()).arg("--socket").arg(volume.paths.interface_socket());
    command.arg("--hang-limit").arg(volume.programs.hang_limit.as_millis().to_string());
    if restore {
        command.arg("--restore");
    }
    let kicked = Arc::clone(volume);
    let child = Child::start(command, &volume.paths.interface_log(), move || kicked.supervision.kick())
        .doing(|| format!("start {}", program.display()))?;
    let remembered = volume.update_attachment(|attachment| attachment.interface = Some(child.id));
    if let Err(e) = remembered {
        child.id.end(Duration::ZERO);
        return Err(e);
    }
    volume.children.keep(&child);
    info!(event = event::INTERFACE_STARTED, volume = %volume.name, pid = child.id.pid, restore, "an interface was started");
    Ok(child)
}

/// Waits until an interface answers.
///
/// # Errors
/// It ended, with its last words, or did not answer in time.
pub fn interface_ready(volume: &Volume, child: &Child) -> Result<InterfaceStatus> {
    let deadline = Instant::now() + INTERFACE_WITHIN;
    loop {
        let answer = volume.interface().status();
        match answer {
            Ok(status) if status.pid == child.id.pid => return Ok(status),
            _ if child.ended().is_some() || !child.id.alive() => {
                return Err(Error::Failed(format!("the interface ended: {}", child.last_words())));
            }
            _ if Instant::now() > deadline => {
                return Err(Error::Failed(format!(
                    "the interface did not answer within {INTERFACE_WITHIN:?}: {}",
                    child.last_words()
                )));
            }
            _ => thread::sleep(POLL_INTERVAL),
        }
    }
}

/// Starts a core.
///
/// # Errors
/// It cannot be started or remembered.
pub fn core(volume: &Arc<Volume>, build: &Build) -> Result<Child> {
    let number = volume.update_attachment(|attachment| {
        attachment.started += 1;
        attachment.started
    })?;
    let mut command = Command::new(&build.program);
    command.arg("--volume").arg(volume.paths.spec());
    command.arg("--interface").arg(volume.paths.interface_socket());
    command.arg("--control-dir").arg(&volume.paths.run);
    let kicked = Arc::clone(volume);
    let child = Child::start(command, &volume.paths.core_log(number), move || kicked.supervision.kick())
        .doing(|| format!("start {}", build.program.display()))?;
    let known = KnownCore { process: child.id, program: build.program.clone(), digest: build.digest.clone() };
    if let Err(e) = volume.update_attachment(|attachment| attachment.cores.push(known)) {
        child.id.end(Duration::ZERO);
        return Err(e);
    }
    volume.children.keep(&child);
    let (pid, version) = (child.id.pid, &build.identity.version);
    info!(event = event::CORE_STARTED, volume = %volume.name, pid, %version, "a core was started");
    Ok(child)
}

/// Waits until a core could take the gate.
///
/// # Errors
/// It ended, with its last words, or did not arm in time.
pub fn core_armed(volume: &Volume, child: &Child, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let status = volume.interface().status();
        if status.is_ok_and(|status| status.cores.iter().any(|core| core.pid == child.id.pid && core.armed)) {
            return Ok(());
        }
        if child.ended().is_some() || !child.id.alive() {
            // The reaper and the last write may be a moment behind.
            thread::sleep(POLL_INTERVAL);
            return Err(Error::Failed(format!("the core ended: {}", child.last_words())));
        }
        if Instant::now() > deadline {
            return Err(Error::Failed(format!("the core was not ready within {limit:?}: {}", child.last_words())));
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Has a core leave, politely first, and waits until it has gone. It stays where the interface does not answer (the
/// core may be the last to hold the volume's descriptors), where it has the gate, and where no core has it, unless
/// `unserved` says that it shall go then too. False when it has not gone.
pub fn end_core(volume: &Volume, known: &KnownCore, unserved: Unserved) -> bool {
    let pid = known.process.pid;
    let grace = match volume.interface().dismiss(pid) {
        Ok(()) => GONE_WITHIN,
        Err(Error::Failed(_)) => match volume.interface().status().map(|status| status.serving) {
            Ok(Some(serving)) if serving != pid => Duration::ZERO,
            Ok(None) if unserved == Unserved::Goes => Duration::ZERO,
            _ => return false,
        },
        Err(_) => return false,
    };
    if !known.process.end(grace) {
        warn!(volume = %volume.name, pid, "the core was killed but has not ended");
        return false;
    }
    info!(event = event::CORE_DISMISSED, volume = %volume.name, pid, "a core that is not needed any more has left");
    // It is not there where the core has removed it.
    let _ = fs::remove_file(volume.paths.core_socket(pid));
    // Where it cannot be recorded now, a pass of the supervisor finds it dead and records it.
    let _ = volume.update_attachment(|attachment| attachment.cores.retain(|core| core != known));
    true
}

/// Ends everything that runs for an attachment: `grace` is what is left to those that are leaving by themselves.
pub fn end_all(attachment: &Attachment, grace: Duration) -> bool {
    let deadline = Instant::now() + grace;
    let processes = attachment.interface.into_iter().chain(attachment.cores.iter().map(|core| core.process));
    let mut gone = true;
    for process in processes {
        gone &= process.end(deadline.saturating_duration_since(Instant::now()));
    }
    gone
}
