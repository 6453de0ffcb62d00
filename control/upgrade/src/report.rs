//! How an upgrade ended: the object that `upgrade` prints and `status` shows as `last_upgrade`.

use everdisk_proto::{frame::HandoverReport, journal::Outcome};
use serde::{Deserialize, Serialize};

use crate::{policy::Handover, step::Step};

/// One upgrade.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The volume.
    pub volume: String,
    /// Number of the upgrade within the volume, from 1.
    pub upgrade: u64,
    /// How it ended; none while it is under way.
    pub outcome: Option<Outcome>,
    /// Version of the core that served before.
    pub from: String,
    /// Version of the new core, once it is known.
    pub to: Option<String>,
    /// SHA-256 of the new core's program as it was run, in hexadecimal, once it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// It went back to the build before the last committed upgrade.
    #[serde(default)]
    pub rollback: bool,
    /// The hand-over policy that was carried out, or would have been next.
    #[serde(default)]
    pub handover: Handover,
    /// The one that was asked for.
    #[serde(default)]
    pub handover_asked: Handover,
    /// Gate closed → first held request executed (or the gate open, when none was held), µs.
    pub suspended_us: Option<u64>,
    /// Gate closed → the last request of the old core answered, µs.
    pub drained_us: Option<u64>,
    /// Gate closed → gate open, µs.
    pub opened_us: Option<u64>,
    /// CLOCK_MONOTONIC at which the gate was closed, ns.
    pub closed_monotonic_ns: Option<u64>,
    /// Bytes that were buffered when the upgrade began.
    #[serde(default)]
    pub buffered_bytes: u64,
    /// How long the flush before the suspension took, ms, also when it did not succeed; none when there was none.
    #[serde(default)]
    pub flush_ms: Option<u64>,
    /// Bytes that were in the write buffer when the new core adopted it.
    #[serde(default)]
    pub carried_bytes: u64,
    /// Gate closed → the new core has adopted the write buffer, µs.
    #[serde(default)]
    pub adopted_us: Option<u64>,
    /// Requests that were held.
    pub requests_held: u64,
    /// Blocks the new core read before it was given the gate.
    pub verified_blocks: u32,
    /// Nodes that its probe found readable: read inside the suspension, or less than 1 s before.
    pub probe_blocks: u32,
    /// How often the hand-over was tried: again where the old core did not drain within the budget.
    #[serde(default)]
    pub attempts: u32,
    /// Generation in force after the hand-over.
    pub generation: Option<u64>,
    /// The steps that were begun, in order, with the time each took.
    pub steps: Vec<StepTime>,
    /// Problems that did not stop the upgrade.
    #[serde(default)]
    pub notes: Vec<String>,
    /// The step that failed.
    pub failed_step: Option<Step>,
    /// Why it was not committed, or what was left undone although it was.
    pub reason: Option<String>,
}

/// Time of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepTime {
    /// The step.
    pub step: Step,
    /// Whole milliseconds.
    pub ms: u64,
    /// Microseconds.
    pub us: u64,
}

impl StepTime {
    /// A step that took `us` microseconds.
    pub const fn new(step: Step, us: u64) -> Self {
        Self { step, ms: us / 1000, us }
    }
}

impl Report {
    /// A report of an upgrade that begins.
    pub fn new(volume: String, upgrade: u64, from: String) -> Self {
        Self {
            volume,
            upgrade,
            outcome: None,
            from,
            to: None,
            digest: None,
            rollback: false,
            handover: Handover::Flush,
            handover_asked: Handover::Flush,
            buffered_bytes: 0,
            suspended_us: None,
            drained_us: None,
            opened_us: None,
            closed_monotonic_ns: None,
            flush_ms: None,
            carried_bytes: 0,
            adopted_us: None,
            requests_held: 0,
            verified_blocks: 0,
            probe_blocks: 0,
            attempts: 0,
            generation: None,
            steps: Vec::new(),
            notes: Vec::new(),
            failed_step: None,
            reason: None,
        }
    }

    /// Whether it was refused before anything was begun: the program could not be had, or is none that fits.
    pub fn was_refused(&self) -> bool {
        let began = self.steps.iter().any(|step| !matches!(step.step, Step::Stage | Step::Verify));
        self.outcome == Some(Outcome::Aborted) && !began
    }

    /// Adds a reason to what is known already.
    pub fn add_reason(&mut self, more: String) {
        self.reason = Some(match self.reason.take() {
            Some(reason) => format!("{reason}; {more}"),
            None => more,
        });
    }

    /// Enters what the interface reports of the hand-over. The switch is a store to one word; its time is counted
    /// with the probe's.
    pub fn enter(&mut self, report: &HandoverReport) {
        let times = report.suspension;
        self.drained_us = times.drained_us;
        self.opened_us = times.opened_us;
        self.suspended_us = times.first_request_us.or(times.opened_us);
        self.closed_monotonic_ns = (times.closed_ns > 0).then_some(times.closed_ns);
        self.requests_held = times.held;
        self.probe_blocks = report.probe_blocks;
        self.carried_bytes = report.carried_bytes;
        self.adopted_us = report.adopted_us;
        self.generation = Some(report.generation.0);
        let drained = times.drained_us.unwrap_or(0);
        let opened = times.opened_us.unwrap_or(drained);
        let first = times.first_request_us.unwrap_or(opened);
        self.steps.push(StepTime::new(Step::Suspend, drained));
        if times.drained_us.is_some() {
            self.steps.push(StepTime::new(Step::Switch, 0));
            self.steps.push(StepTime::new(Step::Probe, opened.saturating_sub(drained)));
        }
        if report.failure.is_none() {
            self.steps.push(StepTime::new(Step::Resume, first.saturating_sub(opened)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A report as the build before the write buffer kept it.
    const BEFORE: &str = r#"{"volume":"v","upgrade":1,"outcome":"committed","from":"1","to":"2","handover":"flush",
        "suspended_us":210,"drained_us":9,"opened_us":200,"closed_monotonic_ns":7,"flush_ms":35,"requests_held":12,
        "verified_blocks":64,"probe_blocks":2,"generation":7,"steps":[{"step":"stage","ms":1,"us":1000}],
        "failed_step":null,"reason":null}"#;

    #[test]
    fn a_report_of_the_build_before_still_reads() {
        let report: Report = serde_json::from_str(BEFORE).unwrap();
        assert_eq!((report.handover, report.handover_asked), (Handover::Flush, Handover::Flush));
        assert_eq!((report.flush_ms, report.buffered_bytes, report.adopted_us), (Some(35), 0, None));
        let again = serde_json::to_value(&report).unwrap();
        assert_eq!((&again["handover"], &again["carried_bytes"]), (&"flush".into(), &0.into()));
    }
}
