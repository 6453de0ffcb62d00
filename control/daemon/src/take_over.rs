//! The start of the control module: what runs is left running, what was left half-done is finished or undone.

use std::{sync::Arc, thread};

use everdisk_proto::frame::GateState;
use everdisk_telemetry::event;
use tracing::{info, warn};

use crate::{
    attach::clear_away,
    catalogue::Catalogue,
    detach,
    error::{Doing, Result},
    process::of_volume,
    record::{KnownCore, Phase},
    supervise::supervise,
    upgrade,
    volume::Volume,
};

/// Takes over every volume.
///
/// # Errors
/// No thread can be started.
pub fn take_over(catalogue: &Catalogue) -> Result<()> {
    for volume in catalogue.all() {
        if let Err(e) = settle(&volume) {
            warn!(volume = %volume.name, "{e}");
        }
        upgrade::take_up(&volume);
        supervise(&volume).doing(|| "start a thread".to_owned())?;
    }
    Ok(())
}

/// Enters processes that were started and not written down.
fn adopt(volume: &Volume) -> Result<()> {
    let found = of_volume(&volume.paths.spec(), &volume.paths.cores());
    volume.update_attachment(|attachment| {
        for (process, program) in found {
            let known =
                attachment.interface == Some(process) || attachment.cores.iter().any(|core| core.process == process);
            match program.file_name().and_then(|name| name.to_str()) {
                _ if known => {}
                Some("everdisk-interface") if !attachment.interface_alive() => attachment.interface = Some(process),
                Some("everdisk-core") => attachment.cores.push(KnownCore { process, program }),
                _ => {}
            }
        }
    })
}

/// Unmounting may take long: in a thread of its own.
fn end_detach(volume: &Arc<Volume>) -> Result<()> {
    let operation = volume.begin("detach")?;
    let volume = Arc::clone(volume);
    let ending = thread::Builder::new().name(format!("detach-{}", volume.name)).spawn(move || {
        info!(volume = %volume.name, "a detach without an end is taken up");
        if let Err(e) = detach::take_up(&volume, &operation) {
            warn!(volume = %volume.name, "{e}");
        }
    });
    ending.doing(|| "start a thread".to_owned()).map(|_| ())
}

/// Finishes or undoes an attach or detach that was under way, and forgets an attachment of an earlier boot.
fn settle(volume: &Arc<Volume>) -> Result<()> {
    let Some(attachment) = volume.record().attachment else { return Ok(()) };
    if !attachment.of_this_boot() {
        return clear_away(volume);
    }
    if attachment.phase == Phase::Attached {
        adopt(volume)?;
        let cores = volume.attached()?.live_cores().count();
        info!(event = event::VOLUME_TAKEN_OVER, volume = %volume.name, interface = attachment.interface_alive(), cores);
        return Ok(());
    }
    if attachment.phase == Phase::Detaching {
        return end_detach(volume);
    }
    let open = volume.interface().status().is_ok_and(|status| {
        let all = status.file.is_some() == attachment.file.is_some() && status.nbd.len() == attachment.nbd.len();
        status.gate != GateState::Detached && all
    });
    if open {
        return volume.update_attachment(|attachment| attachment.phase = Phase::Attached);
    }
    clear_away(volume)
}
