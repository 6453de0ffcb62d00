//! The options of the handshake that have replies: the client's questions, and the answers.
#![deny(clippy::indexing_slicing)]

use zerocopy::{
    FromBytes, IntoBytes,
    network_endian::{U16, U32},
};

use super::{
    protocol::{
        BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, InfoBlockSize, InfoExport, OPTION_REPLY_MAGIC, OptionReplyHead,
        PAYLOAD_MAX, base_allocation, info, opt, rep,
    },
    state::{Export, Phase, State},
};

/// Answers one option and returns the state after it.
pub(super) fn answer(state: State, export: &Export<'_>, option: u32, data: &[u8], output: &mut Vec<u8>) -> State {
    let state = without_selection(state, option);
    let result = match option {
        // The data of an ABORT is ignored.
        opt::ABORT => Ok(state.with(Phase::Ended)),
        opt::LIST => list(state, export, data, output),
        opt::INFO | opt::GO => describe(state, export, option, data, output),
        opt::STRUCTURED_REPLY => empty(data).map(|()| State { structured: true, ..state }),
        opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => contexts(state, export, option, data, output),
        opt::STARTTLS => Err(Refusal(rep::ERR_UNSUP, "this server was built without TLS")),
        _ => Err(Refusal(rep::ERR_UNSUP, "this server does not know the option")),
    };
    match result {
        Ok(next) => {
            reply(output, option, rep::ACK, &[]);
            next
        }
        Err(Refusal(kind, text)) => {
            refuse(output, option, kind, text);
            state
        }
    }
}

/// The state an option begins with: SET_META_CONTEXT replaces the selection, also when it fails.
pub(super) const fn without_selection(state: State, option: u32) -> State {
    State { base_allocation: state.base_allocation && option != opt::SET_META_CONTEXT, ..state }
}

/// An error reply, with a text for the person at the client.
pub(super) fn refuse(output: &mut Vec<u8>, option: u32, kind: u32, text: &str) {
    reply(output, option, kind, &[text.as_bytes()]);
}

fn reply(output: &mut Vec<u8>, option: u32, kind: u32, data: &[&[u8]]) {
    // Every reply here consists of a few numbers and at most the volume's name.
    let len = u32::try_from(data.iter().map(|part| part.len()).sum::<usize>()).expect("a reply is short");
    let magic = OPTION_REPLY_MAGIC.into();
    let head = OptionReplyHead { magic, option: option.into(), kind: kind.into(), len: len.into() };
    output.extend_from_slice(head.as_bytes());
    data.iter().for_each(|part| output.extend_from_slice(part));
}

/// Type and text of an error reply.
struct Refusal(u32, &'static str);

const MALFORMED: Refusal = Refusal(rep::ERR_INVALID, "the option is malformed");
const UNKNOWN: Refusal = Refusal(rep::ERR_UNKNOWN, "this server has no export of that name");

/// Checks that the option has no data; otherwise it is refused.
const fn empty(data: &[u8]) -> Result<(), Refusal> {
    if data.is_empty() { Ok(()) } else { Err(Refusal(rep::ERR_INVALID, "the option has no data")) }
}

fn list(state: State, export: &Export<'_>, data: &[u8], output: &mut Vec<u8>) -> Result<State, Refusal> {
    empty(data)?;
    let len = U32::new(u32::try_from(export.name.len()).expect("a name is short"));
    reply(output, opt::LIST, rep::SERVER, &[len.as_bytes(), export.name.as_bytes()]);
    Ok(state)
}

/// INFO and GO: the same replies, and GO goes on to the requests.
fn describe(
    state: State,
    export: &Export<'_>,
    option: u32,
    data: &[u8],
    output: &mut Vec<u8>,
) -> Result<State, Refusal> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = usize::from(fields.take::<U16>()?.get());
    let asked = <[U16]>::ref_from_bytes_with_elems(fields.0, count).map_err(|_| MALFORMED)?;
    if !export.is_meant_by(name) {
        return Err(UNKNOWN);
    }
    let flags = state.transmission_flags().into();
    let about = InfoExport { kind: info::EXPORT.into(), size: export.size.into(), flags };
    reply(output, option, rep::INFO, &[about.as_bytes()]);
    // An information that is requested twice is sent once.
    let is_asked = |kind| asked.iter().any(|one| one.get() == kind);
    if is_asked(info::NAME) {
        reply(output, option, rep::INFO, &[U16::new(info::NAME).as_bytes(), export.name.as_bytes()]);
    }
    if is_asked(info::DESCRIPTION) {
        let kind = U16::new(info::DESCRIPTION);
        reply(output, option, rep::INFO, &[kind.as_bytes(), b"Everdisk volume ", export.name.as_bytes()]);
    }
    // Sent without being requested: it is no condition. Clients that do not know it have to ignore it, and the others
    // profit.
    let blocks = InfoBlockSize {
        kind: info::BLOCK_SIZE.into(),
        min: BLOCK_BYTES_MIN.into(),
        preferred: BLOCK_BYTES_PREFERRED.into(),
        max: PAYLOAD_MAX.into(),
    };
    reply(output, option, rep::INFO, &[blocks.as_bytes()]);
    Ok(if option == opt::GO { state.with(Phase::Transmission) } else { state })
}

/// LIST_META_CONTEXT and SET_META_CONTEXT. A context is named once, however many queries find it. Queries that find
/// none are ignored, whether for their namespace, for their leaf or for lack of a colon.
fn contexts(
    state: State,
    export: &Export<'_>,
    option: u32,
    data: &[u8],
    output: &mut Vec<u8>,
) -> Result<State, Refusal> {
    if !state.structured {
        return Err(Refusal(rep::ERR_INVALID, "metadata contexts need structured replies; agree on those first"));
    }
    let set = option == opt::SET_META_CONTEXT;
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.take::<U32>()?.get();
    // Without a query every context is listed, and none is selected.
    let mut found = count == 0 && !set;
    // A wrong count ends with the data.
    for _ in 0..count {
        let query = fields.string()?;
        let wildcard = !set && query == base_allocation::WILDCARD.as_bytes();
        found |= wildcard || query == base_allocation::NAME.as_bytes();
    }
    if !fields.0.is_empty() {
        return Err(MALFORMED);
    }
    if !export.is_meant_by(name) {
        return Err(UNKNOWN);
    }
    if found {
        // In a list the number means nothing.
        let id = U32::new(if set { base_allocation::ID } else { 0 });
        reply(output, option, rep::META_CONTEXT, &[id.as_bytes(), base_allocation::NAME.as_bytes()]);
    }
    Ok(if set { State { base_allocation: found, ..state } } else { state })
}

/// The rest of an option's data.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<T: FromBytes>(&mut self) -> Result<T, Refusal> {
        let (number, rest) = T::read_from_prefix(self.0).map_err(|_| MALFORMED)?;
        self.0 = rest;
        Ok(number)
    }

    /// Bytes with their count before them.
    fn string(&mut self) -> Result<&'a [u8], Refusal> {
        let len = usize::try_from(self.take::<U32>()?.get()).map_err(|_| MALFORMED)?;
        let (string, rest) = self.0.split_at_checked(len).ok_or(MALFORMED)?;
        self.0 = rest;
        Ok(string)
    }
}
