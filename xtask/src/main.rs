//! Tasks of the repository. A fresh clone needs only a Rust toolchain: `cargo xtask test` installs what else the
//! tests call, builds, and runs every test there is.
#![forbid(unsafe_code)]

mod archive;
mod check;
mod child;
mod commands;
mod guest;
mod phases;
mod programs;
mod setup;
mod tally;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Checks, tests, shows and measures Everdisk.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Formatting, clippy and the laws of the architecture.
    Check {
        /// Run this one only (may be given more than once).
        #[arg(long, value_enum)]
        only: Vec<check::Law>,
    },
    /// Install what the tests call (as root), nothing more.
    Setup,
    /// Install what the tests call (as root), check, build, and run every test.
    Test,
    /// Build, then upgrade a volume under load before your eyes.
    Demo {
        /// Arguments of the demo.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Build, then measure side by side with qemu-storage-daemon.
    Bench {
        /// Arguments of the bench.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Build, then run the long end-to-end tests (those marked `#[ignore]`).
    Soak {
        /// Seconds each soak test goes on.
        #[arg(long, env = "EVERDISK_SOAK_SECS", default_value_t = 600)]
        secs: u64,
        /// Arguments of the test harness, such as a part of a test's name.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

/// Why a task ended without success. The message is for the person at the terminal.
#[derive(Debug, thiserror::Error)]
enum TaskError {
    #[error("{0}")]
    Failed(String),
    #[error("cannot {action}: {source}")]
    Io {
        action: String,
        #[source]
        source: std::io::Error,
    },
}

impl TaskError {
    /// For `map_err` on I/O: `action` completes the sentence "cannot …".
    fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }
}

fn main() -> ExitCode {
    let ended = match Arguments::parse().task {
        Task::Check { only } => check::run(&only),
        Task::Setup => commands::set_up(),
        Task::Test => commands::test(),
        Task::Demo { arguments } => commands::demo(&arguments),
        Task::Bench { arguments } => commands::bench(&arguments),
        Task::Soak { secs, arguments } => commands::soak(secs, &arguments),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
