//! `everdisk-core`, the core module of this release.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    everdisk_core::run(&everdisk_proto::version::CoreIdentity::current())
}
