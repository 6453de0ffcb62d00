//! The demo, see `cargo xtask demo`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use everdisk_benches::{Error, demo};
use everdisk_harness::interrupt::Interrupt;

/// Upgrades, rolls back, suspends and kills under verified load, in under a minute; leaves nothing behind.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {}

fn main() -> ExitCode {
    Arguments::parse();
    match Interrupt::install().and_then(|interrupt| demo::run(&interrupt)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Error::Interrupted) => {
            eprintln!("everdisk-demo: interrupted; everything was cleared away");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("everdisk-demo: {error}");
            ExitCode::FAILURE
        }
    }
}
