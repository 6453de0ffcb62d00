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
//! A step consumes a whole message or nothing, and its replies are complete. So between two steps a connection is fully
//! described by its [`State`](super::state::State).
#![deny(clippy::indexing_slicing)]

use zerocopy::{FromBytes, IntoBytes};

use super::{
    option,
    protocol::{
        ClientFlags, EXPORT_NAME_ZEROES, ExportNameReply, Greeting, MAGIC, OPTION_MAGIC, OptionHead, handshake_flag,
        opt, rep,
    },
    state::{Export, Phase, State},
};

/// Longest data of an option that is read; a longer option is refused. The longest that makes sense is a name of 4096
/// bytes and some queries.
pub const OPTION_BYTES_MAX: u32 = 16 << 10;
/// Longest data that is discarded to stay in step with a client; beyond it the connection ends.
pub const SKIP_BYTES_MAX: u32 = 1 << 20;

const HEAD: usize = size_of::<OptionHead>();
const CLIENT_FLAGS: usize = size_of::<ClientFlags>();

/// The outcome of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing can be done before the input holds this many bytes; it holds fewer.
    Need(usize),
    /// A message was processed. In the phases Transmission and Ended there is no message, and nothing changes.
    Done {
        /// Bytes of the input that were consumed.
        consumed: usize,
        /// Further bytes of the stream that are to be discarded unread before the next step.
        skip: u64,
        /// The state after the step.
        next: State,
    },
}

/// Processes the first message of `input` (the bytes received and not consumed yet) and appends the replies. At most
/// [`output_max`] bytes are appended, and none unless the step is done.
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
    // GO: five replies, each at most a head and 64 bytes; two of them hold the name.
    5 * (20 + 64) + 2 * export.name.len()
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
    // EXPORT_NAME is the one option that a client without fixed newstyle may use, and the one that cannot be refused by
    // a reply.
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
