//! Upgrades that were left without an end.

use std::{io, sync::Arc, thread};

use everdisk_api::{LastUpgrade, operation::OperationName};
use everdisk_proto::journal::{self, Outcome};
use everdisk_upgrade::{
    act::Act,
    run::resume,
    unfinished::{Unfinished, unfinished},
};
use tracing::{info, warn};

use super::{read_journal, ready, remember};
use crate::{
    actor::Actor,
    error::{Error, Result},
    progress::Progress,
    stage,
    volume::Volume,
};

/// Resumes an upgrade that an earlier control module left without an end, in a thread of its own.
///
/// # Errors
/// No thread can be started.
pub fn resume_unfinished(volume: &Arc<Volume>) -> io::Result<()> {
    let records = match read_journal(volume) {
        Ok(records) => records,
        Err(e) => {
            // Which programs are in use is not known: all stay.
            warn!(volume = %volume.name, "{e}");
            return Ok(());
        }
    };
    let Some(left) = unfinished(&records) else {
        if let Err(e) = file_kept(volume, &records) {
            // The next upgrade does it.
            warn!(volume = %volume.name, "{e}");
        }
        stage::prune(volume);
        return Ok(());
    };
    // A detach that was interrupted has the volume; the next upgrade resumes this one.
    let Ok(operation) = volume.begin(OperationName::Upgrade) else { return Ok(()) };
    let volume = Arc::clone(volume);
    thread::Builder::new().name(format!("upgrade-{}", volume.name)).spawn(move || {
        if let Err(e) = finish(&volume, &left, &Progress::silent()) {
            warn!(volume = %volume.name, "{e}");
        }
        drop(operation);
    })?;
    Ok(())
}

/// Gives the last upgrade its end, where it has none.
///
/// # Errors
/// [`Error::Unfinished`]: it cannot be given one now.
pub(super) fn settle(volume: &Arc<Volume>, progress: &Progress) -> Result<()> {
    let records = read_journal(volume)?;
    let stuck = |upgrade: u64, why: String| {
        let (volume, directory) = (volume.name.to_string(), volume.paths.state.clone());
        Error::Unfinished { volume, upgrade, why, directory }
    };
    let Some(left) = unfinished(&records) else {
        let Some(kept) = volume.record().unfinished else { return Ok(()) };
        return file_kept(volume, &records).map_err(|e| stuck(kept.upgrade, e.to_string()));
    };
    if volume.attachment().is_some() {
        ready(volume)?;
    }
    progress.step(&format!("resume upgrade {}", left.upgrade));
    let why = match finish(volume, &left, progress) {
        Err(e) => e.to_string(),
        Ok(_) if unfinished(&read_journal(volume)?).is_none() => return Ok(()),
        Ok(report) => report.reason.unwrap_or_else(|| "no reason is known".to_owned()),
    };
    Err(stuck(left.upgrade, why))
}

/// Files what is kept of an upgrade beside the journal: where the journal has its end, it is the last upgrade that ended. Nothing stays that
/// could be taken for what is known of the next upgrade.
fn file_kept(volume: &Volume, records: &[journal::Entry]) -> Result<()> {
    volume.update(|record| {
        let Some(mut kept) = record.unfinished.take() else { return };
        let end = records.iter().rev().find_map(|entry| match &entry.event {
            journal::Event::End { outcome, reason } if entry.upgrade == kept.upgrade => {
                Some((*outcome, reason.clone()))
            }
            _ => None,
        });
        if let Some((outcome, reason)) = end {
            (kept.outcome, kept.reason) = (Some(outcome), reason);
            record.last_upgrade = Some(kept);
        }
    })
}

