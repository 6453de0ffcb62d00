//! The handshake: the server's greeting, the client's options, and the replies to them.

use everdisk_proto::nbd::wire::{
    ExportNameReply, Greeting, InfoBlockSize, InfoExport, MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHead,
    OptionReplyHead, base_allocation, handshake_flag, info, opt, rep,
};
use zerocopy::{
    FromBytes, IntoBytes,
    network_endian::{U16, U32},
};

/// The second magic number of a server that speaks the oldstyle handshake.
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Bytes of the greeting.
pub const GREETING_BYTES: usize = size_of::<Greeting>();
/// Bytes of the head of a reply to an option.
pub const OPTION_REPLY_BYTES: usize = size_of::<OptionReplyHead>();
/// Bytes of the reply to `NBD_OPT_EXPORT_NAME`, without the zeroes.
pub const EXPORT_NAME_BYTES: usize = size_of::<ExportNameReply>();
/// Longest name and longest text in the protocol, bytes.
pub const STRING_MAX: usize = 4096;
/// Longest reply to an option that is read, bytes: a string and a few numbers need less.
const OPTION_REPLY_MAX: u32 = 16 << 10;
/// Most replies to one option that are read. An information or a context takes one each.
pub const OPTION_REPLIES_MAX: usize = 256;
/// Largest minimum block size that the protocol allows, bytes.
pub const BLOCK_MIN_MAX: u32 = 1 << 16;

/// Why a handshake does not go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each says it in its message")]
pub enum HandshakeError {
    #[error("it does not speak NBD: its first bytes are {0:#018x}; check the address")]
    NoNbd(u64),
    #[error("it speaks the oldstyle handshake only, which names no export; use a server with fixed newstyle")]
    Oldstyle,
    #[error("it speaks newstyle without the fixed newstyle flag, so it answers no options; use a newer server")]
    NotFixed,
    #[error("its reply to option {option} begins with {magic:#018x}, which is no reply")]
    NoReply { option: u32, magic: u64 },
    #[error("it answered option {got} while option {wanted} was asked")]
    ForeignReply { wanted: u32, got: u32 },
    #[error("its reply of type {kind:#x} to option {option} is malformed: {why}")]
    Malformed { option: u32, kind: u32, why: &'static str },
    #[error("its minimum block is {0} bytes, which is no power of two up to 65536")]
    BlockMin(u32),
    #[error("its largest payload of {max} bytes is smaller than its minimum block of {min} bytes")]
    PayloadMax { min: u32, max: u32 },
    #[error("it demands TLS; configure TLS for this node")]
    TlsRequired,
    #[error("it offers no TLS ({0}), which is configured for this node")]
    NoTls(Refusal),
    #[error("it has no export {export:?} ({refusal}); check the export's name")]
    NoExport { export: String, refusal: Refusal },
    #[error("it refused option {option}: {refusal}")]
    Refused { option: u32, refusal: Refusal },
    #[error("the name of the export has {0} bytes; the protocol allows 4096")]
    LongName(usize),
}

/// An error that the server gave as the reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Its type: [`rep`].
    pub kind: u32,
    /// What the server says to people.
    pub text: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self.kind {
            rep::ERR_UNSUP => "unsupported",
            rep::ERR_POLICY => "forbidden by policy",
            rep::ERR_INVALID => "invalid",
            rep::ERR_PLATFORM => "not on its platform",
            rep::ERR_TLS_REQD => "TLS required",
            rep::ERR_UNKNOWN => "unknown export",
            rep::ERR_SHUTDOWN => "it is shutting down",
            rep::ERR_BLOCK_SIZE_REQD => "block sizes required",
            rep::ERR_TOO_BIG => "too big",
            other => return write!(f, "error {other:#x}: {}", self.text),
        };
        if self.text.is_empty() { f.write_str(name) } else { write!(f, "{name}: {}", self.text) }
    }
}

/// Reads the greeting; the client's flags that answer it.
///
/// # Errors
/// The server speaks something else, or an older handshake.
pub fn greeting(bytes: &[u8; GREETING_BYTES]) -> Result<u32, HandshakeError> {
    let greeting = Greeting::read_from_bytes(bytes).expect("as long as a greeting");
    match (greeting.magic.get(), greeting.option_magic.get()) {
        (MAGIC, OPTION_MAGIC) => {}
        (MAGIC, OLDSTYLE_MAGIC) => return Err(HandshakeError::Oldstyle),
        (first, _) => return Err(HandshakeError::NoNbd(first)),
    }
    let flags = greeting.flags.get();
    if flags & handshake_flag::FIXED_NEWSTYLE == 0 {
        return Err(HandshakeError::NotFixed);
    }
    Ok((flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES)).into())
}

/// Encodes an option.
pub fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).expect("an option has a name and a few numbers");
    let head = OptionHead { magic: OPTION_MAGIC.into(), option: option.into(), len: len.into() };
    [head.as_bytes(), data].concat()
}

