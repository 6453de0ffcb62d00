//! The handshake.

use proptest::prelude::*;

use super::{
    super::{
        negotiation::{OPTION_BYTES_MAX, SKIP_BYTES_MAX, Step, output_max, step},
        state::{Export, Phase, State},
    },
    hex,
};

const EXPORT: Export<'static> = Export { name: "vol", size: 0x0123_4567_89ab_0000 };
const GREETING: &str = "4e42444d41474943 49484156454f5054 0003";
/// HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN, CACHE, FAST_ZERO.
const PLAIN: &str = "0d6d";
/// And DF.
const WITH_DF: &str = "0ded";

/// A connection that is served by [`step`].
struct Connection {
    state: State,
    received: Vec<u8>,
    skip: u64,
    sent: Vec<u8>,
}

impl Connection {
    fn new() -> Self {
        Self { state: State::START, received: Vec::new(), skip: 0, sent: Vec::new() }
    }

    /// Past the greeting, with these flags of the client.
    fn with_flags(flags: u8) -> Self {
        let mut connection = Self::new();
        connection.feed(&[0, 0, 0, flags]);
        assert_eq!(connection.take(), hex(GREETING));
        connection
    }

    /// With fixed newstyle and no zeros.
    fn fixed() -> Self {
        Self::with_flags(3)
    }

    fn feed(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
        loop {
            let skipped = self.received.len().min(usize::try_from(self.skip).unwrap());
            self.received.drain(..skipped);
            self.skip -= skipped as u64;
            if self.skip > 0 {
                return;
            }
            let before = self.sent.len();
            match step(self.state, &EXPORT, &self.received, &mut self.sent) {
                Step::Need(bytes) => {
                    assert!(bytes > self.received.len() && bytes <= 16 + OPTION_BYTES_MAX as usize);
                    assert_eq!(self.sent.len(), before);
                    return;
                }
                Step::Done { consumed, skip, next } => {
                    assert!(self.sent.len() - before <= output_max(&EXPORT));
                    assert!(skip <= SKIP_BYTES_MAX.into());
                    assert_eq!(State::from_word(next.to_word()), Some(next));
                    self.received.drain(..consumed);
                    self.skip = skip;
                    self.state = next;
                    if matches!(next.phase, Phase::Transmission | Phase::Ended) {
                        return;
                    }
                }
            }
        }
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.sent)
    }

    /// Sends an option and has the replies.
    fn ask(&mut self, code: u8, data: &[u8]) -> Vec<u8> {
        self.feed(&option(code, data));
        self.take()
    }
}

fn option(code: u8, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap().to_be_bytes();
    [b"IHAVEOPT\0\0\0".as_slice(), &[code], &len, data].concat()
}

/// A reply to the option, of this type.
fn reply(code: u8, kind: &str, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap().to_be_bytes();
    [hex("0003e889045565a9 000000").as_slice(), &[code], &hex(kind), &len, data].concat()
}

fn ack(code: u8) -> Vec<u8> {
    reply(code, "00000001", &[])
}

fn error(code: u8, number: u8, text: &str) -> Vec<u8> {
    reply(code, &format!("800000{number:02x}"), text.as_bytes())
}

/// Data of INFO and GO.
fn wanted(name: &str, infos: &[u16]) -> Vec<u8> {
    let count = u16::try_from(infos.len()).unwrap().to_be_bytes();
    let infos: Vec<u8> = infos.iter().flat_map(|info| info.to_be_bytes()).collect();
    [string(name), count.to_vec(), infos].concat()
}

fn string(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes(), text.as_bytes()].concat()
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let count = u32::try_from(queries.len()).unwrap().to_be_bytes().to_vec();
    [string(name), count, queries.iter().flat_map(|query| string(query)).collect()].concat()
}

/// Reply to INFO and GO with the flags, and in between what was asked for.
fn described(code: u8, flags: &str, between: &[Vec<u8>]) -> Vec<u8> {
    let about = reply(code, "00000003", &hex(&format!("0000 0123456789ab0000 {flags}")));
    let blocks = reply(code, "00000003", &hex("0003 00000001 00001000 02000000"));
    [about, between.concat(), blocks, ack(code)].concat()
}

const MALFORMED: &str = "the option is malformed";
const NO_DATA: &str = "the option has no data";
const UNKNOWN: &str = "this server has no export of that name";

