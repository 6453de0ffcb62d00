//! The upgrade machine (D7), pure: it decides, an [`act::Act`] acts.
//!
//! ```text
//!  step.rs      the steps as data: deadline, reversible or not, what undoes it
//!  state.rs     the state × event table
//!  policy.rs    what happens to buffered data
//!  run.rs       one function that runs a step, one that unwinds
//!  health.rs    the verdict of the soak
//!  unfinished.rs   what to do with an upgrade that the journal left without an end
//!  report.rs    how an upgrade ended, as `status` shows it
//! ```
//!
//! Post-condition of every upgrade, whatever failed: **the gate is open on a core that serves**, one core program is
//! recorded as current, nothing of the other is left over, and writes are buffered as before.
#![forbid(unsafe_code)]

pub mod act;
pub mod health;
pub mod policy;
pub mod report;
pub mod run;
pub mod state;
pub mod step;
pub mod unfinished;

#[cfg(test)]
mod model;
