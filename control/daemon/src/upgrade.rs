//! Upgrade, its plan, rollback, and resuming what an earlier control module left unfinished.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use everdisk_api::{
    Handover, LastUpgrade,
    operation::OperationName,
    status::{PlannedStep, UpgradePlan},
};
use everdisk_proto::{
    frame::GateState,
    identity::{Build, Component, Identity},
    journal::{self, Outcome},
    limits::{FLUSH_LIMIT_DEFAULT, PAUSE_BUDGET_DEFAULT},
};
use everdisk_telemetry::event;
use everdisk_upgrade::{
    act::Act,
    run::{Plan, resume, run},
    step::{Limits, RULES, Step},
    unfinished::{Unfinished, next_number, unfinished},
};
use tracing::{info, warn};

use crate::{
    actor::{self, Actor},
    durable,
    error::{Doing, Error, Result},
    nodes,
    origin::Source,
    programs,
    progress::Progress,
    stage,
    volume::{Operation, Volume},
};

/// A version line comes within this time.
const VERSION_WITHIN: Duration = Duration::from_secs(5);

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
    let operation = volume.begin(OperationName::Upgrade)?;
    let report = perform(volume, &operation, wish, progress)?;
    if report.outcome == Some(Outcome::Committed) && report.reason.is_none() {
        return Ok(report);
    }
    Err(failed(report))
}

fn failed(report: LastUpgrade) -> Error {
    let version = report.to.as_deref().unwrap_or("the new core");
    let reason = report.reason.as_deref().unwrap_or("no reason is known");
    let message = match report.outcome {
        Some(Outcome::RolledBack) => {
            format!("the upgrade of {} to {version} was rolled back, {} serves: {reason}", report.volume, report.from)
        }
        Some(Outcome::Aborted) => {
            format!("the upgrade of {} was aborted, {} has served all the time: {reason}", report.volume, report.from)
        }
        Some(Outcome::Committed) | None => {
            format!("{version} serves volume {}, but not everything succeeded: {reason}", report.volume)
        }
    };
    Error::Upgrade { message, report: Box::new(report) }
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
    // A pass of the supervisor that began before the operation has to end first.
    drop(volume.hands.lock());
    let (from, from_pid) = ready(volume)?;
    let records = read_journal(volume)?;
    let number = next_number(&records);
    let report = LastUpgrade::new(volume.name.to_string(), number, from.identity.version.clone());
    let plan = Plan { from, from_pid, handover: wish.handover, limits: wish.limits, rollback: wish.rollback };
    let mut actor = Actor::new(volume, number, wish.core, progress);
    actor.rollback = wish.rollback;
    let report = run(&mut actor, &plan, report);
    remember(volume, &report)?;
    Ok(report)
}

fn remember(volume: &Volume, report: &LastUpgrade) -> Result<()> {
    tell(volume, report);
    volume.update(|record| {
        if report.outcome.is_none() {
            // The journal has no end either: it is taken up again.
            record.unfinished = Some(report.clone());
            return;
        }
        if !report.was_refused() {
            record.last_upgrade = Some(report.clone());
        }
        record.unfinished = None;
    })
}

/// The line at the end of an upgrade.
fn tell(volume: &Volume, report: &LastUpgrade) {
    let (name, upgrade, from) = (&volume.name, report.upgrade, &report.from);
    let to = report.to.as_deref().unwrap_or("-");
    let reason = report.reason.as_deref().unwrap_or("no reason is known");
    let suspended_us = report.suspended_us;
    match report.outcome {
        Some(Outcome::Committed) if report.reason.is_none() => info!(
            event = event::UPGRADE_ENDED, volume = %name, upgrade, outcome = "committed", from, to, suspended_us,
            "the new core serves"
        ),
        Some(Outcome::Committed) => warn!(
            event = event::UPGRADE_ENDED, volume = %name, upgrade, outcome = "committed", from, to, reason,
            "the new core serves, and yet not everything went as it should"
        ),
        Some(Outcome::RolledBack) => warn!(
            event = event::UPGRADE_ENDED, volume = %name, upgrade, outcome = "rolled-back", from, to, reason,
            "the old core serves again"
        ),
        Some(Outcome::Aborted) => warn!(
            event = event::UPGRADE_ENDED, volume = %name, upgrade, outcome = "aborted", from, to, reason,
            "the old core has served all the time"
        ),
        None => warn!(
            event = event::UPGRADE_ENDED, volume = %name, upgrade, outcome = "unfinished", from, to, reason,
            "the upgrade has no end yet and is taken up when the control module is started"
        ),
    }
}

