//! As `everdisk-core-faulty`, of the version of `everdisk-core-next`, for upgrades between the two.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use everdisk_proto::identity::{Component, Identity};
use everdisk_testkit::fault_store::FaultStore;

fn main() -> ExitCode {
    let identity =
        Identity { version: everdisk_tests::programs::VERSION_NEXT.to_owned(), ..Identity::current(Component::Core) };
    everdisk_core::run_with(&identity, &FaultStore::wrap)
}
