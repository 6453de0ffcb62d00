//! The way back to the core before.

use std::{sync::Arc, time::Duration};

use everdisk_api::{Handover, LastUpgrade, operation::OperationName};
use everdisk_proto::{
    identity::Identity,
    journal::{self, Outcome},
    limits::{FLUSH_LIMIT_DEFAULT, PAUSE_BUDGET_DEFAULT},
};
use everdisk_upgrade::{step::Limits, unfinished::unfinished};

use super::{Wish, begin, ending::failed, perform, read_journal, ready, unfinished::started};
use crate::{
    actor,
    error::{Error, Result},
    progress::Progress,
    volume::Volume,
};

/// Goes back to the core before: by ending an upgrade that soaks, else by an upgrade to the previous program.
///
/// # Errors
/// The old version does not serve.
pub fn rollback(volume: &Arc<Volume>, progress: &Progress) -> Result<LastUpgrade> {
    let before = volume.record().last_upgrade;
    if volume.operations.want_rollback() {
        progress.step("wait for the upgrade that runs");
        volume.operations.wait_end_of(OperationName::Upgrade);
        return called_off(volume, before.as_ref());
    }
    let (operation, ended) = begin(volume, OperationName::Rollback, progress)?;
    if let Some(report) = ended.filter(went_back) {
        return Ok(report);
    }
    let record = volume.record();
    let previous = record.previous.ok_or_else(|| no_earlier(volume, record.last_upgrade.as_ref()))?;
    let wish = Wish {
        core: &previous.program,
        handover: way_back(volume, &previous.identity)?,
        limits: Limits {
            pause_budget: PAUSE_BUDGET_DEFAULT,
            // The core that is gone back to is known; there is no better one to go back to from it.
            soak: Duration::ZERO,
            flush: FLUSH_LIMIT_DEFAULT,
        },
        rollback: true,
    };
    let report = perform(volume, &operation, wish, progress)?;
    match report.outcome {
        Some(Outcome::Committed) => Ok(report),
        _ => Err(failed(volume, report)),
    }
}

/// How an upgrade ended that was to be stopped; `before` is the one that was on record before it.
fn called_off(volume: &Volume, before: Option<&LastUpgrade>) -> Result<LastUpgrade> {
    let state = |why: String| Err(Error::State(format!("the upgrade of {} {why}", volume.name)));
    let again = format!("`everdisk rollback {}` again", volume.name);
    let records = read_journal(volume)?;
    if unfinished(&records).is_some() {
        return state(format!("could not be given an end: see `everdisk status {}`, then {again}", volume.name));
    }
    match volume.record().last_upgrade.filter(|ended| Some(ended) != before) {
        Some(report) if went_back(&report) => Ok(report),
        Some(report) if report.rollback => Err(failed(volume, report)),
        Some(_) => state(format!("had committed before it could be stopped: {again}")),
        None if is_unrecorded(&records, before) => state(format!(
            "has ended, and how is in the journal alone: see to it that {} can be written (space, permissions) and which core serves \
             (`everdisk status {}`), then {again} if the core before does not",
            volume.paths.state.display(),
            volume.name
        )),
        None => state(format!(
            "had been refused before it began anything: {again} to go back to the build before the last committed upgrade"
        )),
    }
}

/// Whether the journal has an upgrade that started a new core after `last`, the last one on record.
fn is_unrecorded(records: &[journal::Entry], last: Option<&LastUpgrade>) -> bool {
    records
        .last()
        .is_some_and(|entry| last.is_none_or(|last| last.upgrade < entry.upgrade) && started(records, entry.upgrade))
}

/// Whether the build before serves again: an upgrade was stopped, or a rollback was not.
fn went_back(report: &LastUpgrade) -> bool {
    match report.outcome {
        Some(Outcome::Committed) => report.rollback,
        Some(Outcome::RolledBack | Outcome::Aborted) => !report.rollback,
        None => false,
    }
}

