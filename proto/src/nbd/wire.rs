//! The numbers and structures of the NBD protocol, with the names of its `doc/proto.md`, for the server that everdisk
//! is and for the client of storage nodes that are NBD servers. Everything is big-endian and unaligned.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout,
    network_endian::{U16, U32, U64},
};

/// `NBDMAGIC`: the first eight bytes of the server.
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: the next eight, and the first eight of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// The first bytes of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// The first bytes of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// The first bytes of every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// The first bytes of every chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Zeros after the reply to EXPORT_NAME, unless both sides agree to leave them out.
pub const EXPORT_NAME_ZEROES: usize = 124;

/// Handshake flags of the server, and of the client: they have the same values.
pub mod handshake_flag {
    /// Options other than EXPORT_NAME, and replies to them.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zeros after EXPORT_NAME are left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// What the export can do.
pub mod transmission_flag {
    #![expect(missing_docs, reason = "the names are those of proto.md")]
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_RESIZE: u16 = 1 << 9;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options.
pub mod opt {
    #![expect(missing_docs, reason = "the names are those of proto.md")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options; errors have the highest bit set.
pub mod rep {
    #![expect(missing_docs, reason = "the names are those of proto.md")]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_PLATFORM: u32 = (1 << 31) + 4;
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    pub const ERR_BLOCK_SIZE_REQD: u32 = (1 << 31) + 8;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Types of information in replies to INFO and GO.
pub mod info {
    #![expect(missing_docs, reason = "the names are those of proto.md")]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands.
pub mod cmd {
    #![expect(missing_docs, reason = "the names are those of proto.md")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod cmd_flag {
    /// Durable before it is answered.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES: keep the space.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: one chunk of content.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: fail with ENOTSUP rather than be as slow as a WRITE.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Types of the chunks of a structured reply.
pub mod chunk {
    #![expect(missing_docs, reason = "the names are those of proto.md")]
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = (1 << 15) + 1;
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
    /// Flag: the last chunk of its reply.
    pub const FLAG_DONE: u16 = 1 << 0;
}

/// The one metadata context.
pub mod base_allocation {
    /// Its name.
    pub const NAME: &str = "base:allocation";
    /// The query for every context of its namespace.
    pub const WILDCARD: &str = "base:";
    /// The number under which it is selected.
    pub const ID: u32 = 1;
    /// Status: the extent takes no space.
    pub const HOLE: u32 = 1 << 0;
    /// Status: the extent reads as zeros.
    pub const ZERO: u32 = 1 << 1;
}

macro_rules! wire {
    ($(#[$meta:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? } = $bytes:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        #[expect(missing_docs, reason = "the fields are those of proto.md")]
        pub struct $name { $(pub $field: $type),* }
        const _: () = assert!(size_of::<$name>() == $bytes);
    };
}

wire! {
    /// The server's greeting.
    Greeting { magic: U64, option_magic: U64, flags: U16 } = 18
}
wire! {
    /// The client's answer to it.
    ClientFlags { flags: U32 } = 4
}
wire! {
    /// Head of an option; `len` bytes of data follow.
    OptionHead { magic: U64, option: U32, len: U32 } = 16
}
wire! {
    /// Head of a reply to an option; `len` bytes of data follow.
    OptionReplyHead { magic: U64, option: U32, kind: U32, len: U32 } = 20
}
wire! {
    /// Reply to EXPORT_NAME.
    ExportNameReply { size: U64, flags: U16 } = 10
}
wire! {
    /// Information EXPORT.
    InfoExport { kind: U16, size: U64, flags: U16 } = 12
}
wire! {
    /// Information BLOCK_SIZE.
    InfoBlockSize { kind: U16, min: U32, preferred: U32, max: U32 } = 14
}
wire! {
    /// Head of a request; the data of a WRITE follow.
    RequestHead { magic: U32, flags: U16, command: U16, cookie: U64, offset: U64, len: U32 } = 28
}
wire! {
    /// Simple reply; the data of a READ follow.
    SimpleReply { magic: U32, error: U32, cookie: U64 } = 16
}
wire! {
    /// Head of a chunk; `len` bytes follow.
    ChunkHead { magic: U32, flags: U16, kind: U16, cookie: U64, len: U32 } = 20
}
wire! {
    /// Chunk OFFSET_DATA; the data follow.
    DataChunk { head: ChunkHead, offset: U64 } = 28
}
wire! {
    /// Chunk OFFSET_HOLE.
    HoleChunk { head: ChunkHead, offset: U64, hole: U32 } = 32
}
wire! {
    /// Chunks ERROR and ERROR_OFFSET; the message follows, and then the offset.
    ErrorChunk { head: ChunkHead, error: U32, message_len: U16 } = 26
}
wire! {
    /// Chunk BLOCK_STATUS; the extents follow.
    StatusChunk { head: ChunkHead, context: U32 } = 24
}
wire! {
    /// One extent of a BLOCK_STATUS chunk.
    StatusExtent { len: U32, flags: U32 } = 8
}
