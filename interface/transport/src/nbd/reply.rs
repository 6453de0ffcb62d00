//! The replies: simple ones, and the chunks of structured ones.
//!
//! READ is answered with chunks when structured replies were agreed on, and never otherwise; BLOCK_STATUS has no other reply
//! than chunks. To everything else a simple reply may be given in either case.
#![deny(clippy::indexing_slicing)]

use rustix::io::Errno as Os;
use zerocopy::{IntoBytes, transmute};

use super::protocol::{
    ChunkHead, DataChunk, ErrorChunk, HoleChunk, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, SimpleReply, StatusChunk,
    StatusExtent, base_allocation, chunk,
};

/// Bytes of a simple reply, without the data of a READ.
pub const SIMPLE_BYTES: usize = size_of::<SimpleReply>();
/// Bytes of a chunk's head, and of the chunk that says only that a reply is complete.
pub const CHUNK_BYTES: usize = size_of::<ChunkHead>();
/// Bytes before the data in a chunk of data.
pub const DATA_BYTES: usize = size_of::<DataChunk>();
/// Bytes of a chunk that is a hole.
pub const HOLE_BYTES: usize = size_of::<HoleChunk>();
/// Longest text in an error chunk; a longer one is cut. The protocol allows more and advises against it.
pub const MESSAGE_BYTES_MAX: usize = 256;
/// Bytes of the largest error chunk.
pub const ERROR_BYTES_MAX: usize = size_of::<ErrorChunk>() + MESSAGE_BYTES_MAX + size_of::<u64>();

/// An error by the protocol's number, which does not depend on the machine's errno values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NbdError(u32);

impl NbdError {
    /// Operation not permitted.
    pub const EPERM: Self = Self(1);
    /// Input/output error.
    pub const EIO: Self = Self(5);
    /// Out of memory.
    pub const ENOMEM: Self = Self(12);
    /// Invalid argument.
    pub const EINVAL: Self = Self(22);
    /// No space left.
    pub const ENOSPC: Self = Self(28);
    /// Value too large.
    pub const EOVERFLOW: Self = Self(75);
    /// Not supported.
    pub const ENOTSUP: Self = Self(95);
    /// The server is being shut down.
    pub const ESHUTDOWN: Self = Self(108);

    /// The number on the wire, never 0.
    pub const fn code(self) -> u32 {
        self.0
    }

    /// A text for people.
    pub const fn message(self) -> &'static str {
        match self {
            Self::EPERM => "not permitted",
            Self::ENOMEM => "out of memory",
            Self::EINVAL => "the request does not make sense for this export",
            Self::ENOSPC => "no space left",
            Self::EOVERFLOW => "too large for one chunk",
            Self::ENOTSUP => "not supported",
            Self::ESHUTDOWN => "the server is being shut down",
            _ => "a storage node failed",
        }
    }

    /// The protocol's number for an errno of Linux. Any errno without one, and any invalid errno, is EIO.
    pub const fn from_errno(errno: i32) -> Self {
        const PERM: i32 = Os::PERM.raw_os_error();
        const ROFS: i32 = Os::ROFS.raw_os_error();
        const NOMEM: i32 = Os::NOMEM.raw_os_error();
        const INVAL: i32 = Os::INVAL.raw_os_error();
        const NOSPC: i32 = Os::NOSPC.raw_os_error();
        const DQUOT: i32 = Os::DQUOT.raw_os_error();
        const FBIG: i32 = Os::FBIG.raw_os_error();
        const OVERFLOW: i32 = Os::OVERFLOW.raw_os_error();
        // ENOTSUP is the same number on Linux.
        const OPNOTSUPP: i32 = Os::OPNOTSUPP.raw_os_error();
        const SHUTDOWN: i32 = Os::SHUTDOWN.raw_os_error();
        match errno {
            PERM | ROFS => Self::EPERM,
            NOMEM => Self::ENOMEM,
            INVAL => Self::EINVAL,
            NOSPC | DQUOT | FBIG => Self::ENOSPC,
            OVERFLOW => Self::EOVERFLOW,
            OPNOTSUPP => Self::ENOTSUP,
            SHUTDOWN => Self::ESHUTDOWN,
            _ => Self::EIO,
        }
    }
}

/// A simple reply. The data of a READ follow it when there was no error.
pub fn simple(cookie: u64, result: Result<(), NbdError>) -> [u8; SIMPLE_BYTES] {
    let error = result.err().map_or(0, NbdError::code).into();
    transmute!(SimpleReply { magic: SIMPLE_REPLY_MAGIC.into(), error, cookie: cookie.into() })
}

