//! The codec on arbitrary bytes, and against a model.

use everdisk_proto::nbd::wire::{REQUEST_MAGIC, RequestHead, chunk, cmd};
use proptest::{collection::vec, prelude::*};
use zerocopy::{
    FromBytes, IntoBytes,
    network_endian::{U16, U32, U64},
};

use super::{
    assembly::{Answer, Asked, Assembly, Body},
    coverage::{Coverage, Refused, SCATTERED_MAX},
    handshake::{context, greeting, information, refusal, reply_head},
    reply::{Extent, Head, Violation, data_offset, error, head, hole, status},
    request,
};

fn asked(command: u16) -> Asked {
    Asked { command, offset: 1000, len: 500, structured: true, context: Some(1) }
}

/// Bytes that are arbitrary, or begin as a reply does.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let magic = prop_oneof![
        Just(vec![]),
        Just(0x6744_6698_u32.to_be_bytes().to_vec()),
        Just(0x668e_33ef_u32.to_be_bytes().to_vec())
    ];
    (magic, vec(any::<u8>(), 0..100)).prop_map(|(magic, rest)| [magic, rest].concat())
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_read_or_refused(bytes in bytes(), kind in any::<u16>(), asked_len in any::<u32>()) {
        if let Ok(Some((_, len))) = head(&bytes) {
            prop_assert!(len <= bytes.len());
        }
        let _ = data_offset(&bytes);
        let _ = hole(&bytes);
        let _ = error(kind, &bytes);
        let _ = information(&bytes);
        let _ = context(&bytes);
        prop_assert!(!refusal(0, &bytes).text.chars().any(char::is_control));
        if let Ok(extents) = status(&bytes, 1, asked_len) {
            prop_assert!(!extents.is_empty());
        }
        if let Some(first) = bytes.first_chunk() {
            let _ = greeting(first);
        }
        if let Some(first) = bytes.first_chunk() {
            let _ = reply_head(first, 7);
        }
    }

    /// A READ succeeds only if each of its bytes has come once, in any order of chunks.
    #[test]
    fn a_read_is_whole_or_fails(
        parts in vec((0_u64..2000, 0_u32..700, any::<bool>()), 0..6),
        kinds in vec(any::<u16>(), 0..2),
    ) {
        let mut assembly = Assembly::new(asked(cmd::READ));
        let mut counts = [0_u32; 500];
        for (offset, len, is_hole) in parts {
            let taken = if is_hole {
                let body = [U64::new(offset).as_bytes(), U32::new(len).as_bytes()].concat();
                assembly.small(chunk::OFFSET_HOLE, &body).map(|range| range.expect("a hole has a range"))
            } else {
                assembly.chunk(chunk::OFFSET_DATA, false, len + 8).and_then(|_| assembly.data(offset, len))
            };
            match taken {
                Ok(range) => counts[range].iter_mut().for_each(|count| *count += 1),
                Err(_) => return Ok(()),
            }
        }
        for kind in kinds {
            let _ = assembly.chunk(kind, true, 0);
        }
        prop_assert!(counts.iter().all(|count| *count <= 1));
        let is_whole = counts.iter().all(|count| *count == 1);
        prop_assert_eq!(assembly.finish() == Ok(Answer::Done), is_whole);
    }

    #[test]
    fn coverage_is_that_of_a_map_of_bytes(ranges in vec((0_u64..200, 1_u64..30), 0..40)) {
        let (mut coverage, mut map) = (Coverage::default(), [false; 300]);
        for (start, len) in ranges {
            let range = usize::try_from(start).unwrap()..usize::try_from(start + len).unwrap();
            let is_free = !map[range.clone()].contains(&true);
            prop_assert_eq!(coverage.add(start, start + len).is_ok(), is_free);
            if is_free {
                map[range].fill(true);
            }
            prop_assert_eq!(coverage.bytes(), u64::try_from(map.iter().filter(|byte| **byte).count()).unwrap());
        }
    }

    #[test]
    fn a_request_round_trips(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) {
        let bytes = request(command, flags, cookie, offset, len);
        let read = RequestHead::read_from_bytes(&bytes).unwrap();
        prop_assert_eq!(read.magic.get(), REQUEST_MAGIC);
        prop_assert_eq!((read.command.get(), read.flags.get(), read.cookie.get()), (command, flags, cookie));
        prop_assert_eq!((read.offset.get(), read.len.get()), (offset, len));
    }
}

