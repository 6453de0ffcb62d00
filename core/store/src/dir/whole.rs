//! Whole operations made of system calls that may do a part or be interrupted by a signal. The calls are given as
//! closures, so that a test can interrupt them at any point: whether a kernel interrupts them depends on its version.

use rustix::io::Errno;

/// At first, space is reserved in pieces of this size. The tmpfs of older kernels gives up a piece when a signal
/// arrives, so after each signal the pieces are halved, down to what takes a few microseconds.
const PIECE: u64 = 32 << 20;
const PIECE_MIN: u64 = 64 << 10;

/// Why a part was not done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// A call did nothing; the next offset was this one.
    Nothing(u64),
    /// The operating system's error.
    Failed(Errno),
}

/// Fills `buf`. Each call gets the rest of it and its offset, and returns the number of bytes read.
#[inline]
pub(super) fn read(
    mut offset: u64,
    mut buf: &mut [u8],
    mut call: impl FnMut(&mut [u8], u64) -> Result<usize, Errno>,
) -> Result<(), Stopped> {
    while !buf.is_empty() {
        match call(buf, offset) {
            Ok(0) => return Err(Stopped::Nothing(offset)),
            Ok(n) => {
                buf = &mut std::mem::take(&mut buf)[n..];
                offset += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(Stopped::Failed(e)),
        }
    }
    Ok(())
}

/// Writes `data`. Each call gets the rest of it and its offset, and returns the number of bytes written.
#[inline]
pub(super) fn write(
    mut offset: u64,
    mut data: &[u8],
    mut call: impl FnMut(&[u8], u64) -> Result<usize, Errno>,
) -> Result<(), Stopped> {
    while !data.is_empty() {
        match call(data, offset) {
            Ok(0) => return Err(Stopped::Nothing(offset)),
            Ok(n) => {
                data = &data[n..];
                offset += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(Stopped::Failed(e)),
        }
    }
    Ok(())
}

/// Covers a range. Each call gets offset and length of a piece, and does all of it or nothing.
pub(super) fn pieces(offset: u64, len: u64, mut call: impl FnMut(u64, u64) -> Result<(), Errno>) -> Result<(), Errno> {
    let (mut at, end, mut piece) = (offset, offset + len, PIECE);
    while at < end {
        let n = piece.min(end - at);
        match call(at, n) {
            Ok(()) => at += n,
            Err(Errno::INTR) => piece = (piece / 2).max(PIECE_MIN),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: &[u8] = b"every byte once, in its place";

    /// What the calls do in turn: a limited number of bytes, or an interruption.
    fn turns() -> impl FnMut(usize) -> Result<usize, Errno> {
        let mut turns = [Err(Errno::INTR), Ok(3), Err(Errno::INTR), Err(Errno::INTR), Ok(1), Ok(7)].into_iter().cycle();
        move |len| turns.next().unwrap().map(|n| n.min(len))
    }

    #[test]
    fn interrupted_and_short_reads_are_taken_up_again() {
        let mut turn = turns();
        let mut buf = vec![0; BYTES.len()];
        let done = read(100, &mut buf, |rest, at| {
            let n = turn(rest.len())?;
            let from = usize::try_from(at).unwrap() - 100;
            rest[..n].copy_from_slice(&BYTES[from..from + n]);
            Ok(n)
        });
        assert_eq!((done, &buf[..]), (Ok(()), BYTES));
    }

    #[test]
    fn interrupted_and_short_writes_are_taken_up_again() {
        let mut turn = turns();
        let mut written = Vec::new();
        let done = write(100, BYTES, |rest, at| {
            let n = turn(rest.len())?;
            assert_eq!(usize::try_from(at).unwrap() - 100, written.len());
            written.extend_from_slice(&rest[..n]);
            Ok(n)
        });
        assert_eq!((done, &written[..]), (Ok(()), BYTES));
    }

    #[test]
    fn an_end_and_an_error_stop_and_say_where() {
        let mut calls = 0;
        let end = read(5, &mut [0; 10], |_, _| {
            calls += 1;
            Ok(if calls == 1 { 4 } else { 0 })
        });
        assert_eq!(end, Err(Stopped::Nothing(9)));
        assert_eq!(write(5, BYTES, |_, _| Err(Errno::NOSPC)), Err(Stopped::Failed(Errno::NOSPC)));
        assert_eq!(write(5, BYTES, |_, _| Ok(0)), Err(Stopped::Nothing(5)));
        assert_eq!(pieces(5, 9, |_, _| Err(Errno::NOSPC)), Err(Errno::NOSPC));
    }

    /// A kernel that gives up any call that takes longer than the time between two signals.
    #[test]
    fn pieces_shrink_until_they_fit_between_two_signals() {
        let (mut next, end) = (4096, 4096 + (100 << 20));
        let done = pieces(next, 100 << 20, |at, len| {
            if len > 1 << 20 {
                return Err(Errno::INTR);
            }
            assert!(at == next && len > 0);
            next += len;
            Ok(())
        });
        assert_eq!((done, next), (Ok(()), end));
    }
}
