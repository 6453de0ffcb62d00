//! The steps of an upgrade as data.
//!
//! ```text
//! step      deadline   reversible   what undoes it
//! stage     30 s       yes          the staged program is removed
//! verify    5 s        yes          nothing to undo
//! standby   20 s       yes          the new core is dismissed and its end awaited
//! flush     limit      yes          writes are buffered again
//! suspend   budget     yes          the interface re-opens the gate on the old core
//! switch    budget     yes          the gate goes back to an old core; a new core that does not let go is killed
//! probe     budget     yes          the gate goes back to an old core; a new core that does not let go is killed
//! resume    budget     yes          the gate goes back to an old core; a new core that does not let go is killed
//! soak      soak       yes          nothing to undo
//! commit    20 s       no           -
//! ```
//!
//! Suspend, switch, probe and resume are one command to the interface (its four round trips would take longer than the
//! whole suspension); it reports the times of each. The step flush is left out where the policy is `carry`.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// A step of an upgrade, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// The new core's program is copied to where it stays.
    Stage,
    /// Its version line is read; its ABI range has to hold the interface's ABI.
    Verify,
    /// It is started and arms; it reads blocks spread over the volume.
    Standby,
    /// All acknowledged data is made durable on the storage nodes before the suspension (M2, M8). While this goes on, writes go through to
    /// them (M3).
    Flush,
    /// The gate closes and drains (M9, M10).
    Suspend,
    /// The generation changes.
    Switch,
    /// The new core reads its stores.
    Probe,
    /// The gate opens; what was suspended is executed by the new core (M4).
    Resume,
    /// The old core stays parked while the new one is watched (D9).
    Soak,
    /// The old core is dismissed and the new program recorded as current.
    Commit,
}

/// How long a step may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// This long.
    Fixed(Duration),
    /// The operator's `--pause-budget`, for all steps of the hand-over together.
    PauseBudget,
    /// The operator's `--soak`.
    Soak,
    /// The operator's `--flush-limit`.
    Flush,
}

/// The limits that the operator sets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Drain and probe together.
    pub pause_budget: Duration,
    /// How long the old core stays parked.
    pub soak: Duration,
    /// How long the buffered data may take to reach the storage nodes.
    pub flush: Duration,
}

impl Limit {
    /// How long that is.
    pub const fn of(self, limits: &Limits) -> Duration {
        match self {
            Self::Fixed(limit) => limit,
            Self::PauseBudget => limits.pause_budget,
            Self::Soak => limits.soak,
            Self::Flush => limits.flush,
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(limit) => write!(f, "{} s", limit.as_secs()),
            Self::PauseBudget => f.write_str("budget"),
            Self::Soak => f.write_str("soak"),
            Self::Flush => f.write_str("limit"),
        }
    }
}

/// What undoes a step. Every undo is idempotent and also clears away what a step left that failed half-way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undo {
    /// The step changed nothing.
    Nothing,
    /// Remove the staged program.
    Unstage,
    /// Dismiss the new core.
    Dismiss,
    /// Have writes buffered again.
    EndSynchronous,
    /// The interface does it by itself: a suspension ends on the last good core (D8).
    Reopen,
    /// Give the gate back to an old core.
    HandBack,
    /// Cannot be undone.
    Impossible,
}

impl Undo {
    /// In words, for people.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Nothing => "nothing to undo",
            Self::Unstage => "the staged program is removed",
            Self::Dismiss => "the new core is dismissed and its end awaited",
            Self::EndSynchronous => "writes are buffered again",
            Self::Reopen => "the interface re-opens the gate on the old core",
            Self::HandBack => "the gate goes back to an old core; a new core that does not let go is killed",
            Self::Impossible => "-",
        }
    }
}

/// One row of the table above.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The step.
    pub step: Step,
    /// Its deadline.
    pub limit: Limit,
    /// Its undo.
    pub undo: Undo,
}

impl Rule {
    /// Whether the step can be undone.
    pub fn reversible(&self) -> bool {
        self.undo != Undo::Impossible
    }
}

const fn rule(step: Step, limit: Limit, undo: Undo) -> Rule {
    Rule { step, limit, undo }
}

const fn secs(seconds: u64) -> Limit {
    Limit::Fixed(Duration::from_secs(seconds))
}

/// The table, in the order of the steps.
pub const RULES: [Rule; 10] = [
    rule(Step::Stage, secs(30), Undo::Unstage),
    rule(Step::Verify, secs(5), Undo::Nothing),
    rule(Step::Standby, secs(20), Undo::Dismiss),
    rule(Step::Flush, Limit::Flush, Undo::EndSynchronous),
    rule(Step::Suspend, Limit::PauseBudget, Undo::Reopen),
    rule(Step::Switch, Limit::PauseBudget, Undo::HandBack),
    rule(Step::Probe, Limit::PauseBudget, Undo::HandBack),
    rule(Step::Resume, Limit::PauseBudget, Undo::HandBack),
    rule(Step::Soak, Limit::Soak, Undo::Nothing),
    rule(Step::Commit, secs(20), Undo::Impossible),
];

impl Step {
    /// The step's row.
    pub const fn rule(self) -> &'static Rule {
        &RULES[self as usize]
    }

    /// The step's name, as in the JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stage => "stage",
            Self::Verify => "verify",
            Self::Standby => "standby",
            Self::Flush => "flush",
            Self::Suspend => "suspend",
            Self::Switch => "switch",
            Self::Probe => "probe",
            Self::Resume => "resume",
            Self::Soak => "soak",
            Self::Commit => "commit",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The drawing at the top of this file is the table.
    #[test]
    fn the_drawing_and_the_table_agree() {
        for (index, rule) in RULES.iter().enumerate() {
            assert_eq!(rule.step as usize, index);
            let reversible = if rule.reversible() { "yes" } else { "no" };
            let limit = rule.limit.to_string();
            let row = format!("//! {:<10}{limit:<11}{reversible:<13}{}\n", rule.step, rule.undo.text());
            assert!(include_str!("step.rs").contains(&row), "the drawing lacks: {row}");
        }
    }

    #[test]
    fn only_the_commit_cannot_be_undone() {
        let fixed: Vec<Step> = RULES.iter().filter(|r| !r.reversible()).map(|r| r.step).collect();
        assert_eq!(fixed, [Step::Commit]);
    }
}
