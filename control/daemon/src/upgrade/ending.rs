//! How an upgrade ended, in words: to the operator who waits for it, and in the log.

use everdisk_api::LastUpgrade;
use everdisk_proto::journal::Outcome;
use everdisk_telemetry::event;
use tracing::{info, warn};

use crate::{error::Error, volume::Volume};

/// The answer to an operator whose upgrade did not end as wished.
pub(super) fn failed(volume: &Volume, report: LastUpgrade) -> Error {
    let version = report.to.as_deref().unwrap_or("the new core");
    let reason = report.reason.as_deref().unwrap_or("no reason is known");
    let (name, serves) = (&report.volume, serves(volume));
    let message = match report.outcome {
        Some(Outcome::RolledBack) => {
            format!("the upgrade of {name} to {version} was rolled back, {serves}: {reason}")
        }
        Some(Outcome::Aborted) => format!("the upgrade of {name} was aborted, {serves}: {reason}"),
        Some(Outcome::Committed) => {
            format!(
                "the upgrade of {name} to {version} was committed, {serves}, but not everything succeeded: {reason}"
            )
        }
        None => {
            format!(
                "the upgrade of {name} to {version} has no end yet, {serves}: {reason}; the next upgrade or rollback resumes it"
            )
        }
    };
    Error::Upgrade { message, report: Box::new(report) }
}

/// Which core has the gate now: not every upgrade that failed has left it with the core before.
fn serves(volume: &Volume) -> String {
    if volume.attachment().is_none() {
        return "the volume is detached".to_owned();
    }
    let status = match volume.interface().status() {
        Ok(status) => status,
        Err(e) => return format!("it is not known which core serves ({e})"),
    };
    let Some(pid) = status.serving else { return "no core serves".to_owned() };
    match status.cores.iter().find(|core| core.pid == pid) {
        Some(core) => format!("{} (process {pid}) serves", core.identity.version),
        None => format!("process {pid} serves"),
    }
}

/// The line at the end of an upgrade.
pub(super) fn tell(volume: &Volume, report: &LastUpgrade) {
    let (name, upgrade, from, serves) = (&volume.name, report.upgrade, &report.from, serves(volume));
    let to = report.to.as_deref().unwrap_or("-");
    let reason = report.reason.as_deref().unwrap_or("no reason is known");
    let suspended_us = report.suspended_us;
    match report.outcome {
        Some(Outcome::Committed) if report.reason.is_none() => info!(
            event = event::UPGRADE_ENDED, volume = %name, upgrade, outcome = "committed", from, to, suspended_us,
            "{serves}"
        ),
        Some(Outcome::Committed) => warn!(
            event = event::UPGRADE_ENDED, volume = %name, upgrade, outcome = "committed", from, to, reason,
            "{serves}, but not everything succeeded"
        ),
        Some(Outcome::RolledBack) => warn!(
            event = event::UPGRADE_ENDED, volume = %name, upgrade, outcome = "rolled-back", from, to, reason, "{serves}"
        ),
        Some(Outcome::Aborted) => warn!(
            event = event::UPGRADE_ENDED, volume = %name, upgrade, outcome = "aborted", from, to, reason, "{serves}"
        ),
        None => warn!(
            event = event::UPGRADE_ENDED, volume = %name, upgrade, outcome = "unfinished", from, to, reason,
            "{serves}; the next upgrade or rollback, or the next start of everdiskd, gives the upgrade its end"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fake, volume::tests::volume};

    /// beyond 1: where a failed upgrade left no core that serves, or another one than the one before, its message says so.
    #[test]
    fn the_message_of_an_upgrade_that_failed_names_the_core_that_serves() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let told = |outcome| {
            let mut report = LastUpgrade::new("v".to_owned(), 1, "1.0".to_owned());
            (report.outcome, report.to, report.reason) = (outcome, Some("2.0".to_owned()), Some("why".to_owned()));
            tell(&volume, &report);
            failed(&volume, report).to_string()
        };
        let (aborted, rolled_back) = (Some(Outcome::Aborted), Some(Outcome::RolledBack));
        assert_eq!(told(aborted), "the upgrade of v was aborted, the volume is detached: why");
        let interface = fake::Interface::start(&volume);
        assert_eq!(told(aborted), "the upgrade of v was aborted, no core serves: why");
        assert_eq!(told(rolled_back), "the upgrade of v to 2.0 was rolled back, no core serves: why");
        for (version, pid) in [("1.0", 10), ("3.0", 11)] {
            interface.set(|status| {
                status.serving = Some(pid);
                status.cores = vec![fake::core(pid, 0)];
                status.cores[0].identity.version = version.to_owned();
            });
            let serves = format!("{version} (process {pid}) serves");
            assert_eq!(told(aborted), format!("the upgrade of v was aborted, {serves}: why"));
            assert_eq!(told(rolled_back), format!("the upgrade of v to 2.0 was rolled back, {serves}: why"));
            assert!(told(Some(Outcome::Committed)).contains(&format!("was committed, {serves}, but")));
            assert!(told(None).contains(&format!("has no end yet, {serves}: why; the next upgrade")));
        }
        drop(interface);
        std::fs::remove_file(volume.paths.interface_socket()).unwrap();
        assert!(told(aborted).contains("it is not known which core serves"));
    }
}