#[test]
fn the_server_begins_and_the_client_tells_its_flags() {
    let mut out = Vec::new();
    let Step::Done { consumed: 0, skip: 0, next } = step(State::START, &EXPORT, &[], &mut out) else { panic!() };
    assert_eq!((next, out), (State::START.with(Phase::ClientFlags), hex(GREETING)));
    assert_eq!(step(next, &EXPORT, &[0, 0, 0], &mut Vec::new()), Step::Need(4));
    for flags in 0..4 {
        let state = Connection::with_flags(flags).state;
        assert_eq!((state.phase, state.fixed, state.no_zeroes), (Phase::Options, flags & 1 != 0, flags & 2 != 0));
    }
    for flags in [[0, 0, 0, 4], [0, 0, 1, 3], [0x80, 0, 0, 3]] {
        let mut connection = Connection::new();
        connection.feed(&flags);
        assert_eq!((connection.state.phase, connection.take()), (Phase::Ended, hex(GREETING)));
    }
}

#[test]
fn export_name_opens_the_volume_or_ends() {
    for name in ["", "vol"] {
        for (flags, zeros) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
            let mut connection = Connection::with_flags(flags);
            let expected = [hex("0123456789ab0000"), hex(PLAIN), vec![0; zeros]].concat();
            assert_eq!(connection.ask(1, name.as_bytes()), expected);
            assert_eq!(connection.state.phase, Phase::Transmission);
        }
    }
    for name in ["vo", "volu", "Vol", "vol\0"] {
        let mut connection = Connection::fixed();
        assert_eq!((connection.ask(1, name.as_bytes()), connection.state.phase), (vec![], Phase::Ended));
    }
}

#[test]
fn a_client_that_is_not_fixed_has_export_name_only() {
    for code in (0..=12).filter(|code| *code != 1) {
        let mut connection = Connection::with_flags(2);
        assert_eq!((connection.ask(code, &[]), connection.state.phase), (vec![], Phase::Ended));
    }
}

#[test]
fn abort_is_acknowledged_whatever_its_data() {
    for data in [b"".as_slice(), b"goodbye"] {
        let mut connection = Connection::fixed();
        assert_eq!((connection.ask(2, data), connection.state.phase), (ack(2), Phase::Ended));
    }
}

#[test]
fn list_names_the_volume() {
    let mut connection = Connection::fixed();
    assert_eq!(connection.ask(3, &[]), [reply(3, "00000002", b"\0\0\0\x03vol"), ack(3)].concat());
    assert_eq!(connection.ask(3, b"x"), error(3, 3, NO_DATA));
    assert_eq!(connection.state.phase, Phase::Options);
}

#[test]
fn info_and_go_tell_what_is_asked_once() {
    let name = |code| reply(code, "00000003", b"\0\x01vol");
    let description = |code| reply(code, "00000003", b"\0\x02Everdisk volume vol");
    for (code, after) in [(6, Phase::Options), (7, Phase::Transmission)] {
        let both = [name(code), description(code)];
        let cases = [
            ("", &[][..], &[][..]),
            ("vol", &[0, 3], &[]),
            ("vol", &[1], &both[..1]),
            ("", &[2, 2], &both[1..]),
            ("", &[2, 1, 0, 3], &both),
            ("vol", &[0xffff, 1, 1, 1, 4], &both[..1]),
        ];
        for (export, infos, between) in cases {
            let mut connection = Connection::fixed();
            assert_eq!(connection.ask(code, &wanted(export, infos)), described(code, PLAIN, between));
            assert_eq!(connection.state.phase, after);
        }
        // GO is never followed by zeros.
        assert_eq!(Connection::with_flags(1).ask(code, &wanted("", &[])), described(code, PLAIN, &[]));
    }
}

#[test]
fn info_and_go_refuse_and_go_on() {
    for code in [6, 7] {
        let mut connection = Connection::fixed();
        assert_eq!(connection.ask(code, &wanted("other", &[3])), error(code, 6, UNKNOWN));
        let sound = wanted("vol", &[0, 3]);
        for len in 0..sound.len() {
            assert_eq!(connection.ask(code, &sound[..len]), error(code, 3, MALFORMED));
        }
        for wrong in [[&*sound, &[0]].concat(), hex("ffffffff 0000"), hex("00000000 ffff 0000")] {
            assert_eq!(connection.ask(code, &wrong), error(code, 3, MALFORMED));
        }
        assert_eq!(connection.ask(code, &sound), described(code, PLAIN, &[]));
    }
}

