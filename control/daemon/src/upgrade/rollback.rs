//! The way back to the core before.

use std::{sync::Arc, time::Duration};

use everdisk_api::{Handover, LastUpgrade, operation::OperationName};
use everdisk_proto::{
    identity::Identity,
    journal::Outcome,
    limits::{FLUSH_LIMIT_DEFAULT, PAUSE_BUDGET_DEFAULT},
};
use everdisk_upgrade::{step::Limits, unfinished::unfinished};

use super::{Wish, begin, ending::failed, perform, read_journal, ready};
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
        if unfinished(&read_journal(volume)?).is_some() {
            return Err(Error::State(format!(
                "the upgrade of {0} could not be given an end: see `everdisk status {0}`, then `everdisk rollback {0}` again",
                volume.name
            )));
        }
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
    let operation = begin(volume, OperationName::Rollback, progress)?;
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
    use everdisk_proto::identity::Build;

    use super::*;
    use crate::{fake, upgrade::tests::identity, volume::tests::volume};

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
