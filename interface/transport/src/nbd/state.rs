//! The agreement with a client: how far the handshake has come and what it has settled, as one word of shared memory.
#![deny(clippy::indexing_slicing)]

use super::protocol::transmission_flag;

/// The export. The empty name, the protocol's default export, means it too.
#[derive(Clone, Copy, Debug)]
pub struct Export<'a> {
    /// The volume's name.
    pub name: &'a str,
    /// Bytes.
    pub size: u64,
}

impl Export<'_> {
    /// Whether a client that gives this name means the volume.
    pub fn is_meant_by(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }
}

/// Where the handshake stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Phase {
    /// The server has to send its greeting.
    Greeting = 1,
    /// The client's flags are expected.
    ClientFlags = 2,
    /// An option is expected.
    Options = 3,
    /// The handshake succeeded; requests are expected.
    Transmission = 4,
    /// The connection is to be closed once the pending output is sent.
    Ended = 5,
}

/// Where the handshake stands and what was agreed.
///
/// ```text
///  63                12   11     10      9       8    7      0
/// ┌────────────────────┬──────┬──────┬───────┬───────┬────────┐
/// │          0         │ base │struct│no zero│ fixed │phase(8)│    phase 0 is no phase: a zeroed word is no state
/// └────────────────────┴──────┴──────┴───────┴───────┴────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Where it stands.
    pub phase: Phase,
    /// The client understands replies to options.
    pub fixed: bool,
    /// The reply to EXPORT_NAME has no zeros behind it.
    pub no_zeroes: bool,
    /// Reads are answered with structured replies.
    pub structured: bool,
    /// The context base:allocation is selected.
    ///
    /// The protocol binds a selection to the name it was made with. Here every name that is not refused means the one volume
    /// and every SET_META_CONTEXT replaces the selection, also when it fails; so a selection that stands was made for the
    /// volume that GO or EXPORT_NAME opens, be it by its name or by the empty one (QEMU compares exports and not names, too).
    pub base_allocation: bool,
}

const FIXED: u64 = 1 << 8;
const NO_ZEROES: u64 = 1 << 9;
const STRUCTURED: u64 = 1 << 10;
const BASE_ALLOCATION: u64 = 1 << 11;
const KNOWN: u64 = 0xff | FIXED | NO_ZEROES | STRUCTURED | BASE_ALLOCATION;

impl State {
    /// The state of a new connection.
    pub const START: Self =
        Self { phase: Phase::Greeting, fixed: false, no_zeroes: false, structured: false, base_allocation: false };

    /// The state as it stands in shared memory.
    pub const fn to_word(self) -> u64 {
        self.phase as u64
            | flag(self.fixed, FIXED)
            | flag(self.no_zeroes, NO_ZEROES)
            | flag(self.structured, STRUCTURED)
            | flag(self.base_allocation, BASE_ALLOCATION)
    }

    /// Reads a word; `None` when it is invalid, or has bits that this version does not know.
    pub const fn from_word(word: u64) -> Option<Self> {
        let phase = match word & 0xff {
            1 => Phase::Greeting,
            2 => Phase::ClientFlags,
            3 => Phase::Options,
            4 => Phase::Transmission,
            5 => Phase::Ended,
            _ => return None,
        };
        if word & !KNOWN != 0 {
            return None;
        }
        Some(Self {
            phase,
            fixed: word & FIXED != 0,
            no_zeroes: word & NO_ZEROES != 0,
            structured: word & STRUCTURED != 0,
            base_allocation: word & BASE_ALLOCATION != 0,
        })
    }

    /// The same agreement in another phase.
    #[must_use]
    pub const fn with(self, phase: Phase) -> Self {
        Self { phase, ..self }
    }

    /// The flags of the export for this client. DF is about chunks, so it is offered with structured replies only.
    pub const fn transmission_flags(self) -> u16 {
        let always = transmission_flag::HAS_FLAGS
            | transmission_flag::SEND_FLUSH
            | transmission_flag::SEND_FUA
            | transmission_flag::SEND_TRIM
            | transmission_flag::SEND_WRITE_ZEROES
            | transmission_flag::SEND_FAST_ZERO
            | transmission_flag::SEND_CACHE
            | transmission_flag::CAN_MULTI_CONN;
        if self.structured { always | transmission_flag::SEND_DF } else { always }
    }
}

const fn flag(is_set: bool, bit: u64) -> u64 {
    if is_set { bit } else { 0 }
}
