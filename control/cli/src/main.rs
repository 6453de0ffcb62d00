//! `everdisk`: the operator's command. Results go to stdout, everything else to stderr. Exit status 0: done. 1:
//! failed, with a message that says what, why and what to do. 2: wrong usage. (`health` gives each status a meaning of its own.)
#![forbid(unsafe_code)]

mod arguments;
mod commands;
mod doctor;
mod failure;
mod health;
mod output;
mod show;

use std::process::ExitCode;

use everdisk_api::status::Health;

use crate::{arguments::Arguments, commands::run, failure::Failure};

fn main() -> ExitCode {
    let arguments = Arguments::read();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Unwell(Health::Failed)) => ExitCode::from(2),
        Err(Failure::Unwell(_)) => ExitCode::FAILURE,
        Err(failure) => {
            output::complain(&format!("everdisk: {failure}"));
            ExitCode::FAILURE
        }
    }
}
