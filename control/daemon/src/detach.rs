//! Detach: flush, give the front ends up, and be sure that every process has gone.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use everdisk_api::operation::OperationName;
use everdisk_telemetry::event;
use tracing::{info, warn};

use crate::{
    attach::clear_away,
    error::{Doing, Error, Result},
    flush::{Patience, Synchronous, flush},
    give_up::{Force, Stake, does_not_end},
    peers::{DETACH_DEADLINE, NotDetached},
    places,
    process::ProcessId,
    progress::Progress,
    record::{Attachment, Phase},
    start::{GONE_WITHIN, end_all},
    users::{self, User, Users},
    volume::{Operation, Volume},
};

/// The flush before a detach when it does not matter how it ends.
const FORCED_FLUSH: Patience = Patience::Whole(Duration::from_secs(3));
/// The core that served flushes once more after the unmount, which may have written mapped pages back, and ends.
const LAST_FLUSH_WITHIN: Duration = Duration::from_secs(30);
/// Interval at which an unmount under way is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Detaches a volume. By force: although a front end is in use, it could not be flushed, or it is dead. The bytes that were given up; none
/// when that is unknown.
///
/// # Errors
/// Why not; the volume serves on as before then. Or it is detached, and what was written last may not be durable.
pub fn detach(volume: &Arc<Volume>, force: Force, progress: &Progress) -> Result<Option<u64>> {
    let _operation = volume.begin(OperationName::Detach)?;
    let _hands = volume.supervision.hands();
    let attachment = volume
        .attachment()
        .ok_or_else(|| Error::State(format!("volume {} is not attached: there is nothing to detach", volume.name)))?;
    if !attachment.interface_alive() {
        return without_interface(volume, &attachment, force);
    }
    // One that is stopped or hangs is asked nothing more.
    if force != Force::No && volume.interface().status().is_err() {
        let stake = Stake::unknown("the interface does not answer");
        stake.permit(volume, force)?;
        return give_up(volume, &stake);
    }
    let users = users_of(volume, &attachment);
    if force == Force::No && !users.found.is_empty() {
        return Err(in_use(volume, &attachment, "", &users.found));
    }
    progress.step("flush");
    let emptied = empty(volume, if force == Force::No { Patience::OPERATOR } else { FORCED_FLUSH }, progress);
    let (through, unsent) = match emptied {
        Ok(through) => (through, None),
        Err(e) if force != Force::No => (Synchronous::nothing(), Some(e.to_string())),
        Err(e) => {
            return Err(Error::Failed(format!(
                "{e}; volume {0} stays attached: detach it again then, or give up what is not flushed with \
                 `everdisk detach {0} --force`",
                volume.name
            )));
        }
    };
    let is_sent = unsent.is_none();
    let stake = Stake::now(volume, unsent, users::in_words(&users.found).or_else(|| clients(volume)));
    if force != Force::No {
        stake.permit(volume, force)?;
    }
    progress.step("close the front ends");
    // Asked before the front ends close: the core that serves tells how its last flush went. By force an interface that is silent here is
    // told to detach without that, and has the time of a detach for its answer.
    let closed = match volume.interface().status() {
        Ok(status) => {
            volume.update_attachment(|attachment| attachment.phase = Phase::Detaching)?;
            close(volume, &attachment, force).map(|()| status.serving)
        }
        Err(_) if force == Force::Agreed => {
            volume.update_attachment(|attachment| attachment.phase = Phase::Detaching)?;
            close(volume, &attachment, force).map(|()| None)
        }
        Err(e) => Err(NotDetached::Other(e)),
    };
    let (attachment, serving) = match closed {
        Ok(serving) => (volume.attached()?, serving),
        Err(NotDetached::InUse(reason)) => {
            stay(volume)?;
            let users = users_of(volume, &attachment);
            return Err(in_use(volume, &attachment, &reason, &users.found));
        }
        Err(NotDetached::Other(e)) if force != Force::Agreed => {
            stay(volume)?;
            return Err(if force == Force::No { e } else { Error::GivesUp(format!("{e}: say --yes to do it")) });
        }
        Err(NotDetached::Other(_)) => {
            through.keep();
            return give_up(volume, &stake);
        }
    };
    through.keep();
    progress.step("wait for the processes");
    match finish(volume, &attachment, serving) {
        Err(e) if force == Force::No || volume.attachment().is_some() => Err(e),
        // Nothing is given up where the flush before succeeded, or the core that served has said so of its last one.
        Ok(LastFlush::Succeeded) => Ok(Stake { bytes: Some(0), ..stake }.lost(volume)),
        Ok(LastFlush::Unknown) if is_sent => Ok(Stake { bytes: Some(0), ..stake }.lost(volume)),
        Ok(LastFlush::Unknown) | Err(_) => Ok(stake.lost(volume)),
    }
}

