//! The requests of a connection, once the handshake is over.
#![deny(clippy::indexing_slicing)]

use zerocopy::FromBytes;

use super::{
    protocol::{CHUNK_MAX, PAYLOAD_MAX, REQUEST_MAGIC, RequestHead, cmd, cmd_flag},
    reply::NbdError,
    state::State,
};

/// The command of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Send data to the client.
    Read,
    /// Take data from the client.
    Write,
    /// Answer what is outstanding and close the connection; there is no reply.
    Disconnect,
    /// Make everything acknowledged durable.
    Flush,
    /// The range is no longer needed.
    Trim,
    /// The range will be needed soon.
    Cache,
    /// Make the range read as zeros.
    WriteZeroes,
    /// Report what is allocated.
    BlockStatus,
    /// A number without a meaning.
    Unknown(u16),
}

impl Command {
    /// The number on the wire.
    pub const fn code(self) -> u16 {
        match self {
            Self::Read => cmd::READ,
            Self::Write => cmd::WRITE,
            Self::Disconnect => cmd::DISC,
            Self::Flush => cmd::FLUSH,
            Self::Trim => cmd::TRIM,
            Self::Cache => cmd::CACHE,
            Self::WriteZeroes => cmd::WRITE_ZEROES,
            Self::BlockStatus => cmd::BLOCK_STATUS,
            Self::Unknown(code) => code,
        }
    }

    /// The command of this number.
    pub const fn from_code(code: u16) -> Self {
        match code {
            cmd::READ => Self::Read,
            cmd::WRITE => Self::Write,
            cmd::DISC => Self::Disconnect,
            cmd::FLUSH => Self::Flush,
            cmd::TRIM => Self::Trim,
            cmd::CACHE => Self::Cache,
            cmd::WRITE_ZEROES => Self::WriteZeroes,
            cmd::BLOCK_STATUS => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }
}

/// The head of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    /// The command.
    pub command: Command,
    /// The flags: [`cmd_flag`].
    pub flags: u16,
    /// The cookie of the reply.
    pub cookie: u64,
    /// First byte of the range.
    pub offset: u64,
    /// Bytes of the range.
    pub len: u32,
}

impl Request {
    /// Bytes on the wire, without the payload.
    pub const BYTES: usize = size_of::<RequestHead>();

    /// Reads a head. `None`: the stream is out of step, and the connection has to be closed.
    pub fn decode(header: &[u8; Self::BYTES]) -> Option<Self> {
        let head = RequestHead::read_from_bytes(header).ok()?;
        (head.magic.get() == REQUEST_MAGIC).then(|| Self {
            command: Command::from_code(head.command.get()),
            flags: head.flags.get(),
            cookie: head.cookie.get(),
            offset: head.offset.get(),
            len: head.len.get(),
        })
    }

    /// Bytes that follow the head in the stream. They follow also when [`Request::check`] refuses the request, and then
    /// there may be more than [`PAYLOAD_MAX`]: a server that does not want to discard that much may close the
    /// connection.
    pub fn payload(&self) -> u64 {
        if self.command == Command::Write { self.len.into() } else { 0 }
    }

    /// Whether it has this flag.
    pub const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Checks that the request may be executed on an export of this size. If so, the range lies within the export. A
    /// range of no bytes does not fail (the protocol leaves it open): there is nothing to do, and the request succeeds.
    ///
    /// # Errors
    /// The error for the client.
    pub fn check(&self, state: State, size: u64) -> Result<(), NbdError> {
        // FUA is accepted with every command, as proto.md demands of a server that offers it. It has a meaning for
        // those that write.
        let known = cmd_flag::FUA
            | match self.command {
                // There is no reply by which it could be refused.
                Command::Disconnect => return Ok(()),
                Command::Unknown(_) => return Err(NbdError::EINVAL),
                Command::Read if state.structured => cmd_flag::DF,
                Command::WriteZeroes => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
                Command::BlockStatus => cmd_flag::REQ_ONE,
                Command::Read | Command::Write | Command::Flush | Command::Trim | Command::Cache => 0,
            };
        if self.has(!known) {
            return Err(NbdError::EINVAL);
        }
        match self.command {
            // The range should be zero. It is not checked here (QEMU does not either, nbdkit does): to flush everything
            // does at least what is asked.
            Command::Flush => return Ok(()),
            Command::Read | Command::Write if self.len > PAYLOAD_MAX => return Err(NbdError::EINVAL),
            // A reply has at least one extent, and no extent is empty.
            Command::BlockStatus if !state.base_allocation || self.len == 0 => return Err(NbdError::EINVAL),
            _ => {}
        }
        if self.offset.checked_add(self.len.into()).is_none_or(|end| end > size) {
            // A TRIM past the end is not ENOSPC, with the peers either.
            let writes = matches!(self.command, Command::Write | Command::WriteZeroes);
            return Err(if writes { NbdError::ENOSPC } else { NbdError::EINVAL });
        }
        if self.has(cmd_flag::DF) && self.len > CHUNK_MAX {
            return Err(NbdError::EOVERFLOW);
        }
        Ok(())
    }

    /// The client's error for an errno of the disk. ENOTSUP is reserved for one question: a WRITE_ZEROES that was not
    /// asked to be fast must not end with it.
    pub const fn error(&self, errno: i32) -> NbdError {
        match NbdError::from_errno(errno) {
            NbdError::ENOTSUP if !self.has(cmd_flag::FAST_ZERO) => NbdError::EINVAL,
            other => other,
        }
    }

    /// The head as it stands in shared memory: the first word has the magic and is never zero.
    pub fn to_words(&self) -> [u64; 4] {
        let what = u64::from(self.flags) << 16 | u64::from(self.command.code());
        [u64::from(REQUEST_MAGIC) << 32 | what, self.cookie, self.offset, self.len.into()]
    }

    /// Reads the words; `None` when they are not a valid request.
    pub fn from_words(words: [u64; 4]) -> Option<Self> {
        let [what, cookie, offset, len] = words;
        let [magic @ .., f0, f1, c0, c1] = what.to_be_bytes();
        (u32::from_be_bytes(magic) == REQUEST_MAGIC).then_some(())?;
        Some(Self {
            command: Command::from_code(u16::from_be_bytes([c0, c1])),
            flags: u16::from_be_bytes([f0, f1]),
            cookie,
            offset,
            len: u32::try_from(len).ok()?,
        })
    }
}
