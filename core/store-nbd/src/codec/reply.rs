//! Replies in the transmission phase: their heads, and the bodies of the chunks of structured replies.

use everdisk_proto::nbd::wire::{
    ChunkHead, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, SimpleReply, StatusExtent, base_allocation, chunk,
};
use zerocopy::{
    FromBytes,
    network_endian::{U16, U32, U64},
};

use super::handshake::{STRING_MAX, text};

/// A reply that breaks the protocol. The stream cannot be trusted after it, so the connection has to be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each says it in its message")]
pub enum Violation {
    #[error("a reply begins with {0:#010x}, which is no reply")]
    Magic(u32),
    #[error("a structured reply came, which was not agreed upon")]
    NotAgreed,
    #[error("a reply has the cookie {0:#018x}, which no outstanding request has")]
    ForeignCookie(u64),
    #[error("a simple reply came to a request that needs a structured one")]
    NeedsStructured,
    #[error("a chunk of type {kind:#x} came in reply to a request that it does not belong to")]
    ForeignChunk { kind: u16 },
    #[error("a chunk of type {kind:#x} has {len} bytes, which that type cannot have")]
    ChunkLength { kind: u16, len: u32 },
    #[error("a chunk of type NONE is not the last one of its reply")]
    NoneNotLast,
    #[error("{len} bytes from offset {offset} came in reply to a READ of {asked} bytes from offset {from}")]
    OutOfRange { offset: u64, len: u64, from: u64, asked: u32 },
    #[error("bytes came twice in reply to one READ, again at offset {0}")]
    Overlap(u64),
    #[error("a READ was answered in more than {0} scattered parts")]
    Scattered(usize),
    #[error("the reply to a READ of {asked} bytes lacks {missing} of them")]
    Missing { asked: u32, missing: u64 },
    #[error("an error chunk has the error number 0")]
    ErrorZero,
    #[error("the text of an error has {0} bytes, more than its chunk holds or the protocol allows")]
    ErrorText(u16),
    #[error("a block status has the context {got}, but {wanted} was agreed upon")]
    ForeignContext { wanted: u32, got: u32 },
    #[error("a reply has a second block status")]
    SecondStatus,
    #[error("a block status succeeded without an extent")]
    NoStatus,
    #[error("a block status has an extent of no bytes")]
    EmptyExtent,
    #[error("a block status goes on behind the range that was asked for")]
    OverlongStatus,
}

/// Head of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// A simple reply. The data of a successful READ follow.
    Simple {
        /// Of the request.
        cookie: u64,
        /// 0 is success.
        error: u32,
    },
    /// A chunk of a structured reply; `len` bytes follow.
    Chunk {
        /// Of the request.
        cookie: u64,
        /// [`chunk`]
        kind: u16,
        /// Whether it is the reply's last chunk.
        last: bool,
        /// Bytes that follow.
        len: u32,
    },
}

/// Reads the head of a reply and tells its length. `None`: bytes are missing.
///
/// # Errors
/// There is no reply.
pub fn head(bytes: &[u8]) -> Result<Option<(Head, usize)>, Violation> {
    let Ok((magic, _)) = U32::read_from_prefix(bytes) else { return Ok(None) };
    match magic.get() {
        SIMPLE_REPLY_MAGIC => Ok(SimpleReply::read_from_prefix(bytes).ok().map(|(reply, _)| {
            let head = Head::Simple { cookie: reply.cookie.get(), error: reply.error.get() };
            (head, size_of::<SimpleReply>())
        })),
        STRUCTURED_REPLY_MAGIC => Ok(ChunkHead::read_from_prefix(bytes).ok().map(|(head, _)| {
            let last = head.flags.get() & chunk::FLAG_DONE != 0;
            let (cookie, kind, len) = (head.cookie.get(), head.kind.get(), head.len.get());
            (Head::Chunk { cookie, kind, last, len }, size_of::<ChunkHead>())
        })),
        other => Err(Violation::Magic(other)),
    }
}

