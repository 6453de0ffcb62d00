//! The requests of a connection, once the handshake is over.
#![deny(clippy::indexing_slicing)]

use zerocopy::FromBytes;

use super::{
    protocol::{CHUNK_MAX, PAYLOAD_MAX, REQUEST_MAGIC, RequestHead, cmd, cmd_flag},
    reply::NbdError,
    state::State,
};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Send data.
    Read,
    /// Take data.
    Write,
    /// Answer what is outstanding and close the connection; there is no reply.
    Disconnect,
    /// Make everything acknowledged durable.
    Flush,
    /// The range is not needed any more.
    Trim,
    /// The range will be needed soon.
    Cache,
    /// Make the range read as zeros.
    WriteZeroes,
    /// Tell what is allocated.
    BlockStatus,
    /// Another number.
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
    /// What is to be done.
    pub command: Command,
    /// How: [`cmd_flag`].
    pub flags: u16,
    /// What the reply is known by.
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

    /// Bytes that follow the head in the stream. They follow also when [`Request::check`] refuses the request, and may be more
    /// than [`PAYLOAD_MAX`] then: whoever does not want to throw so much away may close the connection.
    pub fn payload(&self) -> u64 {
        if self.command == Command::Write { self.len.into() } else { 0 }
    }

    /// Whether it has this flag.
    pub const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Whether it may be executed on an export of this size; the range lies within the export then. A range of no bytes is
    /// none to fail for (the protocol leaves it open): there is nothing to do, and it succeeds.
    ///
    /// # Errors
    /// What the client is to be told.
    pub fn check(&self, state: State, size: u64) -> Result<(), NbdError> {
        // FUA is accepted with every command, as proto.md demands of who offers it; it means something to those that write.
        let known = cmd_flag::FUA
            | match self.command {
                // There is no reply, so there is nothing to refuse it with.
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
            // Its range has to be zero. As with QEMU, and not as with nbdkit, it is not looked at: to flush everything is
            // never less than what is asked.
            Command::Flush => return Ok(()),
            Command::Read | Command::Write if self.len > PAYLOAD_MAX => return Err(NbdError::EINVAL),
            // A reply has one extent at least, and there is none of no bytes.
            Command::BlockStatus if !state.base_allocation || self.len == 0 => return Err(NbdError::EINVAL),
            _ => {}
        }
        if self.offset.checked_add(self.len.into()).is_none_or(|end| end > size) {
            // As the peers have it, a TRIM past the end is no want of space.
            let writes = matches!(self.command, Command::Write | Command::WriteZeroes);
            return Err(if writes { NbdError::ENOSPC } else { NbdError::EINVAL });
        }
        if self.has(cmd_flag::DF) && self.len > CHUNK_MAX {
            return Err(NbdError::EOVERFLOW);
        }
        Ok(())
    }

    /// What the client is told when the disk fails it with this errno. ENOTSUP is kept for the one question it answers: a
    /// WRITE_ZEROES that was not asked to be fast must not end with it.
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

    /// Reads the words; `None` when they are not those of a request.
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