fn read_journal(volume: &Volume) -> Result<Vec<journal::Entry>> {
    let path = volume.paths.journal();
    let text = durable::read(&path).doing(|| format!("read {}", path.display()))?.unwrap_or_default();
    let parsed = journal::parse(&text)
        .map_err(|e| Error::Failed(format!("{e}: move {} away to upgrade this volume", path.display())));
    volume.set_warning(parsed.as_ref().err().map(ToString::to_string));
    parsed
}

/// Checks what can be checked without changing anything, and says what would be done.
///
/// # Errors
/// What would make the upgrade fail.
pub fn plan(volume: &Arc<Volume>, wish: Wish<'_>) -> Result<UpgradePlan> {
    let mut plan = planned(volume, wish)?;
    plan.checks.push(nodes_and_directories(volume, wish.core)?);
    Ok(plan)
}

fn planned(volume: &Arc<Volume>, wish: Wish<'_>) -> Result<UpgradePlan> {
    let (from, pid) = ready(volume)?;
    let number = next_number(&read_journal(volume)?);
    let source = Source::open_trusted(wish.core)?;
    let identity = programs::identify(Component::Core, &source.in_proc(), wish.core, VERSION_WITHIN)?;
    let abi = stage::segment_abi(volume, &volume.interface().status()?)?;
    programs::serves(&identity, abi)?;
    let (policy, buffer) = check_buffer(volume, &from, &identity, wish.handover)?;
    let checks = vec![
        format!("volume {} serves (process {pid}, version {})", volume.name, from.identity.version),
        format!("{} is {identity}", wish.core.display()),
        format!("its ABI range {} holds the ABI of the volume's segment, {abi}", identity.abi),
        buffer,
        policy,
        format!("the journal is sound; this would be upgrade {number}"),
    ];
    let left_out = (wish.handover == Handover::Carry).then_some(Step::Flush);
    let steps = RULES.iter().filter(|rule| Some(rule.step) != left_out).map(|rule| PlannedStep {
        step: rule.step.name().to_owned(),
        deadline_ms: u64::try_from(rule.limit.of(&wish.limits).as_millis()).unwrap_or(u64::MAX),
        reversible: rule.reversible(),
        undo: rule.undo.text().to_owned(),
    });
    Ok(UpgradePlan {
        volume: volume.name.to_string(),
        from: from.identity.version,
        to: identity.version,
        handover: wish.handover,
        checks,
        steps: steps.collect(),
    })
}

/// What the steps would need: a standby opens every node anew, the program is copied into the state directory, and records are made
/// durable there.
///
/// # Errors
/// What is in the way.
fn nodes_and_directories(volume: &Volume, core: &Path) -> Result<String> {
    nodes::check_serve(volume)
        .map_err(|e| Error::Failed(format!("a new core could not open the storage nodes: {e}")))?;
    let bytes = std::fs::metadata(core).doing(|| format!("read the core program {}", core.display()))?.len();
    for (directory, bytes) in [(&volume.paths.state, bytes), (&volume.paths.run, 0)] {
        durable::check_room(directory, bytes).map_err(|e| {
            Error::Failed(format!(
                "{} of volume {} has no room for {} bytes and a record, or cannot be written: {e}; make room there",
                directory.display(),
                volume.name,
                bytes
            ))
        })?;
    }
    Ok("every storage node can be opened anew, and the state directory has room for the program".to_owned())
}

