//! `everdisk`: the operator's command. Results go to stdout, everything else to stderr; exit status 0 is done, 1 is
//! failed with a message that says what, why and what to do, 2 is wrong usage.
#![forbid(unsafe_code)]

mod arguments;
mod commands;
mod doctor;
mod output;
mod show;

use std::process::ExitCode;

use crate::{arguments::Arguments, commands::run};

fn main() -> ExitCode {
    let arguments = Arguments::read();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::complain(&format!("everdisk: {failure}"));
            ExitCode::FAILURE
        }
    }
}
