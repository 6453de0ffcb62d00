//! The start of the control module: what runs is left running, what was left half-done is finished or undone.

use std::{sync::Arc, thread};

use everdisk_api::operation::OperationName;
use everdisk_proto::frame::{GateState, InterfaceStatus};
use everdisk_telemetry::event;
use tracing::{info, warn};

use crate::{
    attach::clear_away,
    catalogue::Catalogue,
    detach,
    error::{Doing, Result},
    health,
    process::of_volume,
    record::{Attachment, KnownCore, Phase},
    supervise::supervise,
    upgrade,
    volume::Volume,
};

/// Takes over every volume.
///
/// # Errors
/// No thread can be started.
pub fn recover(catalogue: &Catalogue) -> Result<()> {
    for volume in catalogue.all() {
        if let Err(e) = settle(&volume) {
            warn!(volume = %volume.name, "{e}");
        }
        upgrade::resume_unfinished(&volume).doing(|| "start a thread".to_owned())?;
        health::watch(&volume).doing(|| "start a thread".to_owned())?;
        supervise(&volume).doing(|| "start a thread".to_owned())?;
    }
    Ok(())
}

/// Enters processes that were started and not written down.
fn adopt(volume: &Volume) -> Result<()> {
    let found = of_volume(&volume.paths.spec(), &volume.paths.cores())?;
    volume.update_attachment(|attachment| {
        for (process, program) in found {
            let known =
                attachment.interface == Some(process) || attachment.cores.iter().any(|core| core.process == process);
            match program.file_name().and_then(|name| name.to_str()) {
                _ if known => {}
                Some("everdisk-interface") if !attachment.interface_alive() => attachment.interface = Some(process),
                Some("everdisk-core") => attachment.cores.push(KnownCore { process, program, digest: None }),
                _ => {}
            }
        }
    })
}

/// Unmounting may take long: in a thread of its own.
fn end_detach(volume: &Arc<Volume>) -> Result<()> {
    let operation = volume.begin(OperationName::Detach)?;
    let volume = Arc::clone(volume);
    let ending = thread::Builder::new().name(format!("detach-{}", volume.name)).spawn(move || {
        info!(volume = %volume.name, "an interrupted detach is resumed");
        if let Err(e) = detach::resume_unfinished(&volume, &operation) {
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
        info!(event = event::VOLUME_TAKEN_OVER, volume = %volume.name, interface = attachment.interface_alive(), cores, "a volume that runs is taken over");
        return Ok(());
    }
    if attachment.phase == Phase::Detaching {
        return end_detach(volume);
    }
    match volume.interface().status() {
        Ok(status) if is_open(&attachment, &status) => {
            volume.update_attachment(|attachment| attachment.opened(&status.nbd))
        }
        _ => clear_away(volume),
    }
}

/// Whether the interface has opened every front end that it was or was to be asked for.
fn is_open(attachment: &Attachment, status: &InterfaceStatus) -> bool {
    let all = status.file.is_some() == attachment.file.is_some() && status.nbd.len() == attachment.nbd.len();
    all && status.gate != GateState::Detached
}

#[cfg(test)]
mod tests {
    use everdisk_proto::frame::{LentFile, NbdListen, NbdStatus};

    use super::*;
    use crate::{fake, volume::tests::volume};

    /// An attach that was left counts as done when every front end is open, and is undone otherwise.
    #[test]
    fn an_attach_that_was_left_is_ended_where_every_front_end_is_open_and_undone_elsewhere() {
        let file = LentFile { path: "/srv/v".into(), channels: 1, source: None };
        let address = |text: &str| text.parse().unwrap();
        let nbd = NbdStatus {
            address: address("tcp:127.0.0.1:4321"),
            bound: None,
            connections: 0,
            accepted: 0,
            carried: 0,
            broken: 0,
        };
        for (opened, bound, gate, stays) in [
            (Some(&file), vec![nbd.clone()], GateState::Serving, true),
            (Some(&file), Vec::new(), GateState::Serving, false),
            (None, vec![nbd.clone()], GateState::Serving, false),
            (Some(&file), vec![nbd], GateState::Detached, false),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let volume = volume(dir.path());
            let interface = fake::Interface::start(&volume);
            let listen = NbdListen { address: address("tcp:127.0.0.1:0"), mode: 0o600, uid: 0, gid: 0, bound: None };
            volume
                .update_attachment(|attachment| {
                    // Not this process, for it would be ended.
                    attachment.interface = None;
                    (attachment.phase, attachment.nbd) = (Phase::Attaching, vec![listen]);
                })
                .unwrap();
            interface.set(|status| (status.file, status.nbd, status.gate) = (opened.cloned(), bound, gate));
            settle(&volume).unwrap();
            let left = volume.record().attachment;
            assert_eq!(left.as_ref().map(|a| a.phase), stays.then_some(Phase::Attached));
            assert!(left.is_none_or(|a| a.places() == "/srv/v, tcp:127.0.0.1:4321"));
        }
    }
}
