//! Upgrades that were left without an end.

use std::{io, sync::Arc, thread};

use everdisk_api::{LastUpgrade, operation::OperationName};
use everdisk_proto::{
    identity::Build,
    journal::{self, Outcome},
};
use everdisk_upgrade::{
    act::Act,
    run::{Ended, resume},
    unfinished::{Unfinished, unfinished},
};
use tracing::{info, warn};

use super::{ending::tell, read_journal, ready, remember};
use crate::{
    actor::Actor,
    durable,
    error::{Doing, Error, Result},
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
    let name = if left.rollback { OperationName::Rollback } else { OperationName::Upgrade };
    // A detach that was interrupted has the volume; the next upgrade resumes this one.
    let Ok(operation) = volume.begin(name) else { return Ok(()) };
    let volume = Arc::clone(volume);
    thread::Builder::new().name(format!("upgrade-{}", volume.name)).spawn(move || {
        let progress = Progress::silent();
        let mut actor = Actor::resuming(&volume, left.upgrade, &progress);
        if let Err(e) = finish(&volume, &left, &mut actor) {
            warn!(volume = %volume.name, "{e}");
        }
        drop(operation);
    })?;
    Ok(())
}

/// Gives the last upgrade its end, where it has none, before the operation `name`. Its report then: a rollback calls it off.
///
/// # Errors
/// [`Error::Unfinished`]: it cannot be given one now.
pub(super) fn settle(volume: &Arc<Volume>, name: OperationName, progress: &Progress) -> Result<Option<LastUpgrade>> {
    let records = read_journal(volume)?;
    let stuck = |upgrade: u64, why: String, remedy: String| Error::Unfinished {
        volume: volume.name.to_string(),
        upgrade,
        why,
        remedy,
    };
    let make_room = || format!("see to it that {} can be written (space, permissions)", volume.paths.state.display());
    let Some(left) = unfinished(&records) else {
        let Some(kept) = volume.record().unfinished else { return Ok(None) };
        return match file_kept(volume, &records) {
            Ok(()) => Ok(None),
            Err(e) => Err(stuck(kept.upgrade, e.to_string(), make_room())),
        };
    };
    if volume.attachment().is_some() {
        ready(volume)?;
    }
    progress.step(&format!("resume upgrade {}", left.upgrade));
    let mut actor = Actor::resuming(volume, left.upgrade, progress);
    actor.called_off = name == OperationName::Rollback;
    let ended = match finish(volume, &left, &mut actor) {
        Err(e) => return Err(stuck(left.upgrade, e.to_string(), make_room())),
        Ok(ended) if ended.is_journalled() => return Ok(Some(ended.report)),
        Ok(ended) => ended,
    };
    let remedy = if ended.unjournalled.is_some() || volume.files.record_trouble().is_some() {
        make_room()
    } else {
        format!("wait until `everdisk status {}` says serving", volume.name)
    };
    let why = ended.answer().reason.expect("an upgrade that was not given an end says why");
    Err(stuck(left.upgrade, why, remedy))
}

/// Files what is kept of an upgrade beside the journal: where the journal has its end, it is the last upgrade that ended, unless it was
/// refused before it began. Nothing stays that could be taken for what is known of the next upgrade.
fn file_kept(volume: &Volume, records: &[journal::Entry]) -> Result<()> {
    volume.update(|record| {
        let Some(mut kept) = record.unfinished.take() else { return };
        let end = records.iter().rev().find_map(|entry| match &entry.event {
            journal::Event::End { outcome, reason } if entry.upgrade == kept.upgrade => {
                Some((*outcome, reason.clone()))
            }
            _ => None,
        });
        let Some((outcome, reason)) = end else { return };
        (kept.outcome, kept.reason) = (Some(outcome), reason);
        if started(records, kept.upgrade) || !kept.was_refused() {
            record.last_upgrade = Some(kept);
        }
    })
}

/// Whether the journal has a new core of this upgrade.
pub(super) fn started(records: &[journal::Entry], upgrade: u64) -> bool {
    records.iter().any(|entry| entry.upgrade == upgrade && matches!(entry.event, journal::Event::Standby { .. }))
}