/// Data of `NBD_OPT_GO`: the export, with a request for its block sizes.
pub fn go(export: &str) -> Vec<u8> {
    let mut data = string(export);
    data.extend_from_slice(U16::new(1).as_bytes());
    data.extend_from_slice(U16::new(info::BLOCK_SIZE).as_bytes());
    data
}

/// Data of `NBD_OPT_SET_META_CONTEXT`: `base:allocation` of the export.
pub fn meta_context(export: &str) -> Vec<u8> {
    let mut data = string(export);
    data.extend_from_slice(U32::new(1).as_bytes());
    data.extend_from_slice(&string(base_allocation::NAME));
    data
}

fn string(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).expect("an export's name was checked");
    [U32::new(len).as_bytes(), text.as_bytes()].concat()
}

/// Head of a reply to `wanted`: its type and the bytes of its data.
///
/// # Errors
/// It is no reply, that of another option, or longer than a reply can be.
pub fn reply_head(bytes: &[u8; OPTION_REPLY_BYTES], wanted: u32) -> Result<(u32, usize), HandshakeError> {
    let head = OptionReplyHead::read_from_bytes(bytes).expect("as long as a head");
    let (magic, got, kind, len) = (head.magic.get(), head.option.get(), head.kind.get(), head.len.get());
    if magic != OPTION_REPLY_MAGIC {
        return Err(HandshakeError::NoReply { option: wanted, magic });
    }
    if got != wanted {
        return Err(HandshakeError::ForeignReply { wanted, got });
    }
    if len > OPTION_REPLY_MAX {
        return Err(HandshakeError::Malformed { option: wanted, kind, why: "it is longer than a reply can be" });
    }
    Ok((kind, usize::try_from(len).expect("16 KiB")))
}

/// Whether a type of reply is an error.
pub const fn is_error(kind: u32) -> bool {
    kind >> 31 == 1
}

/// The text of an error, for people: no control characters, and not longer than the protocol allows.
pub fn refusal(kind: u32, data: &[u8]) -> Refusal {
    Refusal { kind, text: text(data) }
}

/// A text of the server, fit to be printed.
pub(crate) fn text(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(data);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(STRING_MAX).collect()
}

/// What an information says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Information {
    /// The export: its bytes and its flags.
    Export {
        /// Bytes of the export.
        size: u64,
        /// [`everdisk_proto::nbd::wire::transmission_flag`]
        flags: u16,
    },
    /// Its block sizes.
    Blocks(Blocks),
    /// Something that was not asked for.
    Other,
}

/// Block sizes of an export, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Ranges begin and end at multiples of it. A power of two.
    pub min: u32,
    /// Ranges that begin and end at multiples of it are quick.
    pub preferred: u32,
    /// Largest payload of a READ or WRITE.
    pub max: u32,
}

/// Reads the data of a reply `NBD_REP_INFO`.
///
/// # Errors
/// It is malformed, or its block sizes contradict the protocol.
pub fn information(data: &[u8]) -> Result<Information, HandshakeError> {
    let malformed = |why| HandshakeError::Malformed { option: opt::GO, kind: rep::INFO, why };
    let (kind, _) = U16::read_from_prefix(data).map_err(|_| malformed("its type is missing"))?;
    match kind.get() {
        info::EXPORT => {
            let about = InfoExport::read_from_bytes(data).map_err(|_| malformed("EXPORT has not 12 bytes"))?;
            Ok(Information::Export { size: about.size.get(), flags: about.flags.get() })
        }
        info::BLOCK_SIZE => {
            let blocks = InfoBlockSize::read_from_bytes(data).map_err(|_| malformed("BLOCK_SIZE has not 14 bytes"))?;
            let (min, preferred, max) = (blocks.min.get(), blocks.preferred.get(), blocks.max.get());
            if !min.is_power_of_two() || min > BLOCK_MIN_MAX {
                return Err(HandshakeError::BlockMin(min));
            }
            if max < min {
                return Err(HandshakeError::PayloadMax { min, max });
            }
            Ok(Information::Blocks(Blocks { min, preferred, max }))
        }
        _ => Ok(Information::Other),
    }
}

/// Reads the data of a reply `NBD_REP_META_CONTEXT`: the number of the context if it is `base:allocation`.
///
/// # Errors
/// It is malformed.
pub fn context(data: &[u8]) -> Result<Option<u32>, HandshakeError> {
    let why = "the number of the context is missing";
    let (id, name) = U32::read_from_prefix(data).map_err(|_| HandshakeError::Malformed {
        option: opt::SET_META_CONTEXT,
        kind: rep::META_CONTEXT,
        why,
    })?;
    Ok((name == base_allocation::NAME.as_bytes()).then_some(id.get()))
}

/// Reads the reply to `NBD_OPT_EXPORT_NAME`: bytes of the export, and its flags.
pub fn export_name(bytes: &[u8; EXPORT_NAME_BYTES]) -> (u64, u16) {
    let reply = ExportNameReply::read_from_bytes(bytes).expect("as long as the reply");
    (reply.size.get(), reply.flags.get())
}