/// Why there is no build to go back to.
fn no_earlier(volume: &Volume, last: Option<&LastUpgrade>) -> Error {
    let why = match last {
        None => "it was never upgraded".to_owned(),
        Some(last) if last.rollback && last.outcome == Some(Outcome::Committed) => format!(
            "it was rolled back from {} to {} already, and twice would not be forward again: to upgrade, give the program with `everdisk \
             upgrade {} --core FILE`",
            last.from,
            last.to.as_deref().unwrap_or("the build before"),
            volume.name
        ),
        Some(_) => "none of its upgrades was committed since it was attached first or rolled back".to_owned(),
    };
    Error::State(format!("volume {} has no earlier core to go back to: {why}", volume.name))
}

/// The quickest way on which nothing is lost: what is buffered stays where it is, unless the core that is gone back to does
/// not know the write buffer.
fn way_back(volume: &Volume, to: &Identity) -> Result<Handover> {
    let (from, _) = ready(volume)?;
    let buffer = actor::buffer(&volume.interface().status()?, &from.identity);
    let known = buffer.is_none_or(|buffer| buffer.obstacle(to).is_none());
    Ok(if known { Handover::Carry } else { Handover::Flush })
}

#[cfg(test)]
mod tests {
    use everdisk_proto::{identity::Build, journal::Event};
    use everdisk_upgrade::act::Act;

    use super::*;
    use crate::{actor::Actor, fake, upgrade::tests::identity, volume::tests::volume};

    /// beyond 5: an upgrade whose end is in the journal and not on record was not refused.
    #[test]
    fn a_rollback_says_how_the_upgrade_that_it_was_to_stop_ended() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let progress = Progress::silent();
        let build = Build { program: "/old".into(), identity: identity("0..2"), digest: None };
        let begin = Event::Begin { from: build, from_pid: 1, soak_ms: 0, rollback: false };
        let end = Event::End { outcome: Outcome::Committed, reason: None };
        let told = |before| called_off(&volume, before).unwrap_err().to_string();
        let refused = "had been refused before it began anything";
        assert!(told(None).contains(refused));
        let mut actor = Actor::resuming(&volume, 1, &progress);
        actor.record(begin.clone()).unwrap();
        assert!(told(None).contains("could not be given an end"));
        actor.record(end.clone()).unwrap();
        assert!(told(None).contains(refused));
        let mut actor = Actor::resuming(&volume, 2, &progress);
        [begin, Event::Standby { to_pid: 2 }, end].into_iter().for_each(|event| actor.record(event).unwrap());
        let told = told(None);
        assert!(told.contains("in the journal alone") && told.contains("can be written"), "{told}");
        let mut report = LastUpgrade::new("v".to_owned(), 2, "1.0".to_owned());
        for (outcome, rollback, words) in [
            (Outcome::Committed, false, Some("had committed before it could be stopped")),
            (Outcome::Committed, true, None),
            (Outcome::RolledBack, false, None),
            (Outcome::Aborted, false, None),
            (Outcome::Aborted, true, Some("was aborted")),
        ] {
            (report.outcome, report.rollback) = (Some(outcome), rollback);
            volume.update(|record| record.last_upgrade = Some(report.clone())).unwrap();
            let told = called_off(&volume, None).err().map(|e| e.to_string());
            match (told, words) {
                (Some(told), Some(words)) => assert!(told.contains(words), "{told}"),
                (told, words) => assert_eq!(told.as_deref(), words),
            }
            assert!(
                called_off(&volume, Some(&report)).unwrap_err().to_string().contains(refused),
                "it was there before"
            );
        }
    }

    #[test]
    fn the_way_back_is_by_carry_where_the_core_before_adopts_the_write_buffer() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let interface = fake::Interface::start(&volume);
        interface.set(|status| status.serving = Some(7));
        let from = Build { program: "/new".into(), identity: identity("0..2"), digest: None };
        volume.update(|record| record.current = Some(from)).unwrap();
        assert_eq!(way_back(&volume, &identity("0..0")).unwrap(), Handover::Carry);
        interface.set(|status| status.buffer = Some(fake::buffer(4096)));
        assert_eq!(way_back(&volume, &identity("0..0")).unwrap(), Handover::Flush);
        assert_eq!(way_back(&volume, &identity("1..2")).unwrap(), Handover::Carry);
    }
}