#[test]
fn a_head_is_read_when_it_is_whole() {
    let chunk =
        [&0x668e_33ef_u32.to_be_bytes()[..], &[0, 1, 0, 2], &7_u64.to_be_bytes(), &12_u32.to_be_bytes()].concat();
    for len in 0..chunk.len() {
        assert_eq!(head(&chunk[..len]), Ok(None));
    }
    let expected = Head::Chunk { cookie: 7, kind: 2, last: true, len: 12 };
    assert_eq!(head(&chunk), Ok(Some((expected, 20))));
    assert_eq!(head(b"HTTP"), Err(Violation::Magic(0x4854_5450)));
}

#[test]
fn a_coverage_is_not_scattered_without_a_limit() {
    let mut coverage = Coverage::default();
    let limit = u64::try_from(SCATTERED_MAX).unwrap();
    for index in 0..limit {
        coverage.add(1 + 2 * index, 2 + 2 * index).unwrap();
    }
    assert_eq!(coverage.add(1 + 2 * limit, 2 + 2 * limit), Err(Refused::Scattered));
    assert_eq!(coverage.add(0, 1), Ok(()), "what joins others is no further part");
    assert_eq!(coverage.bytes(), limit + 1);
}

fn extents(list: &[(u32, u32)]) -> Vec<u8> {
    let pairs = list.iter().flat_map(|(len, flags)| [len.to_be_bytes(), flags.to_be_bytes()]);
    [1_u32.to_be_bytes()].into_iter().chain(pairs).flatten().collect()
}

#[test]
fn a_block_status_is_one_of_the_context_agreed_upon() {
    let told = status(&extents(&[(100, 0), (4_000_000_000, 3)]), 1, 500).unwrap();
    let expected =
        [Extent { len: 100, hole: false, zero: false }, Extent { len: 4_000_000_000, hole: true, zero: true }];
    assert_eq!(told, expected);
    assert_eq!(status(&extents(&[(500, 0), (1, 0)]), 1, 500), Err(Violation::OverlongStatus));
    assert_eq!(status(&extents(&[(0, 0)]), 1, 500), Err(Violation::EmptyExtent));
    assert_eq!(status(&extents(&[(1, 0)]), 2, 500), Err(Violation::ForeignContext { wanted: 2, got: 1 }));
    assert!(matches!(status(&extents(&[]), 1, 500), Err(Violation::ChunkLength { .. })));
    let mut assembly = Assembly::new(asked(cmd::BLOCK_STATUS));
    assert_eq!(assembly.clone().finish(), Err(Violation::NoStatus));
    assembly.small(chunk::BLOCK_STATUS, &extents(&[(1, 0)])).unwrap();
    assert_eq!(assembly.small(chunk::BLOCK_STATUS, &extents(&[(1, 0)])), Err(Violation::SecondStatus));
}

#[test]
fn the_first_error_of_a_reply_counts_and_an_unknown_type_of_error_is_one() {
    let chunk = |number: u32, text: &[u8], more: &[u8]| {
        let len = U16::new(u16::try_from(text.len()).unwrap());
        [U32::new(number).as_bytes(), len.as_bytes(), text, more].concat()
    };
    let mut assembly = Assembly::new(asked(cmd::WRITE));
    assert_eq!(assembly.chunk(0x8123, false, 20), Ok(Body::Small));
    assembly.small(0x8123, &chunk(28, b"full\n", b"fields")).unwrap();
    assembly.small(chunk::ERROR_OFFSET, &chunk(5, b"", &1001_u64.to_be_bytes())).unwrap();
    let Ok(Answer::Failed(said)) = assembly.finish() else { panic!("it has failed") };
    assert_eq!((said.number, said.text.as_str(), said.offset), (28, "full ", None));
    let outside = Assembly::new(asked(cmd::WRITE)).small(chunk::ERROR_OFFSET, &chunk(5, b"", &1500_u64.to_be_bytes()));
    assert!(matches!(outside, Err(Violation::OutOfRange { .. })));
    assert_eq!(error(chunk::ERROR, &chunk(0, b"", b"")), Err(Violation::ErrorZero));
}
