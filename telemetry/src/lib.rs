//! Log set-up, and the names of the events that other programs may search a log for.
//!
//! A name, once published, keeps its meaning; its line is written as `event="name"` beside a sentence for people. Lines without one are
//! limited to one a second from each place ([`flood`]).
#![forbid(unsafe_code)]

mod flood;

use std::{
    env::{self, VarError},
    io::IsTerminal,
};

use tracing_subscriber::EnvFilter;

/// Environment variable with the log filter, in the syntax of `tracing-subscriber` (`info`, `everdiskd=debug`, …).
pub const FILTER_VARIABLE: &str = "EVERDISK_LOG";

/// Writes the log of this process to stderr, at `info` unless [`FILTER_VARIABLE`] says otherwise. A second call does
/// nothing.
pub fn init() {
    let (filter, refused) = filter(env::var(FILTER_VARIABLE));
    // It fails where there is a log already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .event_format(flood::Flood::new(tracing_subscriber::fmt::format().with_target(false)))
        .try_init();
    if let Some(why) = refused {
        tracing::warn!("{FILTER_VARIABLE} is not a filter, so the log is written at info: {why}");
    }
}

/// The filter that the variable asks for, or why it asks for none.
fn filter(variable: Result<String, VarError>) -> (EnvFilter, Option<String>) {
    let given = match variable {
        Err(VarError::NotPresent) => return (EnvFilter::new("info"), None),
        Err(e) => Err(e.to_string()),
        Ok(text) => EnvFilter::try_new(text).map_err(|e| e.to_string()),
    };
    given.map_or_else(|why| (EnvFilter::new("info"), Some(why)), |filter| (filter, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// D15: a filter that cannot be read is refused in words, and the log is written.
    #[test]
    fn d15_a_filter_that_is_none_is_named() {
        let of = |text: &str| filter(Ok(text.to_owned()));
        assert!(filter(Err(VarError::NotPresent)).1.is_none() && of("debug,everdiskd=trace").1.is_none());
        let (used, refused) = of("everdiskd=loud");
        assert_eq!(used.to_string(), "info");
        assert!(refused.is_some());
    }
}

/// Names of events.
pub mod event {
    /// The control module listens.
    pub const DAEMON_READY: &str = "daemon_ready";
    /// A volume was found running at the start of the control module.
    pub const VOLUME_TAKEN_OVER: &str = "volume_taken_over";
    /// A volume was made.
    pub const VOLUME_CREATED: &str = "volume_created";
    /// A volume was deleted.
    pub const VOLUME_DELETED: &str = "volume_deleted";
    /// The control module knows a volume no longer; its storage nodes are as they were.
    pub const VOLUME_FORGOTTEN: &str = "volume_forgotten";
    /// The files of a volume in the state directory cannot be read.
    pub const VOLUME_DAMAGED: &str = "volume_damaged";
    /// A volume was made larger.
    pub const VOLUME_RESIZED: &str = "volume_resized";
    /// Acknowledged data was given up because the operator said so.
    pub const DATA_GIVEN_UP: &str = "data_given_up";
    /// A volume was attached.
    pub const VOLUME_ATTACHED: &str = "volume_attached";
    /// A volume was detached.
    pub const VOLUME_DETACHED: &str = "volume_detached";
    /// An interface was started.
    pub const INTERFACE_STARTED: &str = "interface_started";
    /// An interface ended without having been told to.
    pub const INTERFACE_ENDED: &str = "interface_ended";
    /// An interface that was started in the place of a dead one has taken up its duties.
    pub const INTERFACE_RESTORED: &str = "interface_restored";
    /// What the control module keeps of a volume's processes could not be kept.
    pub const SUPERVISION_FAILED: &str = "supervision_failed";
    /// A core was started.
    pub const CORE_STARTED: &str = "core_started";
    /// A core that had the gate ended without having been told to.
    pub const CORE_CRASHED: &str = "core_crashed";
    /// A core that did not have the gate ended without having been told to.
    pub const CORE_ENDED: &str = "core_ended";
    /// Something is wrong with a volume, as `everdisk health` says.
    pub const PROBLEM_BEGAN: &str = "problem_began";
    /// It is not any more.
    pub const PROBLEM_ENDED: &str = "problem_ended";
    /// An operator's act was done or refused.
    pub const OPERATOR: &str = "operator";
    /// A core that did not answer was killed.
    pub const CORE_KILLED: &str = "core_killed";
    /// A core that is neither serving nor the standby was asked to leave.
    pub const CORE_DISMISSED: &str = "core_dismissed";
    /// A step of an upgrade began.
    pub const UPGRADE_STEP: &str = "upgrade_step";
    /// An upgrade ended.
    pub const UPGRADE_ENDED: &str = "upgrade_ended";
}