/// As [`simple`], with the number of the error, or 0.
pub fn simple_code(cookie: u64, error: u32) -> [u8; SIMPLE_BYTES] {
    simple(cookie, if error == 0 { Ok(()) } else { Err(NbdError(error)) })
}

/// The bytes that precede `len` bytes of data from `offset` of the export. `len` is at least one, and no more than fits
/// into a chunk beside the offset (a request that passes its check asks for no more).
pub fn data(cookie: u64, offset: u64, len: u32, last: bool) -> [u8; DATA_BYTES] {
    let head = head(cookie, chunk::OFFSET_DATA, len.saturating_add(8), last);
    transmute!(DataChunk { head, offset: offset.into() })
}

/// The chunk in place of `len` bytes of zeros, at least one.
pub fn hole(cookie: u64, offset: u64, len: u32, last: bool) -> [u8; HOLE_BYTES] {
    let head = head(cookie, chunk::OFFSET_HOLE, 12, last);
    transmute!(HoleChunk { head, offset: offset.into(), hole: len.into() })
}

/// The chunk that only ends the reply. It means success if no error was reported before.
pub fn none(cookie: u64) -> [u8; CHUNK_BYTES] {
    transmute!(head(cookie, chunk::NONE, 0, true))
}

/// Puts an error of the whole request into `buf` and returns its length, at most [`ERROR_BYTES_MAX`]; `None` when it
/// does not fit.
pub fn error(buf: &mut [u8], cookie: u64, error: NbdError, message: &str, last: bool) -> Option<usize> {
    failure(buf, cookie, error, message, None, last)
}

/// Puts an error at an offset of the export, within the request's range, into `buf`; otherwise as [`error`].
pub fn error_at(buf: &mut [u8], cookie: u64, error: NbdError, message: &str, offset: u64, last: bool) -> Option<usize> {
    failure(buf, cookie, error, message, Some(offset), last)
}

/// Puts the status of consecutive extents (bytes and [`base_allocation`] flags) into `buf` and returns the length;
/// `None` when they do not fit, or there is no extent. No extent may be empty. With REQ_ONE there is one, no longer
/// than the request.
pub fn block_status(buf: &mut [u8], cookie: u64, extents: &[(u32, u32)], last: bool) -> Option<usize> {
    if extents.is_empty() {
        return None;
    }
    let len = u32::try_from(4 + extents.len() * size_of::<StatusExtent>()).ok()?;
    let mut space = Space { buf, used: 0 };
    let head = head(cookie, chunk::BLOCK_STATUS, len, last);
    space.put(StatusChunk { head, context: base_allocation::ID.into() }.as_bytes())?;
    for (len, flags) in extents {
        space.put(StatusExtent { len: (*len).into(), flags: (*flags).into() }.as_bytes())?;
    }
    Some(space.used)
}

fn head(cookie: u64, kind: u16, len: u32, last: bool) -> ChunkHead {
    let flags = if last { chunk::FLAG_DONE } else { 0 };
    let magic = STRUCTURED_REPLY_MAGIC.into();
    ChunkHead { magic, flags: flags.into(), kind: kind.into(), cookie: cookie.into(), len: len.into() }
}

fn failure(
    buf: &mut [u8],
    cookie: u64,
    error: NbdError,
    message: &str,
    offset: Option<u64>,
    last: bool,
) -> Option<usize> {
    let message = message.get(..message.floor_char_boundary(MESSAGE_BYTES_MAX))?;
    let message_len = u16::try_from(message.len()).ok()?;
    let (kind, more) = if offset.is_some() { (chunk::ERROR_OFFSET, 8) } else { (chunk::ERROR, 0) };
    let head = head(cookie, kind, 6 + u32::from(message_len) + more, last);
    let mut space = Space { buf, used: 0 };
    space.put(ErrorChunk { head, error: error.code().into(), message_len: message_len.into() }.as_bytes())?;
    space.put(message.as_bytes())?;
    if let Some(offset) = offset {
        space.put(&offset.to_be_bytes())?;
    }
    Some(space.used)
}

/// A buffer that is being filled.
struct Space<'a> {
    buf: &'a mut [u8],
    used: usize,
}

impl Space<'_> {
    fn put(&mut self, bytes: &[u8]) -> Option<()> {
        self.buf.get_mut(self.used..)?.get_mut(..bytes.len())?.copy_from_slice(bytes);
        self.used += bytes.len();
        Some(())
    }
}