/// Gives the front ends up. A file that was unmounted and that the kernel still has, it has for copies of the mount that no process uses, if
/// there are such.
fn close(volume: &Volume, attachment: &Attachment, force: Force) -> Result<(), NotDetached> {
    let file = attachment.file.as_ref();
    let before = file.and_then(|file| places::mount_of(file).ok().flatten());
    let closed = volume.interface().detach(force == Force::Agreed, file);
    let (Err(NotDetached::InUse(_)), Some(before), Some(file)) = (&closed, before, file) else { return closed };
    if places::mount_of(file).is_ok_and(|now| now.is_none()) {
        let connection = before.device.1;
        // Where they are not found out, no copy is known, and the file stays in use.
        let users = users::of_mount(connection, &file.path).unwrap_or_default();
        if users.found.is_empty() && users.copies > 0 {
            return volume.interface().detach(true, Some(file));
        }
        volume.findings.set_served_elsewhere(Some(connection));
    }
    closed
}

/// No process can be asked to detach it.
fn without_interface(volume: &Volume, attachment: &Attachment, force: Force) -> Result<Option<u64>> {
    // One that was given up before, and of which a process did not end.
    let again = attachment.phase == Phase::Detaching;
    if force == Force::No && !again {
        return Err(Error::State(format!(
            "volume {0} cannot be detached in order: its interface is gone; wait until `everdisk status {0}` says \
             serving, or give up what is not flushed with `everdisk detach {0} --force`",
            volume.name
        )));
    }
    // With the last process the buffer has gone.
    if attachment.live_cores().next().is_none() || again {
        clear_away(volume)?;
        info!(event = event::VOLUME_DETACHED, volume = %volume.name, forced = true);
        return Ok(Some(0));
    }
    let stake = Stake::unknown("its interface is gone; wait until `everdisk status` says serving to have it flushed");
    stake.permit(volume, force)?;
    give_up(volume, &stake)
}

/// The users of the file, as far as they can be found.
fn users_of(volume: &Volume, attachment: &Attachment) -> Users {
    let Some(file) = &attachment.file else { return Users::default() };
    let mounted = places::mount_of(file).ok().flatten().map(|mounted| mounted.device.1);
    let Some(connection) = mounted.or_else(|| volume.findings.served_elsewhere()) else { return Users::default() };
    users::of_mount(connection, &file.path).unwrap_or_else(|e| {
        // The kernel is asked after the unmount, so no user is cut off even without this answer.
        warn!(volume = %volume.name, "{e}");
        Users::default()
    })
}

/// The NBD clients in words; none when there are none.
fn clients(volume: &Volume) -> Option<String> {
    let clients: u32 = volume.interface().status().ok()?.nbd.iter().map(|nbd| nbd.connections).sum();
    (clients > 0).then(|| format!("{clients} NBD connections"))
}

/// Sends what is buffered to the storage nodes; writes go through to them from then on, while the result lives.
fn empty<'a>(volume: &'a Volume, limit: Patience, progress: &Progress) -> Result<Synchronous<'a>> {
    let through = Synchronous::begin(volume)?;
    flush(volume, limit, progress)?;
    Ok(through)
}

/// Kills what runs of a volume.
fn give_up(volume: &Volume, stake: &Stake) -> Result<Option<u64>> {
    // The supervisor starts nothing for it any more, even if a process does not end.
    volume.update_attachment(|attachment| attachment.phase = Phase::Detaching)?;
    let given_up = stake.lost(volume);
    volume.findings.set_served_elsewhere(None);
    clear_away(volume).inspect_err(|e| volume.findings.set_trouble(Some(e.to_string())))?;
    info!(event = event::VOLUME_DETACHED, volume = %volume.name, forced = true, "the volume is not served any more");
    Ok(given_up)
}

