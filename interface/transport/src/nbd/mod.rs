//! The NBD front end: the volume as the one export of a server of the Network Block Device protocol, by `doc/proto.md` of
//! the NetworkBlockDevice project.
//!
//! The codec is pure: bytes in, bytes out, no descriptor and no clock.
//!
//! ```text
//! negotiation::step ─ phase Transmission ─▶ request::Request ─ check ─▶ the disk ─▶ reply
//! ```
//! A connection is handed from core to core at any byte of its stream. So everything that has to outlive a core fits
//! into a few words of shared memory: [`state::State`] into one, [`request::Request`] into four. [`connection`] keeps
//! them there, and [`serve`] is what a worker does with them.

pub mod connection;
#[cfg(test)]
mod death;
mod execute;
pub mod negotiation;
mod option;
pub mod protocol;
pub mod reply;
pub mod request;
pub mod serve;
mod spin;
pub mod state;

#[cfg(test)]
mod tests;
