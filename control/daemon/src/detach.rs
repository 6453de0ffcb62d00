//! Detach: flush, unmount, and be sure that every process has gone.

use std::{sync::Arc, time::Duration};

use everdisk_telemetry::event;
use tracing::info;

use crate::{
    attach::clear_away,
    error::{Error, Result},
    peers::NotDetached,
    progress::Progress,
    record::{Attachment, Phase},
    start::{GONE_WITHIN, end_all},
    volume::Volume,
};

/// The flush before a detach.
const FLUSH_WITHIN: Duration = Duration::from_secs(30);
/// The same when it does not matter how it ends.
const FORCED_FLUSH_WITHIN: Duration = Duration::from_secs(3);

/// Detaches a volume. `force`: although its file is in use, it could not be flushed, or it is dead.
///
/// # Errors
/// Why not; the volume serves on as before then.
pub fn detach(volume: &Arc<Volume>, force: bool, progress: &Progress) -> Result<()> {
    let _operation = volume.begin("detach")?;
    let _hands = crate::volume::lock(&volume.hands);
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
    progress.step("flush");
    match flush_within(volume, if force { FORCED_FLUSH_WITHIN } else { FLUSH_WITHIN }) {
        Err(e) if !force => {
            return Err(Error::Failed(format!(
                "{e}; volume {0} stays attached: mend the storage node, or give up what is not flushed with \
                 `everdisk detach {0} --force`",
                volume.name
            )));
        }
        _ => {}
    }
    progress.step("unmount");
    volume.update_attachment(|attachment| attachment.phase = Phase::Detaching)?;
    let attachment = match volume.interface().detach(force) {
        Ok(()) => volume.attached()?,
        Err(NotDetached::InUse(reason)) => {
            stay(volume)?;
            return Err(Error::State(format!(
                "volume {0} is in use at {1} ({reason}): close it there (fuser -vm shows who has it), or use \
                 `everdisk detach {0} --force`",
                volume.name,
                attachment.file.path.display()
            )));
        }
        Err(NotDetached::Other(e)) if !force => {
            stay(volume)?;
            return Err(e);
        }
        Err(NotDetached::Other(_)) => {
            info!(event = event::VOLUME_DETACHED, volume = %volume.name, forced = true);
            return clear_away(volume);
        }
    };
    progress.step("wait for the processes");
    finish(volume, &attachment)?;
    info!(event = event::VOLUME_DETACHED, volume = %volume.name);
    Ok(())
}

/// The rest of a detach once the interface has unmounted.
///
/// # Errors
/// A process does not go, or the record cannot be written.
pub fn finish(volume: &Volume, attachment: &Attachment) -> Result<()> {
    if !end_all(attachment, GONE_WITHIN) {
        return Err(Error::Failed(format!("a process of volume {} does not end although it was killed", volume.name)));
    }
    // What the interface could not unmount (it is lazy only when forced) clear_away takes out of the tree.
    clear_away(volume)
}

fn stay(volume: &Volume) -> Result<()> {
    volume.update_attachment(|attachment| attachment.phase = Phase::Attached)
}

/// Has the serving core make everything durable.
///
/// # Errors
/// No core serves, or a storage node did not take it.
pub fn flush(volume: &Volume) -> Result<()> {
    flush_within(volume, FLUSH_WITHIN)
}

/// As [`flush`], within `limit`.
///
/// # Errors
/// As [`flush`].
pub fn flush_within(volume: &Volume, limit: Duration) -> Result<()> {
    let status = volume.interface().status()?;
    let serving = status.serving.ok_or_else(|| {
        Error::State(format!("no core serves volume {0} now: see `everdisk status {0}`", volume.name))
    })?;
    volume
        .with_core(serving, |core| core.flush(limit))
        .map_err(|e| Error::Failed(format!("volume {} could not be flushed: {e}", volume.name)))
}
