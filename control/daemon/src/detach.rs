//! Detach: flush, give the front ends up, and be sure that every process has gone.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::frame::NbdStatus;
use everdisk_telemetry::event;
use tracing::info;

use crate::{
    attach::clear_away,
    error::{Doing, Error, Result},
    flush::{Patience, Synchronous, flush},
    peers::{DETACH_DEADLINE, NotDetached},
    places,
    process::ProcessId,
    progress::Progress,
    record::{Attachment, Phase},
    start::{GONE_WITHIN, end_all},
    volume::{Operation, Volume, lock},
};

/// The flush before a detach when it does not matter how it ends.
const FORCED_FLUSH: Patience = Patience::Whole(Duration::from_secs(3));
/// The core that served flushes once more after the unmount, which may have written mapped pages back, and ends.
const LAST_FLUSH_WITHIN: Duration = Duration::from_secs(30);
/// An unmount under way is looked at this often.
const LOOK: Duration = Duration::from_millis(200);

/// Detaches a volume. `force`: although a front end is in use, it could not be flushed, or it is dead.
///
/// # Errors
/// Why not; the volume serves on as before then. Or it is detached, and what was written last may not be durable.
pub fn detach(volume: &Arc<Volume>, force: bool, progress: &Progress) -> Result<()> {
    let _operation = volume.begin("detach")?;
    let _hands = lock(&volume.hands);
    let attachment = volume.attached()?;
    if !attachment.interface_alive() {
        if !force {
            return Err(Error::State(format!(
                "volume {0} cannot be detached in order: its interface is gone; wait until `everdisk status {0}` says \
                 serving, or give up what is not flushed with `everdisk detach {0} --force`",
                volume.name
            )));
        }
        return clear_away(volume);
    }
    // One that is stopped or hangs is asked nothing more.
    if force && volume.interface().status().is_err() {
        return give_up(volume);
    }
    progress.step("flush");
    let through = match empty(volume, if force { FORCED_FLUSH } else { Patience::OPERATOR }, progress) {
        Ok(through) => through,
        Err(_) if force => Synchronous::nothing(),
        Err(e) => {
            return Err(Error::Failed(format!(
                "{e}; volume {0} stays attached: detach it again then, or give up what is not flushed with \
                 `everdisk detach {0} --force`",
                volume.name
            )));
        }
    };
    progress.step("close the front ends");
    volume.update_attachment(|attachment| attachment.phase = Phase::Detaching)?;
    let serving = volume.interface().status().ok().and_then(|status| status.serving);
    let attachment = match volume.interface().detach(force, attachment.file.as_ref()) {
        Ok(()) => volume.attached()?,
        Err(NotDetached::InUse(reason)) => {
            stay(volume)?;
            let nbd = volume.interface().status().map(|status| status.nbd).unwrap_or_default();
            return Err(in_use(volume, &attachment, &nbd, &reason));
        }
        Err(NotDetached::Other(e)) if !force => {
            stay(volume)?;
            return Err(e);
        }
        Err(NotDetached::Other(_)) => {
            through.keep();
            return give_up(volume);
        }
    };
    through.keep();
    progress.step("wait for the processes");
    match finish(volume, &attachment, serving) {
        Err(e) if !force => Err(e),
        Err(e) if volume.attachment().is_some() => Err(e),
        _ => Ok(()),
    }
}

/// Sends what is buffered to the storage nodes; writes go through to them from then on, while the result lives.
fn empty<'a>(volume: &'a Volume, limit: Patience, progress: &Progress) -> Result<Synchronous<'a>> {
    let through = Synchronous::begin(volume)?;
    flush(volume, limit, progress)?;
    Ok(through)
}

fn give_up(volume: &Volume) -> Result<()> {
    clear_away(volume)?;
    info!(event = event::VOLUME_DETACHED, volume = %volume.name, forced = true);
    Ok(())
}

