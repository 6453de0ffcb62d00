//! The core of this release on storage nodes that are slow, fail, hang or lie when a file beside them says so; see
//! `everdisk_testkit::fault_store`. With `EVERDISK_TEST_NO_BUFFER` in its environment it says that it cannot adopt a write buffer.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use everdisk_proto::{
    identity::{Component, Identity},
    version::VersionRange,
};
use everdisk_testkit::fault_store::FaultStore;

fn main() -> ExitCode {
    let mut identity = Identity::current(Component::Core);
    if std::env::var_os("EVERDISK_TEST_NO_BUFFER").is_some() {
        identity.buffer = VersionRange { min: 0, max: 0 };
        identity.version += "-no-buffer";
    }
    everdisk_core::run_with(&identity, &FaultStore::wrap)
}
