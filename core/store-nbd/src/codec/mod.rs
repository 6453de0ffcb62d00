//! The bytes of the NBD protocol as a client sends and reads them. Pure: no descriptor, no clock. What comes from the
//! server is not trusted: every length is compared with a bound before anything is done with it.
//!
//! ```text
//! handshake.rs   greeting, options and their replies
//! reply.rs       heads of replies and the bodies of chunks
//! assembly.rs    what the parts of one reply add up to
//! coverage.rs    which bytes of a READ have arrived
//! ```
#![deny(clippy::indexing_slicing)]

pub mod assembly;
mod coverage;
pub mod handshake;
pub mod reply;
#[cfg(test)]
mod tests;

use everdisk_proto::nbd::wire::{REQUEST_MAGIC, RequestHead};
use zerocopy::transmute;

/// Bytes of the head of a request.
pub const REQUEST_BYTES: usize = size_of::<RequestHead>();

/// Encodes the head of a request; the data of a WRITE follow it.
pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_BYTES] {
    transmute!(RequestHead {
        magic: REQUEST_MAGIC.into(),
        flags: flags.into(),
        command: command.into(),
        cookie: cookie.into(),
        offset: offset.into(),
        len: len.into(),
    })
}
