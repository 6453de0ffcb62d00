//! The requests.

use proptest::prelude::*;

use super::{
    super::{
        protocol::{CHUNK_MAX, PAYLOAD_MAX, cmd_flag},
        reply::NbdError,
        request::{Command, Request},
        state::{Phase, State},
    },
    hex,
};

const SIZE: u64 = 1 << 30;
const PLAIN: State = State::START.with(Phase::Transmission);
const STRUCTURED: State = State { structured: true, ..PLAIN };
const WITH_CONTEXT: State = State { base_allocation: true, ..STRUCTURED };
const RANGED: [Command; 6] =
    [Command::Read, Command::Write, Command::Trim, Command::Cache, Command::WriteZeroes, Command::BlockStatus];

fn request(command: Command, flags: u16, offset: u64, len: u32) -> Request {
    Request { command, flags, cookie: 7, offset, len }
}

fn writes(command: Command) -> bool {
    matches!(command, Command::Write | Command::WriteZeroes)
}

#[test]
fn a_head_is_read() {
    let bytes = hex("25609513 0012 0006 0102030405060708 1112131415161718 21222324");
    let head = Request {
        command: Command::WriteZeroes,
        flags: cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1112_1314_1516_1718,
        len: 0x2122_2324,
    };
    assert_eq!(Request::decode(bytes.as_slice().try_into().unwrap()), Some(head));
    for at in 0..4 {
        let mut bytes: [u8; 28] = bytes.as_slice().try_into().unwrap();
        bytes[at] ^= 1;
        assert_eq!(Request::decode(&bytes), None);
    }
    for code in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xffff] {
        let command = Command::from_code(code);
        assert_eq!((command.code(), code > 7), (code, matches!(command, Command::Unknown(_))));
        let payload = request(command, 0, 0, u32::MAX).payload();
        assert_eq!(payload, if code == 1 { u32::MAX.into() } else { 0 });
    }
}

/// The layout in shared memory is frozen: another version of the core reads it.
#[test]
fn words_of_requests_are_frozen() {
    let words = [0x2560_9513_0001_0001, 7, 4096, 512];
    let write = request(Command::Write, cmd_flag::FUA, 4096, 512);
    assert_eq!((write.to_words(), Request::from_words(words)), (words, Some(write)));
    for words in [[0; 4], [0x0001_0001, 7, 4096, 512], [0x2560_9513_0001_0001, 7, 4096, 1 << 32]] {
        assert_eq!(Request::from_words(words), None);
    }
}

#[test]
fn ranges_lie_within_the_export() {
    for command in RANGED {
        let check = |offset, len| request(command, 0, offset, len).check(WITH_CONTEXT, SIZE);
        let beyond = Err(if writes(command) { NbdError::ENOSPC } else { NbdError::EINVAL });
        for (offset, len) in [(0, 1), (1, 511), (SIZE - 1, 1), (SIZE - 4096, 4096), (0, PAYLOAD_MAX)] {
            assert_eq!(check(offset, len), Ok(()), "{command:?} {offset} {len}");
        }
        for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (SIZE + 1, 0), (u64::MAX, 1), (u64::MAX, PAYLOAD_MAX)] {
            let expected = if len == 0 && command == Command::BlockStatus { Err(NbdError::EINVAL) } else { beyond };
            assert_eq!(check(offset, len), expected, "{command:?} {offset} {len}");
        }
        // Nothing is asked.
        let nothing = if command == Command::BlockStatus { Err(NbdError::EINVAL) } else { Ok(()) };
        assert_eq!((check(0, 0), check(SIZE, 0)), (nothing, nothing));
    }
}