#[test]
fn structured_replies_bring_df() {
    let mut connection = Connection::fixed();
    assert_eq!((connection.ask(8, b"x"), connection.state.structured), (error(8, 3, NO_DATA), false));
    assert_eq!((connection.ask(8, &[]), connection.state.structured), (ack(8), true));
    assert_eq!(connection.ask(8, &[]), ack(8));
    assert_eq!(connection.ask(7, &wanted("", &[])), described(7, WITH_DF, &[]));
    assert!(connection.state.structured);
}

#[test]
fn contexts_need_structured_replies() {
    let text = "metadata contexts need structured replies; agree on those first";
    for code in [9, 10] {
        assert_eq!(Connection::fixed().ask(code, &queries("", &["base:allocation"])), error(code, 3, text));
    }
}

#[test]
fn contexts_are_listed_and_selected() {
    let context = |code, id| reply(code, "00000004", &[&[0, 0, 0, id], b"base:allocation".as_slice()].concat());
    // Queries; whether they find the context in a list, and whether they select it.
    let cases: [(&[&str], bool, bool); 9] = [
        (&[], true, false),
        (&["base:"], true, false),
        (&["base:allocation"], true, true),
        (&["base:allocation", "base:allocation", "base:"], true, true),
        (&["qemu:dirty-bitmap:x", "base:allocation"], true, true),
        (&["qemu:"], false, false),
        (&["base:allocation2", "base:allocatio", "x-y:z"], false, false),
        (&["base"], false, false),
        (&[""], false, false),
    ];
    for (asked, listed, selected) in cases {
        let mut connection = Connection::fixed();
        let _ = connection.ask(8, &[]);
        let list = if listed { context(9, 0) } else { vec![] };
        assert_eq!(connection.ask(9, &queries("vol", asked)), [list, ack(9)].concat());
        assert!(!connection.state.base_allocation);
        let set = if selected { context(10, 1) } else { vec![] };
        assert_eq!(connection.ask(10, &queries("", asked)), [set, ack(10)].concat());
        assert_eq!(connection.state.base_allocation, selected);
        // The selection was made for the volume, and this is the volume.
        let _ = connection.ask(7, &wanted("vol", &[]));
        assert_eq!((connection.state.phase, connection.state.base_allocation), (Phase::Transmission, selected));
    }
}

#[test]
fn a_new_selection_replaces_the_old_one_even_when_it_fails() {
    let sound = queries("vol", &["base:allocation"]);
    let mut refused = vec![
        (queries("vol", &[]), None),
        (queries("other", &["base:allocation"]), Some((6, UNKNOWN))),
        ([&*sound, &[0]].concat(), Some((3, MALFORMED))),
        (vec![0; OPTION_BYTES_MAX as usize + 1], Some((9, "the option is too long"))),
        (hex("00000000 ffffffff"), Some((3, MALFORMED))),
    ];
    refused.extend((0..sound.len()).map(|len| (sound[..len].to_vec(), Some((3, MALFORMED)))));
    for (data, failure) in refused {
        let mut connection = Connection::fixed();
        let _ = (connection.ask(8, &[]), connection.ask(10, &sound));
        assert!(connection.state.base_allocation);
        // To list changes nothing.
        let _ = connection.ask(9, &data);
        assert!(connection.state.base_allocation);
        let expected = failure.map_or_else(|| ack(10), |(number, text)| error(10, number, text));
        assert_eq!(connection.ask(10, &data), expected);
        assert!(connection.state.structured && !connection.state.base_allocation);
    }
}

#[test]
fn what_is_not_built_is_unsupported_and_the_handshake_goes_on() {
    let unknown = "this server does not know the option";
    for (code, text) in
        [(5, "this server was built without TLS"), (0, unknown), (4, unknown), (11, unknown), (99, unknown)]
    {
        let mut connection = Connection::fixed();
        for data in [b"".as_slice(), b"data"] {
            assert_eq!(connection.ask(code, data), error(code, 1, text));
        }
        assert_eq!(connection.ask(7, &wanted("", &[])), described(7, PLAIN, &[]));
    }
}

