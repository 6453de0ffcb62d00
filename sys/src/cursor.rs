//! Positions of streams that the kernel itself records, within the system call that moves them: `everdisk_proto::connection`.

use std::{
    io,
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

use everdisk_proto::connection::{CALL_LEN, Cursor};

/// The layout that the words of a call have in `everdisk_proto::connection`.
const _: () = {
    assert!(cfg!(target_pointer_width = "64") && cfg!(target_endian = "little"));
    assert!(size_of::<libc::mmsghdr>() == 64);
    assert!(core::mem::offset_of!(libc::mmsghdr, msg_len) == CALL_LEN * 8);
    assert!(core::mem::offset_of!(libc::msghdr, msg_iov) == 16);
    assert!(core::mem::offset_of!(libc::msghdr, msg_iovlen) == 24);
};

/// The position that a stream has reached.
pub(crate) fn position(cursor: &Cursor) -> u64 {
    let current = current(cursor);
    cursor.base[current].load(Acquire).wrapping_add(moved(&cursor.calls[current]))
}

/// Bytes that a call has moved, as the kernel wrote it down. For a message it is the `msg_len`. For a sendfile it is
/// the distance of the offset from its start; both stand in words that are equal for a message.
fn moved(call: &[AtomicU64; 8]) -> u64 {
    let [begin, offset] = [0, 1].map(|word: usize| call[word].load(Acquire));
    (call[CALL_LEN].load(Acquire) & 0xffff_ffff).wrapping_add(offset.wrapping_sub(begin))
}

fn current(cursor: &Cursor) -> usize {
    usize::from(cursor.current.load(Acquire) & 1 == 1)
}

/// The words of a message: name, name's length, iovec, number of them, control, its length, flags, msg_len.
pub(crate) fn message(parts: *const libc::iovec, count: usize) -> [u64; 8] {
    [0, 0, parts.expose_provenance() as u64, count as u64, 0, 0, 0, 0]
}

/// Makes a call the current one that begins where the last one ended.
pub(crate) fn prepare(cursor: &Cursor, words: [u64; 8]) -> *mut libc::mmsghdr {
    let (begin, next) = (position(cursor), 1 - current(cursor));
    let call = &cursor.calls[next];
    for (word, value) in call.iter().zip(words) {
        word.store(value, Relaxed);
    }
    cursor.base[next].store(begin, Release);
    cursor.current.store(u32::from(next == 1), Release);
    call.as_ptr().cast_mut().cast()
}

/// The value that the kernel wrote.
pub(crate) fn finish(cursor: &Cursor, done: i32) -> io::Result<usize> {
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    usize::try_from(moved(&cursor.calls[current(cursor)])).map_err(|_| io::ErrorKind::InvalidData.into())
}