#[test]
fn only_payloads_have_a_limit() {
    for command in RANGED {
        let limited = matches!(command, Command::Read | Command::Write);
        let expected = if limited { Err(NbdError::EINVAL) } else { Ok(()) };
        assert_eq!(request(command, 0, 0, PAYLOAD_MAX + 1).check(WITH_CONTEXT, SIZE), expected);
        assert_eq!(request(command, 0, 0, u32::MAX).check(WITH_CONTEXT, u64::MAX), expected);
    }
    let unfragmented = |len| request(Command::Read, cmd_flag::DF, 0, len).check(STRUCTURED, SIZE);
    assert_eq!((unfragmented(65_536), unfragmented(CHUNK_MAX)), (Ok(()), Ok(())));
    assert_eq!(unfragmented(CHUNK_MAX + 1), Err(NbdError::EOVERFLOW));
    assert_eq!(unfragmented(PAYLOAD_MAX + 1), Err(NbdError::EINVAL));
}

#[test]
fn flags_belong_to_commands() {
    for command in RANGED.into_iter().chain([Command::Flush]) {
        for bit in 0..16 {
            let flag = 1 << bit;
            for state in [PLAIN, STRUCTURED, WITH_CONTEXT] {
                let valid = match flag {
                    cmd_flag::FUA => true,
                    cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO => command == Command::WriteZeroes,
                    cmd_flag::DF => command == Command::Read && state.structured,
                    cmd_flag::REQ_ONE => command == Command::BlockStatus,
                    _ => false,
                };
                let valid = valid && (command != Command::BlockStatus || state.base_allocation);
                let expected = if valid { Ok(()) } else { Err(NbdError::EINVAL) };
                assert_eq!(request(command, flag, 0, 512).check(state, SIZE), expected, "{command:?} {flag:#x}");
            }
        }
    }
    let all = cmd_flag::FUA | cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO;
    assert_eq!(request(Command::WriteZeroes, all, 0, 512).check(PLAIN, SIZE), Ok(()));
}

#[test]
fn block_status_needs_its_context() {
    for (state, expected) in
        [(PLAIN, Err(NbdError::EINVAL)), (STRUCTURED, Err(NbdError::EINVAL)), (WITH_CONTEXT, Ok(()))]
    {
        assert_eq!(request(Command::BlockStatus, 0, 0, 512).check(state, SIZE), expected);
    }
}

#[test]
fn a_flush_and_the_end_have_no_range_and_what_is_unknown_no_meaning() {
    assert_eq!(request(Command::Flush, cmd_flag::FUA, SIZE, 1).check(PLAIN, SIZE), Ok(()));
    assert_eq!(request(Command::Disconnect, 0xffff, SIZE, 1).check(PLAIN, SIZE), Ok(()));
    for code in [8, 0xffff] {
        assert_eq!(request(Command::Unknown(code), 0, 0, 0).check(WITH_CONTEXT, SIZE), Err(NbdError::EINVAL));
    }
}

#[test]
fn only_fast_zeroing_is_not_supported() {
    let error = |flags| request(Command::WriteZeroes, flags, 0, 512).error(95);
    assert_eq!(error(cmd_flag::FAST_ZERO), NbdError::ENOTSUP);
    assert_eq!(error(0), NbdError::EINVAL);
    assert_eq!(request(Command::Write, 0, 0, 512).error(28), NbdError::ENOSPC);
}

proptest! {
    #[test]
    fn words_of_requests_come_back(
        code in prop_oneof![0_u16..10, any::<u16>()], flags in any::<u16>(), cookie in any::<u64>(), offset in any::<u64>(),
        len in any::<u32>(),
    ) {
        let request = Request { command: Command::from_code(code), flags, cookie, offset, len };
        prop_assert_eq!(Request::from_words(request.to_words()), Some(request));
    }

    #[test]
    fn what_passes_can_be_executed(
        code in 0_u16..9, flags in 0_u16..64, offset in prop_oneof![0..2 * SIZE, any::<u64>()],
        len in prop_oneof![0..2 * PAYLOAD_MAX, any::<u32>()], word in 0_u64..0x1000,
    ) {
        let request = Request { command: Command::from_code(code), flags, cookie: 0, offset, len };
        let state = State::from_word(word).unwrap_or(WITH_CONTEXT);
        if request.check(state, SIZE).is_ok() && RANGED.contains(&request.command) {
            prop_assert!(offset <= SIZE && u64::from(len) <= SIZE - offset);
            prop_assert!(code > 1 || len <= PAYLOAD_MAX);
        }
    }
}