#[test]
fn long_options_are_skipped_and_endless_ones_end() {
    for (len, number) in [(OPTION_BYTES_MAX, 1), (OPTION_BYTES_MAX + 1, 9), (SKIP_BYTES_MAX, 9)] {
        let mut connection = Connection::fixed();
        let replies = connection.ask(99, &vec![0x49; len as usize]);
        let text = if number == 1 { "this server does not know the option" } else { "the option is too long" };
        assert_eq!(replies, error(99, number, text));
        assert_eq!(connection.ask(2, &[]), ack(2));
    }
    let head = |code: u8, len: u32| [&option(code, &[])[..12], &len.to_be_bytes()].concat();
    // The refusal comes before the data.
    let mut connection = Connection::fixed();
    connection.feed(&head(6, OPTION_BYTES_MAX + 1));
    assert_eq!(connection.take(), error(6, 9, "the option is too long"));
    // A name cannot be refused in words.
    for (code, len) in [(99, SKIP_BYTES_MAX + 1), (7, u32::MAX), (1, OPTION_BYTES_MAX + 1)] {
        let mut connection = Connection::fixed();
        connection.feed(&head(code, len));
        assert_eq!((connection.take(), connection.state.phase), (vec![], Phase::Ended));
    }
    let mut connection = Connection::fixed();
    connection.feed(b"IHAVEOPS\0\0\0\x02\0\0\0\0");
    assert_eq!((connection.take(), connection.state.phase), (vec![], Phase::Ended));
}

#[test]
fn nothing_happens_after_the_end() {
    for phase in [Phase::Transmission, Phase::Ended] {
        let (state, mut out) = (State::START.with(phase), Vec::new());
        let nothing = Step::Done { consumed: 0, skip: 0, next: state };
        assert_eq!(step(state, &EXPORT, &option(2, &[]), &mut out), nothing);
        assert!(out.is_empty());
    }
}

/// The layout in shared memory is frozen: another version of the core reads it.
#[test]
fn words_of_states_are_frozen() {
    assert_eq!(State::START.to_word(), 1);
    let all =
        State { phase: Phase::Transmission, fixed: true, no_zeroes: true, structured: true, base_allocation: true };
    assert_eq!(all.to_word(), 0xf04);
    assert_eq!(State { no_zeroes: false, base_allocation: false, ..all.with(Phase::Options) }.to_word(), 0x503);
    for word in [0, 6, 0xff, 0x1004, 1 << 63 | 4] {
        assert_eq!(State::from_word(word), None);
    }
}

/// A client that mostly makes sense.
fn conversation() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just(""), Just("vol"), Just("other")];
    let query = prop_oneof![Just("base:"), Just("base:allocation"), Just("qemu:"), Just("")];
    let contexts = (name.clone(), prop::collection::vec(query, 0..4));
    let message = prop_oneof![
        (name, prop::collection::vec(0_u16..5, 0..5), 6_u8..8)
            .prop_map(|(name, infos, code)| { option(code, &wanted(name, &infos)) }),
        (contexts, 9_u8..11).prop_map(|((name, asked), code)| option(code, &queries(name, &asked))),
        (3_u8..13).prop_map(|code| option(code, &[])),
        (0_u8..13, prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(code, data)| option(code, &data)),
        (2_u8..13, 16_380_usize..16_400).prop_map(|(code, len)| option(code, &vec![0; len])),
        prop::collection::vec(any::<u8>(), 0..20),
    ];
    (0_u8..5, prop::collection::vec(message, 0..8))
        .prop_map(|(flags, messages)| [vec![0, 0, 0, flags], messages.concat()].concat())
}

proptest! {
    #[test]
    fn words_of_states_come_back(word in any::<u64>()) {
        for word in [word, word & 0xfff, word & 0xf07] {
            if let Some(state) = State::from_word(word) {
                prop_assert_eq!(state.to_word(), word);
            }
        }
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(word in 0_u64..0x1000, input in prop::collection::vec(any::<u8>(), 0..200)) {
        let state = State::from_word(word).unwrap_or(State::START);
        for input in [input.clone(), [b"IHAVEOPT\0\0\0".as_slice(), &input].concat()] {
            let mut connection = Connection { state, ..Connection::new() };
            connection.feed(&input);
        }
    }

    #[test]
    fn pieces_make_no_difference(input in conversation(), pieces in prop::collection::vec(1_usize..60, 1..50)) {
        let mut whole = Connection::new();
        whole.feed(&input);
        for pieces in [&pieces[..], &[1]] {
            let (mut cut, mut rest, mut sizes) = (Connection::new(), &input[..], pieces.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
                cut.feed(now);
                rest = later;
            }
            prop_assert_eq!(&cut.sent, &whole.sent);
            prop_assert_eq!(cut.state, whole.state);
            prop_assert_eq!(&cut.received, &whole.received);
        }
    }
}
