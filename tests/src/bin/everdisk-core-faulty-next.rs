//! As `everdisk-core-faulty`, of the version of `everdisk-core-next`, for upgrades between the two.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use everdisk_proto::version::CoreIdentity;
use everdisk_testkit::fault_store::FaultStore;

fn main() -> ExitCode {
    let identity =
        CoreIdentity { version: everdisk_tests::programs::VERSION_NEXT.to_owned(), ..CoreIdentity::current() };
    everdisk_core::run_with(&identity, &FaultStore::wrap)
}