/// Gives an upgrade its end: by what is known of it, by resuming it, or, where nothing of it can run any more, by what is on record.
///
/// # Errors
/// Nothing was done or recorded, because the state directory cannot be written; or its end is not recorded.
fn finish(volume: &Arc<Volume>, left: &Unfinished, actor: &mut Actor<'_>) -> Result<Ended> {
    info!(volume = %volume.name, upgrade = left.upgrade, "an upgrade without an end is resumed");
    // What cannot be recorded is not begun: the gate would change hands for nothing.
    let state = &volume.paths.state;
    durable::check_room(state, 0).doing(|| format!("write to {}", state.display()))?;
    // After an attempt that failed, the file may name a program that this process does not know to be on record.
    volume.files.rewrite_record()?;
    let record = volume.record();
    let report = record
        .unfinished
        .filter(|kept| kept.upgrade == left.upgrade)
        .unwrap_or_else(|| LastUpgrade::new(volume.name.to_string(), left.upgrade, left.from.identity.version.clone()));
    let report = LastUpgrade { rollback: left.rollback, ..report };
    actor.rollback = left.rollback;
    // A record that was begun anew names none.
    let current = record.current.unwrap_or_else(|| left.from.clone());
    let mut ended = if report.outcome.is_none() && volume.attachment().is_some() {
        resume(actor, left, &current, report)
    } else {
        let report = of_record(left, &current, report);
        let outcome = report.outcome.expect("what is on record gives it one");
        let end = journal::Event::End { outcome, reason: report.reason.clone() };
        Ended { unjournalled: actor.record(end).err(), report }
    };
    if ended.report.outcome.is_some() {
        // Else the program of the core that serves is not on record yet.
        stage::prune(volume);
    }
    tell(volume, &ended.answer());
    if let Err(e) = remember(volume, &ended, left.to_pid.is_some()) {
        // What a rollback wants is done and journalled: were it refused, the operator would repeat it, and it would go back further.
        if !(actor.called_off && ended.is_journalled()) {
            return Err(e);
        }
        ended.report.add_reason(format!("its end could not be recorded: {e}"));
    }
    Ok(ended)
}

