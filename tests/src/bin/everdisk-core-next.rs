//! A core of another version, so that no test can mistake an upgrade to the same bits for an upgrade: `status` and the
//! attribute `user.everdisk.core` of the file show which one serves.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use everdisk_proto::identity::{Component, Identity};

fn main() -> ExitCode {
    everdisk_core::run(&Identity { version: "0.2.0-next".to_owned(), ..Identity::current(Component::Core) })
}
