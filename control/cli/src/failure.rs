//! Why a command failed.

use std::io;

use everdisk_api::{client::ClientError, directories::NoDirectory, status::Health};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The control module refused, or did not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// No default directories.
    #[error(transparent)]
    Directories(#[from] NoDirectory),
    /// The operating system.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was tried.
        doing: String,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A volume has a problem, which was printed.
    #[error("a volume is {}", .0.name())]
    Unwell(Health),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}
