//! NBD: the servers that ours is measured against, and a volume as the verified load sees it.

use everdisk_harness::nbd::Address;

use crate::{fio::Target, host::VOLUME};

pub mod disk;
pub mod peer;

/// What fio does its I/O to.
pub fn target(address: &Address) -> Target {
    Target::Nbd { uri: address.uri_of(VOLUME) }
}
