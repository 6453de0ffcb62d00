//! How an upgrade ended, in words: to the operator who waits for it, and in the log.

use everdisk_api::LastUpgrade;
use everdisk_proto::journal::Outcome;
use everdisk_telemetry::event;
use tracing::{info, warn};

use crate::{error::Error, volume::Volume};

/// The answer to an operator whose upgrade did not end as wished.
pub(super) fn failed(report: LastUpgrade) -> Error {
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

/// The line at the end of an upgrade.
pub(super) fn tell(volume: &Volume, report: &LastUpgrade) {
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