/// How an upgrade ended of which nothing can run any more: as it is known, or by the program that is on record.
fn of_record(left: &Unfinished, current: &Build, mut report: LastUpgrade) -> LastUpgrade {
    if report.outcome.is_none() {
        let committed = left.to.as_ref() == Some(current);
        report.outcome = Some(if committed { Outcome::Committed } else { Outcome::Aborted });
        if !committed {
            report.add_reason("the volume was detached, or the machine restarted, before the upgrade ended".to_owned());
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use std::{
        path::Path,
        process::Command,
        time::{Duration, Instant},
    };

    use everdisk_api::Handover;
    use everdisk_proto::journal::Event;
    use everdisk_upgrade::step::{Limits, Step};

    use super::*;
    use crate::{
        child::Child,
        fake,
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
        let known = KnownCore { process, program: old.program, digest: None };
        volume.update_attachment(|attachment| attachment.cores.push(known)).unwrap();
        interface.set(|status| {
            status.serving = Some(process.pid);
            status.cores = vec![fake::core(process.pid, 0)];
        });
        begin(&volume, Duration::ZERO, false);
        go_on(&volume, 1);
        (volume, interface)
    }

    fn record(volume: &Arc<Volume>, events: impl IntoIterator<Item = Event>) {
        let progress = Progress::silent();
        let mut actor = Actor::resuming(volume, 1, &progress);
        events.into_iter().for_each(|event| actor.record(event).unwrap());
    }

    /// Enters upgrade 1 anew.
    fn begin(volume: &Arc<Volume>, soak: Duration, rollback: bool) {
        let soak_ms = u64::try_from(soak.as_millis()).unwrap();
        let begin = Event::Begin { from: build("/old"), from_pid: std::process::id(), soak_ms, rollback };
        record(volume, [begin, Event::Staged { to: build("/new") }]);
    }

    fn go_on(volume: &Arc<Volume>, to_pid: u32) {
        record(volume, [Event::Standby { to_pid }, Event::Handover]);
    }

    /// A process that does nothing, recorded as an armed core that serves.
    fn serves(volume: &Volume, interface: &fake::Interface, program: &str) -> ProcessId {
        let mut command = Command::new("sleep");
        command.arg("60");
        let process = Child::start(command, &volume.paths.core_log(0), || {}).unwrap().id;
        let known = KnownCore { process, program: program.into(), digest: None };
        volume.update_attachment(|attachment| attachment.cores.push(known)).unwrap();
        interface.set(|status| {
            status.serving = Some(process.pid);
            status.cores.push(fake::core(process.pid, 1));
        });
        process
    }

    /// The new core serves, and has long to soak still.
    fn soaking(root: &Path) -> (Arc<Volume>, fake::Interface, ProcessId) {
        let (volume, interface) = left(root);
        let new = serves(&volume, &interface, "/new");
        begin(&volume, Duration::from_secs(60), false);
        go_on(&volume, new.pid);
        (volume, interface, new)
    }

    fn block_record(volume: &Volume) {
        let record = volume.paths.record();
        std::fs::remove_file(&record).unwrap();
        std::fs::create_dir_all(record.join("in the way")).unwrap();
    }

    /// The upgrades whose begin and whose end the journal has, in order.
    fn journalled(volume: &Volume) -> Vec<(u64, Option<Outcome>)> {
        let entry = |entry: journal::Entry| match entry.event {
            Event::Begin { .. } => Some((entry.upgrade, None)),
            Event::End { outcome, .. } => Some((entry.upgrade, Some(outcome))),
            _ => None,
        };
        let mut found: Vec<_> = read_journal(volume).unwrap().into_iter().filter_map(entry).collect();
        found.dedup();
        found
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
        block_record(&volume);
        let refused = another(&volume);
        assert!(matches!(refused, Error::Unfinished { upgrade: 1, .. }), "{refused:?}");
        let told = refused.to_string();
        let remedy = format!("see to it that {} can be written", volume.paths.state.display());
        assert!(told.contains("upgrade 1 of volume v has no end on record") && told.contains(&remedy), "{told}");
        assert_eq!(journalled(&volume), [(1, None)]);
        record(&volume, [Event::End { outcome: Outcome::Aborted, reason: None }]);
        let refused = another(&volume).to_string();
        assert!(
            refused.contains("upgrade 1 of volume v") && refused.contains(&remedy),
            "the record lacks it: {refused}"
        );
        assert!(journalled(&volume).iter().all(|(upgrade, _)| *upgrade == 1));
        assert!(volume.operations.running().is_none());
    }

    /// beyond 5: what is wanted of a rollback is the core before the upgrade that was left, not the one before that.
    #[test]
    fn a_rollback_ends_the_upgrade_that_was_left_and_goes_no_further() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, interface) = left(dir.path());
        volume.update(|record| record.previous = Some(build("/before"))).unwrap();
        let report = rollback(&volume, &Progress::silent()).unwrap();
        let aborted = Some(Outcome::Aborted);
        assert_eq!((report.outcome, volume.record().last_upgrade), (aborted, Some(report)));
        assert_eq!(journalled(&volume), [(1, None), (1, aborted)]);
        assert!(interface.hand_overs().is_empty());

        let dir = tempfile::tempdir().unwrap();
        let (volume, interface, new) = soaking(dir.path());
        volume.update(|record| record.previous = Some(build("/before"))).unwrap();
        let began = Instant::now();
        let report = rollback(&volume, &Progress::silent()).unwrap();
        assert_eq!(report.outcome, Some(Outcome::RolledBack));
        assert_eq!(journalled(&volume), [(1, None), (1, report.outcome)]);
        assert_eq!(interface.hand_overs(), [std::process::id()], "to the core that was parked");
        assert!(!new.alive() && began.elapsed() < Duration::from_secs(30), "it is not soaked first");
    }

    /// beyond 5: a rollback whose end is in the journal and not on record is not repeated, for that would go back to the build before.
    #[test]
    fn a_rollback_that_is_journalled_and_not_recorded_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, interface, _new) = soaking(dir.path());
        volume.update(|record| record.previous = Some(build("/before"))).unwrap();
        let blocks = Arc::clone(&volume);
        let _old = fake::Core::start(&volume, std::process::id(), move |_| {
            block_record(&blocks);
            None
        });
        let report = rollback(&volume, &Progress::silent()).unwrap();
        assert_eq!(journalled(&volume), [(1, None), (1, Some(Outcome::RolledBack))]);
        assert!(report.reason.unwrap().contains("its end could not be recorded"));
        assert_eq!(interface.hand_overs(), [std::process::id()]);
    }

    /// beyond 5: a rollback that was left is the one that is wanted; where it failed, another one follows.
    #[test]
    fn a_rollback_that_was_left_is_ended_and_repeated_only_where_it_failed() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, _interface) = left(dir.path());
        begin(&volume, Duration::ZERO, true);
        go_on(&volume, 1);
        volume.update(|record| record.current = Some(build("/new"))).unwrap();
        let report = rollback(&volume, &Progress::silent()).unwrap();
        assert_eq!((report.outcome, report.rollback), (Some(Outcome::Committed), true));
        assert_eq!(journalled(&volume), [(1, None), (1, report.outcome)]);

        let dir = tempfile::tempdir().unwrap();
        let (volume, _interface) = left(dir.path());
        begin(&volume, Duration::ZERO, true);
        go_on(&volume, 1);
        volume.update(|record| record.previous = Some(build("/before"))).unwrap();
        rollback(&volume, &Progress::silent()).unwrap_err();
        let aborted = Some(Outcome::Aborted);
        assert_eq!(journalled(&volume), [(1, None), (1, aborted), (2, None), (2, aborted)]);
    }

    /// beyond 5: everdiskd resumes a rollback as one, so that another one waits its turn and does not undo it.
    #[test]
    fn a_rollback_that_is_resumed_at_the_start_is_not_called_off_by_another() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, interface, new) = soaking(dir.path());
        begin(&volume, Duration::from_secs(60), true);
        go_on(&volume, new.pid);
        resume_unfinished(&volume).unwrap();
        let refused = rollback(&volume, &Progress::silent()).unwrap_err();
        assert!(matches!(refused, Error::Busy { operation: "rollback", .. }), "{refused:?}");
        interface.set(|status| status.serving = Some(std::process::id()));
        volume.operations.wait_end_of(OperationName::Rollback);
        assert!(!new.alive());
    }

    /// beyond 5: the upgrade that would follow is called off too.
    #[test]
    fn a_rollback_during_the_resumption_calls_off_the_upgrade_that_waits_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, interface, _new) = soaking(dir.path());
        let (called_off, report) = thread::scope(|scope| {
            let upgrade = scope.spawn(|| another(&volume));
            while volume.operations.running().is_none() {
                thread::sleep(Duration::from_millis(1));
            }
            let report = rollback(&volume, &Progress::silent()).unwrap();
            (upgrade.join().unwrap(), report)
        });
        assert_eq!(report.outcome, Some(Outcome::RolledBack));
        assert!(matches!(&called_off, Error::State(why) if why.contains("was called off")), "{called_off:?}");
        assert_eq!(journalled(&volume), [(1, None), (1, report.outcome)]);
        assert_eq!(interface.hand_overs(), [std::process::id()]);
    }

    /// beyond 1: nothing changes hands, and no program goes, before it is known that it can be recorded.
    #[test]
    fn nothing_is_resumed_while_nothing_can_be_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, interface, new) = soaking(dir.path());
        // The file may name it, after a failed attempt to record it.
        let program = volume.paths.cores().join("7");
        durable::make_dir(&program).unwrap();
        block_record(&volume);
        let refused = rollback(&volume, &Progress::silent()).unwrap_err();
        assert!(matches!(refused, Error::Unfinished { .. }), "{refused:?}");
        assert!(interface.hand_overs().is_empty() && new.alive() && program.exists());
        new.end(Duration::ZERO);
    }

    /// beyond 1: where the core that serves is the trouble, the message does not speak of the disk, and it does not grow.
    #[test]
    fn the_remedy_is_for_what_is_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, interface) = left(dir.path());
        interface.set(|status| status.cores.clear());
        let stranger = serves(&volume, &interface, "/strange");
        let told = another(&volume).to_string();
        assert!(told.contains("wait until `everdisk status v` says serving"), "{told}");
        assert!(!told.contains("can be written"), "{told}");
        assert_eq!(another(&volume).to_string(), told);
        assert_eq!(journalled(&volume), [(1, None)]);
        stranger.end(Duration::ZERO);
    }

    /// What was refused before it began is not the last upgrade, also where its end came late.
    #[test]
    fn what_is_kept_of_an_upgrade_that_was_refused_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        begin(&volume, Duration::ZERO, false);
        record(&volume, [Event::End { outcome: Outcome::Aborted, reason: None }]);
        let kept = LastUpgrade { steps: Vec::new(), ..report(&volume) };
        volume.update(|record| record.unfinished = Some(kept.clone())).unwrap();
        resume_unfinished(&volume).unwrap();
        assert_eq!((volume.record().last_upgrade, volume.record().unfinished), (None, None));

        // One that was resumed tells of no step, and had started a new core.
        begin(&volume, Duration::ZERO, false);
        go_on(&volume, 1);
        record(&volume, [Event::End { outcome: Outcome::Aborted, reason: None }]);
        volume.update(|record| record.unfinished = Some(kept.clone())).unwrap();
        resume_unfinished(&volume).unwrap();
        let filed = LastUpgrade { outcome: Some(Outcome::Aborted), ..kept };
        assert_eq!((volume.record().last_upgrade, volume.record().unfinished), (Some(filed), None));
    }
}
