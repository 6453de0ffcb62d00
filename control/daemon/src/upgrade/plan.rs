//! What an upgrade would do, found out without changing anything.

use std::{path::Path, sync::Arc, time::Duration};

use everdisk_api::{
    Handover,
    status::{PlannedStep, UpgradePlan},
};
use everdisk_proto::identity::{Build, Component, Identity};
use everdisk_upgrade::{
    step::{RULES, Step},
    unfinished::{next_number, unfinished},
};

use super::{Wish, read_journal, ready};
use crate::{
    actor, durable,
    error::{Doing, Error, Result},
    nodes,
    origin::Source,
    programs,
    progress::milliseconds,
    stage,
    volume::Volume,
};

/// A version line comes within this time.
const VERSION_WITHIN: Duration = Duration::from_secs(5);

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
    let records = read_journal(volume)?;
    let number = next_number(&records);
    let source = Source::open_trusted(wish.core)?;
    let identity = programs::identify(Component::Core, &source.in_proc(), wish.core, VERSION_WITHIN)?;
    let abi = stage::segment_abi(volume, &volume.interface().status()?)?;
    programs::serves(&identity, abi)?;
    let (policy, buffer) = check_buffer(volume, &from, &identity, wish.handover)?;
    let mut checks = vec![
        format!("volume {} serves (process {pid}, version {})", volume.name, from.identity.version),
        format!("{} is {identity}", wish.core.display()),
        format!("its ABI range {} holds the ABI of the volume's segment, {abi}", identity.abi),
        buffer,
        policy,
        format!("the journal is sound; this would be upgrade {number}"),
    ];
    if let Some(left) = unfinished(&records) {
        checks.push(format!("upgrade {} has no end on record: it is resumed first", left.upgrade));
    }
    let left_out = (wish.handover == Handover::Carry).then_some(Step::Flush);
    let steps = RULES.iter().filter(|rule| Some(rule.step) != left_out).map(|rule| PlannedStep {
        step: rule.step.name().to_owned(),
        deadline_ms: milliseconds(rule.limit.of(&wish.limits)),
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

#[cfg(test)]
mod tests {
    use everdisk_upgrade::step::Limits;

    use super::*;
    use crate::{fake, upgrade::tests::identity, volume::tests::volume};

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
}
