//! What tests of several crates share.
#![forbid(unsafe_code)]

pub mod at_end;
pub mod fault_store;
pub mod reference_disk;
