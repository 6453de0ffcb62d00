//! What tests of several crates share.
#![forbid(unsafe_code)]

pub mod fault_store;
pub mod reference_disk;
