//! `everdisk-interface`, the interface module of this release.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use everdisk_proto::identity::{Component, Identity};

fn main() -> ExitCode {
    everdisk_interface::run(&Identity::current(Component::Interface))
}