/// Ends a detach that an earlier control module left while the interface was unmounting.
///
/// # Errors
/// Why it cannot be ended; the volume stays attached then.
pub fn take_up(volume: &Volume, _operation: &Operation) -> Result<()> {
    let _hands = lock(&volume.hands);
    let attachment = volume.attached()?;
    let deadline = Instant::now() + DETACH_DEADLINE;
    loop {
        let serving = volume.interface().status().ok().and_then(|status| status.serving);
        let refused = match volume.interface().detach(false, attachment.file.as_ref()) {
            Ok(()) => return finish(volume, &attachment, serving),
            Err(NotDetached::InUse(_)) => return stay(volume),
            Err(NotDetached::Other(e)) => e,
        };
        if given_up(&attachment)? {
            return finish(volume, &attachment, serving);
        }
        // Else it may be unmounting still, as it was told by the predecessor. Where nothing is mounted, the cores tell by
        // their leaving that it had done so.
        if (attachment.file.is_some() && !attachment.interface_alive()) || Instant::now() > deadline {
            stay(volume)?;
            return Err(refused);
        }
        thread::sleep(LOOK);
    }
}

/// Which front ends somebody may be using, and how to make an end of it. Of NBD those with clients; all of them where nobody
/// says that any has some. Of the file nobody knows but whoever has it open.
fn in_use(volume: &Volume, attachment: &Attachment, seen: &[NbdStatus], reason: &str) -> Error {
    let file = attachment.file.as_ref().map(|file| file.path.display().to_string());
    let mut nbd: Vec<String> =
        seen.iter().filter(|nbd| nbd.connections > 0).map(|nbd| nbd.address.to_string()).collect();
    if nbd.is_empty() && file.is_none() {
        nbd = attachment.nbd.iter().map(|nbd| nbd.address.to_string()).collect();
    }
    let close = file.map(|path| format!("close {path} where it is open (fuser -vm {path} shows who has it)"));
    let disconnect = (!nbd.is_empty()).then(|| format!("disconnect the NBD clients of {}", nbd.join(" and ")));
    let advice = close.into_iter().chain(disconnect).collect::<Vec<_>>().join(" and ");
    Error::State(format!(
        "volume {0} is in use ({reason}): {advice}, or cut off who uses it with `everdisk detach {0} --force`",
        volume.name
    ))
}

/// Whether nothing is left of the front ends: the file is not mounted, or without one no process lives that has the
/// sockets.
fn given_up(attachment: &Attachment) -> Result<bool> {
    let Some(file) = &attachment.file else {
        return Ok(!attachment.interface_alive() && attachment.live_cores().next().is_none());
    };
    Ok(places::mount_of(file).doing(|| "read /proc/self/mountinfo".to_owned())?.is_none())
}

/// The rest of a detach once the interface has unmounted; `serving` had the gate until then.
///
/// # Errors
/// A process does not go, or the record cannot be written. Or the volume is detached, and yet its last flush failed.
fn finish(volume: &Volume, attachment: &Attachment, serving: Option<u32>) -> Result<()> {
    let last = attachment.cores.iter().find(|core| Some(core.process.pid) == serving);
    let flushed = last.map_or(Ok(()), |core| last_flush(volume, core.process));
    if !end_all(attachment, GONE_WITHIN) {
        return Err(Error::Failed(format!("a process of volume {} does not end although it was killed", volume.name)));
    }
    // What the interface could not unmount (it is lazy only when forced) clear_away takes out of the tree.
    clear_away(volume)?;
    info!(event = event::VOLUME_DETACHED, volume = %volume.name);
    flushed.map_err(|why| {
        Error::Failed(format!(
            "volume {} is detached, and yet what was written last may not be durable: {why}; it may be lost if the \
             machine loses power, so check the storage nodes",
            volume.name
        ))
    })
}

/// Waits for the last flush of the core that served: it ends with success when that is done.
fn last_flush(volume: &Volume, core: ProcessId) -> Result<(), String> {
    let pid = core.pid;
    if !core.gone_within(LAST_FLUSH_WITHIN) {
        core.end(Duration::ZERO);
        return Err(format!("core process {pid} did not end within {LAST_FLUSH_WITHIN:?} and was killed"));
    }
    // How a core ended that an earlier control module started is not known.
    let Some(child) = volume.child(core) else { return Ok(()) };
    match child.ended_by_now() {
        Some(status) if !status.success() => {
            Err(format!("core process {pid} ended with {status}: {}", child.last_words()))
        }
        _ => Ok(()),
    }
}

fn stay(volume: &Volume) -> Result<()> {
    volume.update_attachment(|attachment| attachment.phase = Phase::Attached)
}

#[cfg(test)]
mod tests;
