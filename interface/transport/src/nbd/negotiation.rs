//! The handshake (fixed newstyle), one message of the client at a time.
//!
//! ```text
//! Greeting ─▶ ClientFlags ─▶ Options ⟲ ─ EXPORT_NAME, GO ─▶ Transmission
//!                  │            │
//!     unknown flags│            │ABORT, out of step, not to be answered
//!                  ▼            ▼
//!                      Ended
//! ```
//!
//! A step consumes a whole message or nothing and its replies are complete, so between two steps [`State`] is all there is
//! to know of a connection.

use zerocopy::{FromBytes, IntoBytes};

use super::{
    option,
    protocol::{
        ClientFlags, EXPORT_NAME_ZEROES, ExportNameReply, Greeting, MAGIC, OPTION_MAGIC, OptionHead, handshake_flag,
        opt, rep, transmission_flag,
    },
};

/// Longest data of an option that is looked at; longer ones are refused. The longest that makes sense is a name of 4096 bytes
/// and some queries.
pub const OPTION_BYTES_MAX: u32 = 16 << 10;
/// Longest data that is thrown away to stay in step with a client; beyond it the connection ends.
pub const SKIP_BYTES_MAX: u32 = 1 << 20;

const HEAD: usize = size_of::<OptionHead>();
const CLIENT_FLAGS: usize = size_of::<ClientFlags>();

/// What is exported. The empty name, the default export of the protocol, means it too.
#[derive(Clone, Copy, Debug)]
pub struct Export<'a> {
    /// The volume's name.
    pub name: &'a str,
    /// Bytes.
    pub size: u64,
}

impl Export<'_> {
    /// Whether a client that says this name means the volume.
    pub fn is_meant_by(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }
}

/// Where the handshake stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Phase {
    /// The server has to begin.
    Greeting = 1,
    /// The client's flags are to come.
    ClientFlags = 2,
    /// An option is to come.
    Options = 3,
    /// The handshake succeeded; requests are to come.
    Transmission = 4,
    /// The connection is to be closed, once what has been put out is sent.
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
    /// A connection nothing was said on.
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

    /// Reads a word; `None` when it is not valid, or says what this version does not know.
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

    /// What the client is told that the export can do. DF is about chunks, so it goes with structured replies only.
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

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing can be done before the input holds this many bytes; it holds fewer.
    Need(usize),
    /// A message was dealt with. In the phases Transmission and Ended there is nothing to deal with, and nothing changes.
    Done {
        /// Bytes of the input that are done with.
        consumed: usize,
        /// Further bytes of the stream that are to be thrown away unseen before the next step.
        skip: u64,
        /// The state after that.
        next: State,
    },
}

/// Deals with the first message of `input`, the bytes received and not consumed yet, and appends what is to be sent.
/// At most [`output_max`] bytes are appended, and none unless the step is done.
pub fn step(state: State, export: &Export<'_>, input: &[u8], output: &mut Vec<u8>) -> Step {
    match state.phase {
        Phase::Greeting => {
            let flags = (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).into();
            let greeting = Greeting { magic: MAGIC.into(), option_magic: OPTION_MAGIC.into(), flags };
            output.extend_from_slice(greeting.as_bytes());
            done(0, state.with(Phase::ClientFlags))
        }
        Phase::ClientFlags => match ClientFlags::read_from_prefix(input) {
            Ok((client, _)) => done(CLIENT_FLAGS, flags_agreed(state, client.flags.get())),
            Err(_) => Step::Need(CLIENT_FLAGS),
        },
        Phase::Options => match OptionHead::read_from_prefix(input) {
            Ok((head, data)) => answer(state, export, head, data, output),
            Err(_) => Step::Need(HEAD),
        },
        Phase::Transmission | Phase::Ended => done(0, state),
    }
}

/// The most that one [`step`] appends for this export.
pub const fn output_max(export: &Export<'_>) -> usize {
    // GO: five replies of at most a head and 64 bytes; two of them hold the name.
    5 * (20 + 64) + 2 * export.name.len()
}

const fn flag(is_set: bool, bit: u64) -> u64 {
    if is_set { bit } else { 0 }
}

const fn done(consumed: usize, next: State) -> Step {
    Step::Done { consumed, skip: 0, next }
}

fn flags_agreed(state: State, flags: u32) -> State {
    let (fixed, no_zeroes) = (u32::from(handshake_flag::FIXED_NEWSTYLE), u32::from(handshake_flag::NO_ZEROES));
    if flags & !(fixed | no_zeroes) != 0 {
        return state.with(Phase::Ended);
    }
    State { fixed: flags & fixed != 0, no_zeroes: flags & no_zeroes != 0, ..state.with(Phase::Options) }
}

fn answer(state: State, export: &Export<'_>, head: OptionHead, data: &[u8], output: &mut Vec<u8>) -> Step {
    let (option, len) = (head.option.get(), head.len.get());
    let ended = done(HEAD, state.with(Phase::Ended));
    // EXPORT_NAME is the one option a client may use that did not say it is fixed, and the one that cannot be refused in words.
    let wordless = option == opt::EXPORT_NAME;
    if head.magic.get() != OPTION_MAGIC || len > SKIP_BYTES_MAX || !(state.fixed || wordless) {
        return ended;
    }
    if len > OPTION_BYTES_MAX {
        if wordless {
            return ended;
        }
        option::refuse(output, option, rep::ERR_TOO_BIG, "the option is too long");
        return Step::Done { consumed: HEAD, skip: len.into(), next: option::without_selection(state, option) };
    }
    let Ok(len) = usize::try_from(len) else { return ended };
    let Some(data) = data.get(..len) else { return Step::Need(HEAD + len) };
    let next = if wordless {
        export_name(state, export, data, output)
    } else {
        option::answer(state, export, option, data, output)
    };
    done(HEAD + len, next)
}

fn export_name(state: State, export: &Export<'_>, name: &[u8], output: &mut Vec<u8>) -> State {
    if !export.is_meant_by(name) {
        return state.with(Phase::Ended);
    }
    let reply = ExportNameReply { size: export.size.into(), flags: state.transmission_flags().into() };
    output.extend_from_slice(reply.as_bytes());
    if !state.no_zeroes {
        output.extend_from_slice(&[0; EXPORT_NAME_ZEROES]);
    }
    state.with(Phase::Transmission)
}