/// What the policy would do, and the lines of the plan that say it.
///
/// # Errors
/// The new core would have to adopt the write buffer, and cannot.
fn check_buffer(volume: &Volume, from: &Build, to: &Identity, handover: Handover) -> Result<(String, String)> {
    let Some(buffer) = actor::buffer(&volume.interface().status()?, &from.identity) else {
        let policy = match handover {
            Handover::Flush => "hand-over by flush: what was acknowledged is made durable first",
            Handover::Carry => "hand-over by carry: without a flush",
        };
        return Ok((policy.to_owned(), "the volume has no write buffer".to_owned()));
    };
    let found = match buffer.obstacle(to) {
        None => format!("the write buffer has version {}, and both cores adopt it", buffer.version),
        Some(why) if handover == Handover::Carry => {
            return Err(Error::Failed(format!("{why}, so it cannot be carried over: use --handover flush")));
        }
        Some(why) => format!("{why}: it has to be empty, and a flush that fails stops the upgrade"),
    };
    let bytes = buffer.bytes;
    Ok(match handover {
        Handover::Flush => {
            (format!("hand-over by flush: {bytes} buffered bytes are sent to the storage nodes first"), found)
        }
        Handover::Carry => (format!("hand-over by carry: {bytes} buffered bytes go over as they are"), found),
    })
}

/// Goes back to the core before: by ending an upgrade that soaks, else by an upgrade to the previous program.
///
/// # Errors
/// The old version does not serve.
pub fn rollback(volume: &Arc<Volume>, progress: &Progress) -> Result<LastUpgrade> {
    if volume.running().is_some_and(|running| running.name == OperationName::Upgrade) {
        let before = volume.record().last_upgrade;
        volume.rollback_wanted.store(true, Ordering::Relaxed);
        progress.step("wait for the upgrade that runs");
        volume.wait_end_of(OperationName::Upgrade);
        let ended = volume.record().last_upgrade;
        if ended == before {
            return Err(Error::State(format!(
                "the upgrade of {0} had been refused before it began anything: `everdisk rollback {0}` again to go back to the build before \
                 the last committed upgrade",
                volume.name
            )));
        }
        return match ended {
            Some(report) if matches!(report.outcome, Some(Outcome::RolledBack | Outcome::Aborted)) => Ok(report),
            _ => Err(Error::State(format!(
                "the upgrade of {0} had committed before it could be stopped: `everdisk rollback {0}` again",
                volume.name
            ))),
        };
    }
    let operation = volume.begin(OperationName::Rollback)?;
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
        _ => Err(failed(report)),
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
    use crate::{fake, status::status, volume::tests::volume};

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

    fn identity(buffer: &str) -> Identity {
        let abi = everdisk_proto::version::ABI;
        Identity::parse(&format!("everdisk-core 1.0 (abi {abi}..{abi}, buffer {buffer})")).unwrap()
    }

    #[test]
    fn a_plan_says_the_policy_and_whether_the_new_core_adopts_the_write_buffer() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let interface = fake::Interface::start(&volume);
        interface.set(|status| status.serving = Some(7));
        let from = Build { program: "/old".into(), identity: identity("0..2"), digest: None };
        volume.update(|record| record.current = Some(from)).unwrap();
        let planned = |buffer: &str, handover| {
            let core = dir.path().join(buffer);
            std::fs::write(&core, format!("#!/bin/sh\necho '{}'\n", identity(buffer))).unwrap();
            std::fs::set_permissions(&core, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            let limits = Limits { flush: Duration::from_secs(7), ..Limits::default() };
            planned(&volume, Wish { core: &core, handover, limits, rollback: false })
        };
        let has = |plan: &UpgradePlan, word: &str| plan.checks.iter().any(|check| check.contains(word));
        let without = planned("0..0", Handover::Carry).unwrap();
        assert!(has(&without, "no write buffer") && without.handover == Handover::Carry);
        interface.set(|status| status.buffer = Some(fake::buffer(4096)));
        let flush = planned("0..2", Handover::Flush).unwrap();
        assert!(has(&flush, "version 2, and both cores adopt it") && has(&flush, "4096 buffered bytes are sent"));
        let step = flush.steps.iter().find(|step| step.step == "flush").unwrap();
        assert_eq!((step.deadline_ms, step.undo.as_str()), (7000, "writes are buffered again"));
        let carry = planned("0..2", Handover::Carry).unwrap();
        assert!(has(&carry, "4096 buffered bytes go over") && carry.steps.iter().all(|step| step.step != "flush"));
        assert!(has(&planned("0..0", Handover::Flush).unwrap(), "adopts 0..0: it has to be empty"));
        let refused = planned("0..0", Handover::Carry).unwrap_err().to_string();
        assert!(refused.contains("use --handover flush"), "{refused}");
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
