//! The core of this release on storage nodes that are slow, fail, hang or lie when a file beside them says so; see
//! `everdisk_testkit::fault_store`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use everdisk_proto::version::CoreIdentity;
use everdisk_testkit::fault_store::FaultStore;

fn main() -> ExitCode {
    everdisk_core::run_with(&CoreIdentity::current(), &FaultStore::wrap)
}
