//! Front ends: how applications' requests arrive and are answered.
//!
//! The core that has the gate runs the codecs and serve loops here, on file descriptors that the interface lent it
//! (D1). The interface itself uses only the handshake.
#![forbid(unsafe_code)]
#![cfg_attr(test, expect(clippy::disallowed_methods, reason = "a test is no core: its threads need no word"))]

pub mod channel;
pub mod disk;
pub mod fuse;
pub mod nbd;
pub mod worker;
