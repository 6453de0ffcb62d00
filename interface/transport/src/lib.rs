//! Front ends: how applications' requests arrive and are answered.
//!
//! The codecs and serve loops here are run by the core that has the gate, on file descriptors the interface lent it
//! (D1); the interface itself uses only the handshake.
#![forbid(unsafe_code)]

pub mod channel;
pub mod disk;
pub mod fuse;
pub mod nbd;
pub mod worker;