/// Ends a detach that an earlier control module left while the interface was unmounting.
///
/// # Errors
/// Why it cannot be ended; the volume stays attached then.
pub fn resume_unfinished(volume: &Volume, _operation: &Operation) -> Result<()> {
    let _hands = volume.supervision.hands();
    let attachment = volume.attached()?;
    let deadline = Instant::now() + DETACH_DEADLINE;
    let mut serving = None;
    loop {
        // While it unmounts it may not answer: what it said last counts.
        serving = volume.interface().status().map_or(serving, |status| status.serving);
        let refused = match volume.interface().detach(false, attachment.file.as_ref()) {
            Ok(()) => return finish(volume, &attachment, serving).map(drop),
            Err(NotDetached::InUse(_)) => return stay(volume),
            Err(NotDetached::Other(e)) => e,
        };
        if given_up(&attachment)? {
            return finish(volume, &attachment, serving).map(drop);
        }
        // Else it may be unmounting still, as it was told by the predecessor. Where nothing is mounted, the cores tell by
        // their leaving that it had done so.
        if (attachment.file.is_some() && !attachment.interface_alive()) || Instant::now() > deadline {
            stay(volume)?;
            return Err(refused);
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// The users of each front end, and how to end that use. Of NBD front ends those with clients; all of them where it is unknown which have clients.
fn in_use(volume: &Volume, attachment: &Attachment, reason: &str, users: &[User]) -> Error {
    let seen = volume.interface().status().map(|status| status.nbd).unwrap_or_default();
    let file = attachment.file.as_ref().map(|file| file.path.display().to_string());
    let mut nbd: Vec<String> =
        seen.iter().filter(|nbd| nbd.connections > 0).map(|nbd| nbd.address.to_string()).collect();
    if nbd.is_empty() && file.is_none() {
        nbd = attachment.nbd.iter().map(|nbd| nbd.address.to_string()).collect();
    }
    let named = users::in_words(users);
    let close = file.map(|path| match named {
        Some(_) => format!("close {path} there"),
        None => format!("close {path} where it is open (fuser -vm {path} shows who has it)"),
    });
    let disconnect = (!nbd.is_empty()).then(|| format!("disconnect the NBD clients of {}", nbd.join(" and ")));
    let advice = close.into_iter().chain(disconnect).collect::<Vec<_>>().join(" and ");
    let reason = Some(reason).filter(|reason| !reason.is_empty()).map(str::to_owned);
    let reasons = reason.into_iter().chain(named).collect::<Vec<_>>().join("; ");
    Error::State(format!(
        "volume {0} is in use ({reasons}): {advice}, or cut off its users with `everdisk detach {0} --force`",
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
/// A process does not end, or the record cannot be written. Or the volume is detached, but its last flush failed.
fn finish(volume: &Volume, attachment: &Attachment, serving: Option<u32>) -> Result<LastFlush> {
    let last = attachment.cores.iter().find(|core| Some(core.process.pid) == serving);
    let flushed = last.map_or(Ok(LastFlush::Unknown), |core| last_flush(volume, core.process));
    if !end_all(attachment, GONE_WITHIN) {
        let told = does_not_end(&volume.spec(), &attachment.processes());
        volume.findings.set_trouble(Some(told.clone()));
        return Err(Error::Failed(told));
    }
    volume.findings.set_served_elsewhere(None);
    // What the interface could not unmount (it is lazy only when forced) clear_away takes out of the tree.
    clear_away(volume)?;
    info!(event = event::VOLUME_DETACHED, volume = %volume.name, "the volume is not served any more");
    flushed.map_err(|why| {
        Error::Failed(format!(
            "volume {} is detached, and yet what was written last may not be durable: {why}; it may be lost if the \
             machine loses power, so check the storage nodes",
            volume.name
        ))
    })
}

/// What is known of the last flush of the core that served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LastFlush {
    /// The core ended with success.
    Succeeded,
    /// No core served, or it was started by an earlier control module.
    Unknown,
}

/// Waits for the last flush of the core that served: it ends with success when that is done.
fn last_flush(volume: &Volume, core: ProcessId) -> Result<LastFlush, String> {
    let pid = core.pid;
    if !core.gone_within(LAST_FLUSH_WITHIN) {
        core.end(Duration::ZERO);
        return Err(format!("core process {pid} did not end within {LAST_FLUSH_WITHIN:?} and was killed"));
    }
    // How a core ended that an earlier control module started is not known.
    let Some(child) = volume.children.find(core) else { return Ok(LastFlush::Unknown) };
    match child.ended_by_now() {
        Some(status) if !status.success() => {
            Err(format!("core process {pid} ended with {status}: {}", child.last_words()))
        }
        Some(_) => Ok(LastFlush::Succeeded),
        None => Ok(LastFlush::Unknown),
    }
}

fn stay(volume: &Volume) -> Result<()> {
    volume.update_attachment(|attachment| attachment.phase = Phase::Attached)
}

#[cfg(test)]
mod tests;
