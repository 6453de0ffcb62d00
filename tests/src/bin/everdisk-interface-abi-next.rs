//! The interface of the next ABI, N+1, which adopts segments of N too. With `EVERDISK_TEST_ABI_AFTER` in its environment it is of N+2,
//! and does not adopt those of N.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use everdisk_proto::identity::Component;

fn main() -> ExitCode {
    everdisk_interface::run(&everdisk_tests::programs::of_next_abi(Component::Interface))
}
