//! What the demo and the bench share: a host with a volume of its own, verified load, the peer, tables and pictures.
//!
//! Nothing of it outlives the program: processes, mounts and files all belong to a [`host::Host`], which clears them
//! away when it is dropped, whatever happened.
#![forbid(unsafe_code)]

pub mod block;
pub mod chart;
pub mod command;
pub mod demo;
pub mod fio;
pub mod host;
pub mod interface;
pub mod interrupt;
pub mod load;
pub mod machine;
pub mod measure;
pub mod nbd;
pub mod peer;
pub mod residue;
pub mod stats;
pub mod table;

use std::io::{self, Write};

/// Why a demo or a measurement ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused something.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// Its word.
        source: io::Error,
    },
    /// Something did not go as it must.
    #[error("{0}")]
    Failed(String),
    /// The operator ended it.
    #[error("interrupted")]
    Interrupted,
}

/// Shorthand.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// For `map_err` on I/O: `doing` completes "cannot …".
    pub fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}

/// Prints a line. A reader that has gone is no reason to end without clearing up, so errors are ignored.
pub fn say(text: impl std::fmt::Display) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}
