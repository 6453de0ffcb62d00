//! Upgrades that were left without an end.

use std::sync::Arc;

use everdisk_api::{LastUpgrade, operation::OperationName};
use everdisk_proto::journal::{self, Outcome};
use everdisk_upgrade::{
    act::Act,
    run::resume,
    unfinished::{Unfinished, unfinished},
};
use tracing::{info, warn};

use super::{read_journal, remember};
use crate::{
    actor::Actor,
    error::{Error, Result},
    progress::Progress,
    stage,
    volume::Volume,
};

/// Resumes an upgrade that an earlier control module left unfinished, in a thread of its own.
pub fn resume_unfinished(volume: &Arc<Volume>) {
    let left = match read_journal(volume) {
        Ok(records) => unfinished(&records),
        Err(e) => {
            // Which programs are in use is not known: all stay.
            warn!(volume = %volume.name, "{e}");
            return;
        }
    };
    let Some(left) = left else {
        stage::prune(volume);
        return;
    };
    let Ok(operation) = volume.begin(OperationName::Upgrade) else { return };
    let volume = Arc::clone(volume);
    let spawned = std::thread::Builder::new().name(format!("upgrade-{}", volume.name)).spawn(move || {
        info!(volume = %volume.name, upgrade = left.upgrade, "an interrupted upgrade is resumed");
        let ended = finish(&volume, &left);
        if let Err(e) = ended {
            warn!(volume = %volume.name, "{e}");
        }
        drop(operation);
    });
    if let Err(e) = spawned {
        warn!("cannot start a thread: {e}");
    }
}

fn finish(volume: &Arc<Volume>, left: &Unfinished) -> Result<()> {
    let progress = Progress::silent();
    let record = volume.record();
    let mut report = record
        .unfinished
        .filter(|kept| kept.upgrade == left.upgrade)
        .unwrap_or_else(|| LastUpgrade::new(volume.name.to_string(), left.upgrade, left.from.identity.version.clone()));
    let program = left.to.as_ref().map(|build| build.program.clone()).unwrap_or_default();
    report.rollback = left.rollback;
    let mut actor = Actor::new(volume, left.upgrade, &program, &progress);
    actor.rollback = left.rollback;
    let current = record.current.unwrap_or_else(|| left.from.clone());
    if volume.attachment().is_some() {
        report = resume(&mut actor, left, &current, report);
    } else {
        let committed = left.to.as_ref() == Some(&current);
        let outcome = if committed { Outcome::Committed } else { Outcome::Aborted };
        let reason = (!committed)
            .then(|| "the volume was detached, or the machine restarted, before the upgrade ended".to_owned());
        report.outcome = Some(outcome);
        report.reason.clone_from(&reason);
        let end = journal::Event::End { outcome, reason };
        actor.record(end).map_err(|fault| Error::Failed(fault.0))?;
    }
    if report.outcome.is_some() {
        // Else the program of the core that serves is not on record yet.
        stage::prune(volume);
    }
    remember(volume, &report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{durable, status::status, volume::tests::volume};

    #[test]
    fn a_damaged_journal_costs_no_program_and_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let program = volume.paths.cores().join("1");
        durable::make_dir(&program).unwrap();
        std::fs::write(volume.paths.journal(), "{}\n").unwrap();
        resume_unfinished(&volume);
        assert!(program.exists());
        assert!(status(&volume).reason.unwrap().contains("journal is damaged"));
        std::fs::remove_file(volume.paths.journal()).unwrap();
        resume_unfinished(&volume);
        assert!(!program.exists());
        assert_eq!(status(&volume).reason, None);
    }
}
