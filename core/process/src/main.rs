//! `everdisk-core`, the core module of this release.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use everdisk_proto::identity::{Component, Identity};

fn main() -> ExitCode {
    everdisk_core::run(&Identity::current(Component::Core))
}
