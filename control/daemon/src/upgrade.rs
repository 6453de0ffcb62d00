//! Upgrades of a volume's core.

mod ending;
mod plan;
mod rollback;
mod unfinished;

use std::{path::Path, sync::Arc};

use everdisk_api::{Handover, LastUpgrade, operation::OperationName};
use everdisk_proto::{
    frame::GateState,
    identity::Build,
    journal::{self, Outcome},
};
use everdisk_upgrade::{
    run::{Ended, Plan, run},
    step::Limits,
    unfinished::next_number,
};

use self::{
    ending::{failed, tell},
    unfinished::settle,
};
pub use self::{plan::plan, rollback::rollback, unfinished::resume_unfinished};
use crate::{
    actor::Actor,
    durable,
    error::{Doing, Error, Result},
    progress::Progress,
    volume::{Operation, Volume},
};

/// What the operator asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// The new program.
    pub core: &'a Path,
    /// What happens to buffered data.
    pub handover: Handover,
    /// How long it may take.
    pub limits: Limits,
    /// It goes back to the build before the last committed upgrade.
    pub rollback: bool,
}

/// Upgrades a volume's core.
///
/// # Errors
/// [`Error::Upgrade`] when it was not committed, with the report; else why it could not begin.
pub fn upgrade(volume: &Arc<Volume>, wish: Wish<'_>, progress: &Progress) -> Result<LastUpgrade> {
    let (operation, _) = begin(volume, OperationName::Upgrade, progress)?;
    // The operator wants the core before, and asked while the upgrade that was left was resumed.
    if volume.operations.rollback_wanted() {
        return Err(Error::State(format!(
            "the upgrade of {0} was called off by a rollback before it began: see `everdisk status {0}`",
            volume.name
        )));
    }
    let report = perform(volume, &operation, wish, progress)?;
    if report.outcome == Some(Outcome::Committed) && report.reason.is_none() {
        return Ok(report);
    }
    Err(failed(volume, report))
}

/// Takes the volume for an upgrade or a rollback. What is without an end is resumed first: the journal tells of the last upgrade alone, so
/// another one would have it forgotten. The report of what was resumed, if anything was.
fn begin(volume: &Arc<Volume>, name: OperationName, progress: &Progress) -> Result<(Operation, Option<LastUpgrade>)> {
    let operation = volume.begin(name)?;
    // A pass of the supervisor that began before the operation has to end first.
    drop(volume.supervision.hands());
    let ended = settle(volume, name, progress)?;
    Ok((operation, ended))
}

/// The checks before the first step: which core serves, and that nothing forbids an upgrade now.
fn ready(volume: &Volume) -> Result<(Build, u32)> {
    volume.attached()?;
    let current = volume.current()?;
    let status = volume.interface().status()?;
    let refused = |why: &str| Err(Error::State(format!("volume {} cannot be upgraded now: {why}", volume.name)));
    match (status.gate, status.serving) {
        (GateState::Serving, Some(pid)) => Ok((current, pid)),
        (GateState::Suspended, _) => refused(&format!("it is suspended; `everdisk resume {}` first", volume.name)),
        _ => refused("no core serves; wait until `everdisk status` says serving"),
    }
}

fn perform(volume: &Arc<Volume>, _operation: &Operation, wish: Wish<'_>, progress: &Progress) -> Result<LastUpgrade> {
    let (from, from_pid) = ready(volume)?;
    let records = read_journal(volume)?;
    let number = next_number(&records);
    let report = LastUpgrade::new(volume.name.to_string(), number, from.identity.version.clone());
    let plan = Plan { from, from_pid, handover: wish.handover, limits: wish.limits, rollback: wish.rollback };
    let mut actor = Actor::new(volume, number, wish.core, progress);
    actor.rollback = wish.rollback;
    let ended = run(&mut actor, &plan, report);
    let mut answer = ended.answer();
    tell(volume, &answer);
    if let Err(e) = remember(volume, &ended, false) {
        answer.add_reason(format!("its end could not be recorded: {e}"));
    }
    Ok(answer)
}

/// Records how an upgrade ended. Where the journal does not say it too, the upgrade is resumed from what is recorded here. `started`: the
/// journal has a new core; the report of an upgrade that was resumed may lack the steps.
fn remember(volume: &Volume, ended: &Ended, started: bool) -> Result<()> {
    let report = &ended.report;
    volume.update(|record| {
        if report.outcome.is_some() && (started || !report.was_refused()) {
            record.last_upgrade = Some(report.clone());
        }
        record.unfinished = (!ended.is_journalled()).then(|| report.clone());
    })
}

/// The journal; one that is not there has no entries.
fn read_journal(volume: &Volume) -> Result<Vec<journal::Entry>> {
    let path = volume.paths.journal();
    let text = durable::read(&path).doing(|| format!("read {}", path.display()))?.unwrap_or_default();
    let parsed = journal::parse(&text)
        .map_err(|e| Error::Failed(format!("{e}: move {} away to upgrade this volume", path.display())));
    volume.findings.set_warning(parsed.as_ref().err().map(ToString::to_string));
    parsed
}

#[cfg(test)]
mod tests {
    use everdisk_proto::identity::Identity;
    use everdisk_upgrade::{act::Fault, report::StepTime, step::Step};

    use super::*;
    use crate::volume::tests::volume;

    /// beyond 1: the record has the last upgrade that ended, and what is known of one whose end the journal lacks.
    #[test]
    fn an_end_that_is_not_journalled_is_kept_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let mut report = LastUpgrade::new("v".to_owned(), 1, "1.0".to_owned());
        report.outcome = Some(Outcome::Aborted);
        let ended = |report: &LastUpgrade, is_journalled: bool| Ended {
            report: report.clone(),
            unjournalled: (!is_journalled).then(|| Fault("full".to_owned())),
        };
        remember(&volume, &ended(&report, true), false).unwrap();
        assert_eq!(volume.record().last_upgrade, None, "it was refused before it began");
        remember(&volume, &ended(&report, true), true).unwrap();
        assert_eq!(volume.record().last_upgrade, Some(report.clone()), "a new core was started");
        report.steps.push(StepTime::new(Step::Standby, 1));
        remember(&volume, &ended(&report, false), false).unwrap();
        let known = Some(report.clone());
        assert_eq!((volume.record().last_upgrade, volume.record().unfinished), (known.clone(), known.clone()));
        remember(&volume, &ended(&report, true), false).unwrap();
        assert_eq!((volume.record().last_upgrade, volume.record().unfinished), (known, None));
    }

    /// Of a core that adopts these versions of the write buffer.
    pub(super) fn identity(buffer: &str) -> Identity {
        let abi = everdisk_proto::version::ABI;
        Identity::parse(&format!("everdisk-core 1.0 (abi {abi}..{abi}, buffer {buffer})")).unwrap()
    }
}
