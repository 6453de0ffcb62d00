//! The NBD front end: the volume as the one export of a server of the Network Block Device protocol, by `doc/proto.md` of
//! the NetworkBlockDevice project.
//!
//! What stands here is pure: bytes in, bytes out, no descriptor and no clock. A connection is handed from core to core at
//! any byte of its stream, so whatever has to outlive a core fits into a few words of shared memory:
//! [`negotiation::State`] into one, [`request::Request`] into four.
//!
//! ```text
//! negotiation::step ─ phase Transmission ─▶ request::Request ─ check ─▶ the disk ─▶ reply
//! ```

pub mod negotiation;
mod option;
pub mod protocol;
pub mod reply;
pub mod request;

#[cfg(test)]
mod tests;
