//! Phases of a task, one after another under one deadline, and the summary at the end.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::TaskError;
use crate::child::{self, Stdout};
use crate::tally::Tally;

/// What was run so far.
pub(crate) struct Phases {
    begun: Instant,
    deadline: Instant,
    ended: Vec<Phase>,
}

struct Phase {
    name: &'static str,
    outcome: String,
    failed: bool,
    wall: Duration,
    tally: Tally,
}

impl Phases {
    /// `limit` is for all phases together.
    pub(crate) fn within(limit: Duration) -> Self {
        let begun = Instant::now();
        Self { begun, deadline: begun + limit, ended: Vec::new() }
    }

    /// Runs one child as a phase. True: it succeeded.
    pub(crate) fn run(&mut self, name: &'static str, command: &mut Command, stdout: Stdout) -> bool {
        let begun = Instant::now();
        let (failed, outcome, tally) = match child::run(command, self.deadline, stdout) {
            Ok(ended) => {
                if !ended.left_behind.is_empty() {
                    println!("warning: {name} left behind, now killed: {}", ended.left_behind.join(", "));
                }
                (!ended.is_success(), ended.outcome(), ended.tally)
            }
            Err(error) => (true, error.to_string(), Tally::default()),
        };
        self.note(Phase { name, outcome, failed, wall: begun.elapsed(), tally })
    }

    /// Does something that is no child. True: it succeeded.
    pub(crate) fn act(&mut self, name: &'static str, act: impl FnOnce() -> Result<(), TaskError>) -> bool {
        let begun = Instant::now();
        let ended = act();
        let outcome = match &ended {
            Ok(()) => "ok".to_owned(),
            Err(error) => {
                eprintln!("xtask: {error}");
                "failed".to_owned()
            }
        };
        let phase = Phase { name, outcome, failed: ended.is_err(), wall: begun.elapsed(), tally: Tally::default() };
        self.note(phase)
    }

    /// Records a phase that had no sense after what failed before it.
    pub(crate) fn skip(&mut self, name: &'static str, reason: &str) {
        let outcome = format!("skipped: {reason}");
        self.note(Phase { name, outcome, failed: true, wall: Duration::ZERO, tally: Tally::default() });
    }

    fn note(&mut self, phase: Phase) -> bool {
        let good = !phase.failed;
        self.ended.push(phase);
        good
    }

    /// A phase that failed without a failing test (it did not build, say) counts as one failure, so that
    /// "0 failed" is never printed above an exit status of 1.
    fn total(&self) -> Tally {
        let mut total = Tally::default();
        for phase in &self.ended {
            total += phase.tally;
            total.failed += u64::from(phase.failed && phase.tally.failed == 0);
        }
        total
    }

    fn summary(&self) -> String {
        let mut lines = vec![String::new(), "phase          wall   outcome".to_owned()];
        for Phase { name, outcome, wall, tally, .. } in &self.ended {
            let mut line = format!("{name:<12} {:>5}s   {outcome}", wall.as_secs());
            if *tally != Tally::default() {
                line += &format!(": {} passed, {} failed, {} ignored", tally.passed, tally.failed, tally.ignored);
            }
            lines.push(line);
        }
        let total = self.total();
        lines.push(format!("{:<12} {:>5}s", "total", self.begun.elapsed().as_secs()));
        lines.push(format!("{} passed, {} failed", total.passed, total.failed));
        lines.join("\n")
    }

    /// Prints the summary.
    ///
    /// # Errors
    /// A phase failed.
    pub(crate) fn finish(&self) -> Result<(), TaskError> {
        println!("{}", self.summary());
        let failed: Vec<&str> = self.ended.iter().filter(|phase| phase.failed).map(|phase| phase.name).collect();
        if failed.is_empty() { Ok(()) } else { Err(TaskError::Failed(format!("failed: {}", failed.join(", ")))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn the_total_stands_alone_on_a_line() {
        let mut phases = Phases::within(Duration::from_secs(60));
        let result = "echo 'test result: ok. 7 passed; 0 failed; 0 ignored;'";
        assert!(phases.run("unit tests", &mut shell(result), Stdout::Counted));
        assert!(phases.summary().lines().any(|line| line == "7 passed, 0 failed"));
        assert!(phases.finish().is_ok());
    }

    #[test]
    fn a_phase_that_fails_without_a_test_is_counted() {
        let mut phases = Phases::within(Duration::from_secs(60));
        assert!(!phases.run("build", &mut shell("exit 101"), Stdout::Counted));
        assert!(!phases.act("check", || Err(TaskError::Failed("no".into()))));
        phases.skip("end to end", "the build failed");
        assert!(phases.summary().lines().any(|line| line == "0 passed, 3 failed"), "{}", phases.summary());
        assert!(phases.finish().is_err());
    }

    #[test]
    fn a_phase_after_the_deadline_is_killed() {
        let mut phases = Phases::within(Duration::ZERO);
        assert!(!phases.run("late", &mut shell("sleep 30"), Stdout::Inherited));
        assert!(phases.summary().contains("killed at its deadline"));
    }
}
