//! What tests of several crates share.
#![forbid(unsafe_code)]

pub mod reference_disk;