/// Bytes of the fixed part of a chunk OFFSET_DATA.
pub const DATA_OFFSET_BYTES: usize = 8;
/// Bytes of a chunk OFFSET_HOLE.
pub const HOLE_BYTES: usize = 12;
/// Largest error chunk that is read: the text, the fixed part, and fields of types that are not known here.
pub const ERROR_CHUNK_MAX: u32 = 8 << 10;
/// Largest block status that is read: the protocol's limit.
pub const STATUS_CHUNK_MAX: u32 = 4 + 8 * (1 << 20);

/// The offset in a chunk OFFSET_DATA. `None`: bytes are missing.
pub fn data_offset(bytes: &[u8]) -> Option<u64> {
    U64::read_from_prefix(bytes).ok().map(|(offset, _)| offset.get())
}

/// Offset and length in a chunk OFFSET_HOLE.
///
/// # Errors
/// The chunk has another length.
pub fn hole(body: &[u8]) -> Result<(u64, u32), Violation> {
    let wrong = || length(chunk::OFFSET_HOLE, body);
    let (offset, rest) = U64::read_from_prefix(body).map_err(|_| wrong())?;
    let len = U32::read_from_bytes(rest).map_err(|_| wrong())?;
    Ok((offset.get(), len.get()))
}

fn length(kind: u16, body: &[u8]) -> Violation {
    // A body is at most as long as the length in its head.
    Violation::ChunkLength { kind, len: u32::try_from(body.len()).unwrap_or(u32::MAX) }
}

/// What an error chunk says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerError {
    /// Error number of the protocol, not 0.
    pub number: u32,
    /// What the server says to people; may be empty.
    pub text: String,
    /// Where it happened, if the chunk is of the type ERROR_OFFSET.
    pub offset: Option<u64>,
}

/// Reads an error chunk of any type.
///
/// # Errors
/// It is malformed.
pub fn error(kind: u16, body: &[u8]) -> Result<ServerError, Violation> {
    let (number, rest) = U32::read_from_prefix(body).map_err(|_| length(kind, body))?;
    let (len, rest) = U16::read_from_prefix(rest).map_err(|_| length(kind, body))?;
    let len = len.get();
    let (said, rest) = rest.split_at_checked(len.into()).ok_or(Violation::ErrorText(len))?;
    if usize::from(len) > STRING_MAX {
        return Err(Violation::ErrorText(len));
    }
    if number == 0 {
        return Err(Violation::ErrorZero);
    }
    let offset = match kind {
        chunk::ERROR if rest.is_empty() => None,
        chunk::ERROR_OFFSET => Some(U64::read_from_bytes(rest).map_err(|_| length(kind, body))?.get()),
        chunk::ERROR => return Err(length(kind, body)),
        // A type that is not known here: its further fields are not known either.
        _ => None,
    };
    Ok(ServerError { number: number.get(), text: text(said), offset })
}

/// A part of the export, and whether it takes space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// Takes no space.
    pub hole: bool,
    /// Reads as zeros.
    pub zero: bool,
}

/// Reads a block status of the context that was agreed upon, in reply to a request for `asked` bytes. The last extent
/// may go on behind them.
///
/// # Errors
/// It is malformed, or of another context.
pub fn status(body: &[u8], wanted: u32, asked: u32) -> Result<Vec<Extent>, Violation> {
    let wrong = || length(chunk::BLOCK_STATUS, body);
    let (context, rest) = U32::read_from_prefix(body).map_err(|_| wrong())?;
    if context.get() != wanted {
        return Err(Violation::ForeignContext { wanted, got: context.get() });
    }
    let told = <[StatusExtent]>::ref_from_bytes(rest).map_err(|_| wrong())?;
    if told.is_empty() {
        return Err(wrong());
    }
    let mut covered = 0_u64;
    let mut extents = Vec::with_capacity(told.len());
    for extent in told {
        if extent.len == 0 {
            return Err(Violation::EmptyExtent);
        }
        if covered >= asked.into() {
            return Err(Violation::OverlongStatus);
        }
        let (len, flags) = (u64::from(extent.len.get()), extent.flags.get());
        covered += len;
        let (hole, zero) = (flags & base_allocation::HOLE != 0, flags & base_allocation::ZERO != 0);
        extents.push(Extent { len, hole, zero });
    }
    Ok(extents)
}
