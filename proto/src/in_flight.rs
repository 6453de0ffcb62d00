//! The in-flight table of one connection to an NBD storage node (a memfd). It tells which changes a core has sent and knows
//! no reply of, wherever that core died. The interface has the table and a duplicate of the socket, and reads on until
//! each of these changes is answered: the fence of such nodes.
//!
//! ```text
//! 0      table   how far the socket was written, one entry for each change that is in flight
//! 8 KiB  inbox   what was received last
//! ```
//! * **An entry** is written before the first byte of its request is sent, and freed after its reply has been read. So
//!   every change that the server may still execute has an entry.
//! * **How far the socket was written** is recorded by the kernel itself within the system call ([`Cursor`]). A request that
//!   ends behind that position was not sent as a whole, and no server executes it: a server needs the last byte.
//! * **A reply that was received and not noted** lies in the inbox. Whatever is received from the socket goes there, except the data of
//!   reads. An inbox is not received into again before what lies in it was noted.
//! * **Cookies** are unpredictable, and none is used twice. So a reply is recognised wherever it begins, and nobody needs to know
//!   how far the stream of replies was read.

use std::sync::atomic::{AtomicU32, AtomicU64};

use zerocopy::{FromBytes, KnownLayout};

use crate::connection::Cursor;

/// `"EVDFLT\0\0"` little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"EVDFLT\0\0");
/// Version of the layout.
pub const VERSION: u32 = 1;
/// Bytes of the table.
pub const TABLE_BYTES: usize = 8 << 10;
/// Bytes of the inbox: some dozens of replies of 4 KiB.
pub const INBOX_BYTES: usize = 256 << 10;
/// Bytes of the whole memory.
pub const BYTES: usize = TABLE_BYTES + INBOX_BYTES;
/// Changes that can be in flight on one connection.
pub const ENTRIES: usize = 256;

/// The table.
#[derive(FromBytes, KnownLayout, Debug)]
#[repr(C, align(64))]
pub struct Table {
    /// [`MAGIC`], stored last.
    pub magic: AtomicU64,
    /// [`VERSION`].
    pub version: AtomicU32,
    _pad0: AtomicU32,
    _pad1: [AtomicU64; 6],
    /// How far the socket was written, in bytes since the first request.
    pub sent: Cursor,
    /// The changes in flight.
    pub entries: [Entry; ENTRIES],
    _pad2: [AtomicU64; 480],
}

/// A change in flight.
#[derive(FromBytes, KnownLayout, Debug)]
#[repr(C)]
pub struct Entry {
    /// The cookie of its request, as the number that it is in the protocol; 0: the entry is free.
    pub cookie: AtomicU64,
    /// The position in the stream of requests behind its last byte; [`NOT_QUEUED`].
    pub end: AtomicU64,
}

/// [`Entry::end`] of a request that has no place in the stream yet.
pub const NOT_QUEUED: u64 = u64::MAX;

const _: () = {
    assert!(size_of::<Table>() == TABLE_BYTES);
    assert!(size_of::<Entry>() == 16);
    assert!(core::mem::offset_of!(Table, sent) == 64);
    assert!(core::mem::offset_of!(Table, entries) == 256);
};
