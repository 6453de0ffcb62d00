//! Errors of the control module, and what the operator is told of them.

use std::io;

use everdisk_api::answer::{Kind, NEEDS_YES, Refusal};
use everdisk_sys::link::LinkError;
use everdisk_upgrade::act::Fault;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such volume.
    #[error("there is no volume {0}: see `everdisk volume list`")]
    NotFound(String),
    /// Another operation has the volume.
    #[error("another operation is running on {volume}: {operation} since {seconds} s; try again when it has ended")]
    Busy {
        /// The volume.
        volume: String,
        /// What runs.
        operation: &'static str,
        /// For how long.
        seconds: u64,
    },
    /// The volume's state does not permit it.
    #[error("{0}")]
    State(String),
    /// It would give up data or cut off users, and the operator has not agreed to that.
    #[error("{0}")]
    GivesUp(String),
    /// The request itself is wrong.
    #[error("{0}")]
    BadRequest(String),
    /// It was tried.
    #[error("{0}")]
    Failed(String),
    /// A program was killed, by us or others, before it had done or undone its work.
    #[error("{0}")]
    Killed(String),
    /// The operating system refused.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was tried.
        doing: String,
        /// Its word.
        source: io::Error,
    },
    /// A process of the volume did not answer as agreed.
    #[error("the {who} of the volume cannot be asked: {source}")]
    Peer {
        /// Which.
        who: &'static str,
        /// What happened.
        source: LinkError,
    },
    /// An upgrade has no end in the journal, and cannot be given one, so no other one can begin.
    #[error(
        "upgrade {upgrade} of volume {volume} has no end on record, so no other one can begin: {why}; {remedy}, then try again"
    )]
    Unfinished {
        /// The volume.
        volume: String,
        /// Its number.
        upgrade: u64,
        /// Why it cannot be given an end.
        why: String,
        /// What to do.
        remedy: String,
    },
    /// An upgrade did not end as wished.
    #[error("{message}")]
    Upgrade {
        /// For people.
        message: String,
        /// For programs.
        report: Box<everdisk_api::LastUpgrade>,
    },
}

/// What most functions here return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says what was tried when the operating system refuses.
pub trait Doing<T> {
    /// Adds what was tried.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { doing: what(), source })
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::NotFound(_) => Kind::NotFound,
            Error::Busy { .. } => Kind::Busy,
            Error::State(_) | Error::GivesUp(_) | Error::Unfinished { .. } => Kind::State,
            Error::BadRequest(_) => Kind::BadRequest,
            Error::Failed(_) | Error::Killed(_) | Error::Io { .. } | Error::Peer { .. } | Error::Upgrade { .. } => {
                Kind::Failed
            }
        };
        let message = error.to_string();
        let detail = match error {
            Error::Upgrade { report, .. } => {
                Some(serde_json::to_value(report).expect("a report has text keys and plain values"))
            }
            Error::GivesUp(_) => Some(serde_json::json!({ NEEDS_YES: true })),
            _ => None,
        };
        Self { kind, message, detail }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self(error.to_string())
    }
}
