//! The replies.

use super::{
    super::{
        protocol::base_allocation,
        reply::{
            CHUNK_BYTES, ERROR_BYTES_MAX, MESSAGE_BYTES_MAX, NbdError, block_status, data, error, error_at, hole, none,
            simple,
        },
    },
    hex,
};

const COOKIE: u64 = 0x0102_0304_0506_0708;

#[test]
fn simple_replies() {
    assert_eq!(simple(COOKIE, Ok(())).as_slice(), hex("67446698 00000000 0102030405060708"));
    assert_eq!(simple(COOKIE, Err(NbdError::ENOSPC)).as_slice(), hex("67446698 0000001c 0102030405060708"));
}

#[test]
fn chunks_of_content() {
    let of = |flags: &str, kind: &str, rest: &str| hex(&format!("668e33ef {flags} {kind} 0102030405060708 {rest}"));
    assert_eq!(none(COOKIE).as_slice(), of("0001", "0000", "00000000"));
    assert_eq!(data(COOKIE, 4096, 512, false).as_slice(), of("0000", "0001", "00000208 0000000000001000"));
    assert_eq!(data(COOKIE, 4096, 512, true).as_slice(), of("0001", "0001", "00000208 0000000000001000"));
    assert_eq!(hole(COOKIE, 4096, 512, false).as_slice(), of("0000", "0002", "0000000c 0000000000001000 00000200"));
    assert_eq!(hole(COOKIE, 4096, 512, true).as_slice(), of("0001", "0002", "0000000c 0000000000001000 00000200"));
}

#[test]
fn chunks_of_errors() {
    let mut buf = [0xee; ERROR_BYTES_MAX];
    let len = error(&mut buf, COOKIE, NbdError::EINVAL, "no", true).unwrap();
    let expected = hex("668e33ef 0001 8001 0102030405060708 00000008 00000016 0002 6e6f");
    assert_eq!(buf[..len], expected);
    let len = error_at(&mut buf, COOKIE, NbdError::EIO, "no", 4096, false).unwrap();
    let expected = hex("668e33ef 0000 8002 0102030405060708 00000010 00000005 0002 6e6f 0000000000001000");
    assert_eq!(buf[..len], expected);
    for short in 0..len {
        assert_eq!(error_at(&mut buf[..short], COOKIE, NbdError::EIO, "no", 4096, false), None);
    }
    let len = error(&mut buf, COOKIE, NbdError::EIO, "", true).unwrap();
    assert_eq!(buf[..len], hex("668e33ef 0001 8001 0102030405060708 00000006 00000005 0000"));
}

#[test]
fn long_messages_are_cut_between_characters() {
    let mut buf = [0; ERROR_BYTES_MAX];
    let ascii = "x".repeat(MESSAGE_BYTES_MAX + 1);
    assert_eq!(error_at(&mut buf, COOKIE, NbdError::EIO, &ascii, 0, true), Some(ERROR_BYTES_MAX));
    let wide = "€".repeat(MESSAGE_BYTES_MAX);
    let len = error(&mut buf, COOKIE, NbdError::EIO, &wide, true).unwrap();
    let text = std::str::from_utf8(&buf[CHUNK_BYTES + 6..len]).unwrap();
    assert_eq!((text.len(), usize::from(buf[CHUNK_BYTES + 4]) << 8 | usize::from(buf[CHUNK_BYTES + 5])), (255, 255));
}

#[test]
fn chunks_of_status() {
    let mut buf = [0xee; 64];
    let extents = [(4096, 0), (65_536, base_allocation::HOLE | base_allocation::ZERO)];
    let len = block_status(&mut buf, COOKIE, &extents, true).unwrap();
    let expected = "668e33ef 0001 0005 0102030405060708 00000014 00000001 00001000 00000000 00010000 00000003";
    assert_eq!(buf[..len], hex(expected));
    assert_eq!(block_status(&mut buf[..len - 1], COOKIE, &extents, true), None);
    assert_eq!(block_status(&mut buf, COOKIE, &[], true), None);
}

#[test]
fn errno_values_have_names_in_the_protocol() {
    let pairs = [
        (1, 1),
        (5, 5),
        (12, 12),
        (22, 22),
        (27, 28),
        (28, 28),
        (30, 1),
        (75, 75),
        (95, 95),
        (108, 108),
        (122, 28),
        (0, 5),
        (-1, 5),
        (6, 5),
        (11, 5),
        (i32::MIN, 5),
        (i32::MAX, 5),
    ];
    for (errno, expected) in pairs {
        assert_eq!(NbdError::from_errno(errno).code(), expected, "errno {errno}");
    }
}
