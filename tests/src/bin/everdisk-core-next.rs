//! A core of another version, so that no test can mistake an upgrade to the same bits for an upgrade: `status` and the
//! attribute `user.everdisk.core` of the file show which one serves.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use everdisk_proto::version::CoreIdentity;

fn main() -> ExitCode {
    everdisk_core::run(&CoreIdentity { version: "0.2.0-next".to_owned(), ..CoreIdentity::current() })
}
