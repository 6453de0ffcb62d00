//! What tests, demo and bench share: a computing node of its own, and foreign programs on it.
//!
//! ```text
//!  host.rs        a computing node of its own: directories, control module, what is left at its end
//!  faults.rs      storage nodes that are slow, fail or hang on command
//!  programs.rs    where the programs are
//!  run.rs         programs under a deadline
//!  processes.rs   which processes run, what is mounted, ending a process
//!  fio.rs         fio: what its load goes to, and its report
//!  nbd.rs         NBD: where a server awaits clients, the bytes of the protocol; nbd/client.rs is a client
//!  servers.rs     NBD servers of others: nbdkit, qemu-nbd, nbd-server
//!  wait.rs        waiting for a condition, never for a time
//!  watchdog.rs    a limit on every test
//!  interrupt.rs   Ctrl-C and its kin
//! ```
//! What returns a [`Result`] is for programs, which clear up before they end: in the product's profiles a panic aborts. Where the
//! same is there for tests, which fail by panicking, the form with the `Result` is called `try_…`.
#![forbid(unsafe_code)]

pub mod faults;
pub mod fio;
pub mod host;
pub mod interrupt;
pub mod nbd;
pub mod processes;
pub mod programs;
pub mod run;
pub mod servers;
pub mod wait;
pub mod watchdog;

use std::io;

/// Why something ended early.
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

/// What a test gets from a result: the value, or a panic with the error in words.
#[track_caller]
#[expect(clippy::panic, reason = "tests fail by panicking")]
pub fn pass<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}