/// Gives an upgrade its end: by what is known of it, by resuming it, or, where nothing of it can run any more, by what is on record.
fn finish(volume: &Arc<Volume>, left: &Unfinished, progress: &Progress) -> Result<LastUpgrade> {
    info!(volume = %volume.name, upgrade = left.upgrade, "an upgrade without an end is resumed");
    let record = volume.record();
    let mut report = record
        .unfinished
        .filter(|kept| kept.upgrade == left.upgrade)
        .unwrap_or_else(|| LastUpgrade::new(volume.name.to_string(), left.upgrade, left.from.identity.version.clone()));
    report.rollback = left.rollback;
    let mut actor = Actor::resuming(volume, left.upgrade, progress);
    actor.rollback = left.rollback;
    // A record that was begun anew names none.
    let current = record.current.unwrap_or_else(|| left.from.clone());
    if report.outcome.is_none() && volume.attachment().is_some() {
        report = resume(&mut actor, left, &current, report);
    } else {
        if report.outcome.is_none() {
            let committed = left.to.as_ref() == Some(&current);
            report.outcome = Some(if committed { Outcome::Committed } else { Outcome::Aborted });
            if !committed {
                report.add_reason(
                    "the volume was detached, or the machine restarted, before the upgrade ended".to_owned(),
                );
            }
        }
        let outcome = report.outcome.expect("it was just given one, or had one");
        let end = journal::Event::End { outcome, reason: report.reason.clone() };
        actor.record(end).map_err(|fault| Error::Failed(fault.0))?;
    }
    if report.outcome.is_some() {
        // Else the program of the core that serves is not on record yet.
        stage::prune(volume);
    }
    remember(volume, &report, actor.is_ended())?;
    Ok(report)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use everdisk_api::Handover;
    use everdisk_proto::{identity::Build, journal::Event};
    use everdisk_upgrade::step::{Limits, Step};

    use super::*;
    use crate::{
        durable, fake,
        process::ProcessId,
        record::KnownCore,
        status::status,
        upgrade::{Wish, rollback, tests::identity, upgrade},
        volume::tests::volume,
    };

    #[test]
    fn a_damaged_journal_costs_no_program_and_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let program = volume.paths.cores().join("1");
        durable::make_dir(&program).unwrap();
        std::fs::write(volume.paths.journal(), "{}\n").unwrap();
        resume_unfinished(&volume).unwrap();
        assert!(program.exists());
        assert!(status(&volume).reason.unwrap().contains("journal is damaged"));
        std::fs::remove_file(volume.paths.journal()).unwrap();
        resume_unfinished(&volume).unwrap();
        assert!(!program.exists());
        assert_eq!(status(&volume).reason, None);
    }

    fn build(program: &str) -> Build {
        Build { program: program.into(), identity: identity("0..2"), digest: None }
    }

    /// An old core serves, and the journal has an upgrade whose end it lacks.
    fn left(root: &Path) -> (Arc<Volume>, fake::Interface) {
        let volume = volume(root);
        let interface = fake::Interface::start(&volume);
        let process = ProcessId::of(std::process::id()).unwrap();
        let old = build("/old");
        volume.update(|record| record.current = Some(old.clone())).unwrap();
        let known = KnownCore { process, program: old.program.clone(), digest: None };
        volume.update_attachment(|attachment| attachment.cores.push(known)).unwrap();
        interface.set(|status| {
            status.serving = Some(process.pid);
            status.cores = vec![fake::core(process.pid, 0)];
        });
        let progress = Progress::silent();
        let mut actor = Actor::resuming(&volume, 1, &progress);
        for event in [
            Event::Begin { from: old, from_pid: process.pid, soak_ms: 0, rollback: false },
            Event::Staged { to: build("/new") },
            Event::Standby { to_pid: 1 },
            Event::Handover,
        ] {
            actor.record(event).unwrap();
        }
        (volume, interface)
    }

    /// The upgrades whose begin and whose end the journal has, in order.
    fn journalled(volume: &Volume) -> Vec<(u64, Option<Outcome>)> {
        let entry = |entry: journal::Entry| match entry.event {
            Event::Begin { .. } => Some((entry.upgrade, None)),
            Event::End { outcome, .. } => Some((entry.upgrade, Some(outcome))),
            _ => None,
        };
        read_journal(volume).unwrap().into_iter().filter_map(entry).collect()
    }

    /// To a program that is not there.
    fn another(volume: &Arc<Volume>) -> Error {
        let core = volume.paths.state.join("none");
        let wish = Wish { core: &core, handover: Handover::Carry, limits: Limits::default(), rollback: false };
        upgrade(volume, wish, &Progress::silent()).unwrap_err()
    }

    /// beyond 1: an upgrade that has no end on record is given one before another one begins, in the same life of the control module too.
    #[test]
    fn an_upgrade_without_an_end_has_one_before_the_next_begins() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, _interface) = left(dir.path());
        another(&volume);
        let aborted = Some(Outcome::Aborted);
        assert_eq!(journalled(&volume), [(1, None), (1, aborted), (2, None), (2, aborted)]);

        let dir = tempfile::tempdir().unwrap();
        let (volume, _interface) = left(dir.path());
        rollback(&volume, &Progress::silent()).unwrap_err();
        assert_eq!(journalled(&volume), [(1, None), (1, aborted)], "there is no core to go back to");
    }

    /// beyond 1: only the journal lacks the end. It is written there, and nothing is done again.
    #[test]
    fn an_end_that_is_known_is_journalled_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, interface) = left(dir.path());
        let mut report = report(&volume);
        report.outcome = Some(Outcome::RolledBack);
        volume.update(|record| record.unfinished = Some(report.clone())).unwrap();
        another(&volume);
        assert_eq!(journalled(&volume)[..2], [(1, None), (1, Some(Outcome::RolledBack))]);
        assert_eq!((volume.record().last_upgrade, volume.record().unfinished), (Some(report), None));
        assert!(interface.asked().is_empty());
    }

    fn report(volume: &Volume) -> LastUpgrade {
        let mut report = LastUpgrade::new(volume.name.to_string(), 1, "1.0".to_owned());
        report.steps = vec![everdisk_upgrade::report::StepTime::new(Step::Standby, 1)];
        report
    }

    /// beyond 1: everdiskd ended after it had journalled the end and before it had recorded it.
    #[test]
    fn what_is_kept_of_an_upgrade_that_has_ended_is_filed_and_of_any_other_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, _interface) = left(dir.path());
        let end = Event::End { outcome: Outcome::RolledBack, reason: Some("why".to_owned()) };
        Actor::resuming(&volume, 1, &Progress::silent()).record(end).unwrap();
        let kept = report(&volume);
        volume.update(|record| record.unfinished = Some(kept.clone())).unwrap();
        resume_unfinished(&volume).unwrap();
        let filed = LastUpgrade { outcome: Some(Outcome::RolledBack), reason: Some("why".to_owned()), ..kept.clone() };
        assert_eq!((volume.record().last_upgrade, volume.record().unfinished), (Some(filed.clone()), None));
        let stranger = LastUpgrade { upgrade: 2, outcome: Some(Outcome::Committed), ..kept };
        volume.update(|record| record.unfinished = Some(stranger)).unwrap();
        resume_unfinished(&volume).unwrap();
        assert_eq!((volume.record().last_upgrade, volume.record().unfinished), (Some(filed), None));
    }

    /// beyond 1: no upgrade hides one whose end cannot be recorded.
    #[test]
    fn no_upgrade_begins_while_the_end_of_the_one_before_cannot_be_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, _interface) = left(dir.path());
        volume.update(|record| record.unfinished = Some(report(&volume))).unwrap();
        let record = volume.paths.record();
        std::fs::remove_file(&record).unwrap();
        std::fs::create_dir_all(record.join("in the way")).unwrap();
        let refused = another(&volume);
        assert!(matches!(refused, Error::Unfinished { upgrade: 1, .. }), "{refused:?}");
        let told = refused.to_string();
        let remedy = format!("see to it that {} can be written", volume.paths.state.display());
        assert!(told.contains("upgrade 1 of volume v has no end on record") && told.contains(&remedy), "{told}");
        assert!(journalled(&volume).iter().all(|(upgrade, _)| *upgrade == 1));
        assert!(
            matches!(another(&volume), Error::Unfinished { upgrade: 1, .. }),
            "the journal has its end now, the record has not"
        );
        assert!(volume.operations.running().is_none());
    }
}
