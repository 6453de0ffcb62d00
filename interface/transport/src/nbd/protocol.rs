//! The numbers and structures of the NBD protocol, and the limits of this server.
#![deny(clippy::indexing_slicing)]

pub use everdisk_proto::nbd::wire::*;

/// Largest payload of a READ or WRITE. Every client may rely on 32 MiB, and other servers have the same limit.
pub const PAYLOAD_MAX: u32 = 32 << 20;
/// Largest READ that is answered in one chunk when the client demands that (DF). The protocol asks for at least 64 KiB.
pub const CHUNK_MAX: u32 = 1 << 20;
/// Requests may begin and end at any byte.
pub const BLOCK_BYTES_MIN: u32 = 1;
/// Requests of whole blocks of this size need no read-modify-write.
pub const BLOCK_BYTES_PREFERRED: u32 = 4096;
