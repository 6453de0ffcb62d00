//! When buffered data is sent, and which writes bypass the buffer. Pure: fill levels and times are parameters.
//!
//! Where the nodes are slower than the buffer, every write is buffered and sending begins early. Where they are as
//! quick as the buffer (a directory's page cache), buffering a stream only copies it twice. The buffer then takes up a
//! burst, and writes of a longer stream go through as long as the nodes have recently proved that they take writes. If
//! the nodes hang, writes go on into the buffer until it is full.
//!
//! ```text
//!  fill ‰   0        125        250        500          850     1000
//!  slow              │◄ down to │ sends at full speed ─────────────►│
//!  quick             │ sends a little, to see whether the nodes take it   │ sends at full speed
//!        very large writes go through     │ large ones as well       │ all writes go through
//! ```

use std::time::Duration;

/// Bytes of one batch. A hand-over may have to wait for the rest of a batch before the next core sends.
pub(crate) const BATCH_BYTES: u64 = 8 << 20;
/// Longest write of buffered data to a storage node.
pub(crate) const RUN_BYTES: u64 = 1 << 20;
/// Low water mark, in thousandths: above it sending begins; it goes on down to [`SEND_DOWN_TO`].
const SEND_ABOVE: u64 = 250;
const SEND_DOWN_TO: u64 = 125;
/// High water mark where the nodes are quick.
const SEND_ABOVE_QUICK: u64 = 850;
/// Above this fill quick nodes are tried now and then.
const TRY_ABOVE: u64 = 125;
/// Interval between two such trials; below, the bytes of one.
pub(crate) const TRY_EVERY: Duration = Duration::from_millis(50);
pub(crate) const TRY_BYTES: u64 = 1 << 20;
/// A node that has taken a write within this time is assumed to take another one.
pub(crate) const PROVEN_FOR: Duration = Duration::from_millis(200);
/// Above these fills writes go through.
const THROUGH_ABOVE: u64 = 500;
const LARGE_THROUGH_ABOVE: u64 = 250;
/// A large write gains less from the buffer and loses more by the copy. A very large one gains nothing, because it has
/// no neighbours to be merged with.
const LARGE: u64 = 64 << 10;
const VERY_LARGE: u64 = 256 << 10;

/// What the sender does without a request that waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sending {
    /// Nothing: more may be overwritten first.
    Rests,
    /// A little, at intervals.
    Tries,
    /// As much as it can.
    Hurries,
}

/// What the sender does at this fill.
pub(crate) const fn sending(fill: u64, before: Sending, quick: bool) -> Sending {
    let above = if quick { SEND_ABOVE_QUICK } else { SEND_ABOVE };
    if fill > above || (matches!(before, Sending::Hurries) && fill > SEND_DOWN_TO) {
        Sending::Hurries
    } else if quick && is_tried(fill) {
        Sending::Tries
    } else {
        Sending::Rests
    }
}

/// Whether, at this fill, the nodes have to prove that they take writes before any write goes through.
pub(crate) const fn is_tried(fill: u64) -> bool {
    fill > TRY_ABOVE
}

/// Data that is written and not durable takes room as well. Where the buffer as a whole is filled above this, writes go
/// through as if half of it were not yet written.
const CROWDED: u64 = 850;
/// The storage nodes are flushed when more than this much of the buffer, in thousandths, is written and not known to be
/// durable.
pub(crate) const FLUSH_ABOVE: u64 = 250;
/// The nodes are also flushed when this many bytes have been written past the buffer since the last flush. They are
/// lost if a flush fails.
pub(crate) const FLUSH_PASSED: u64 = 32 << 20;
/// Above this many bytes no write goes past the buffer unless it must, until a flush has succeeded. This bounds the
/// work of one flush, so that it ends before its client times out, on slow disks too.
pub(crate) const PASSED_MAX: u64 = 64 << 20;

/// The fill that counts, from what is not yet written and from all that the buffer holds.
pub(crate) const fn crowding(dirty: u64, all: u64) -> u64 {
    if all > CROWDED && dirty <= THROUGH_ABOVE { THROUGH_ABOVE + 1 } else { dirty }
}

/// Whether a write of `len` bytes goes through at this fill. `proven`: the nodes have taken a write recently; at fills
/// where they are on trial, since that fill was reached.
pub(crate) const fn goes_through(fill: u64, len: u64, quick: bool, proven: bool) -> bool {
    let above = if len >= LARGE { LARGE_THROUGH_ABOVE } else { THROUGH_ABOVE };
    quick && proven && (fill > above || len >= VERY_LARGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_nodes_are_sent_to_early_and_nothing_goes_through_to_them() {
        assert_eq!(sending(250, Sending::Rests, false), Sending::Rests);
        assert_eq!(sending(251, Sending::Rests, false), Sending::Hurries);
        assert_eq!(sending(126, Sending::Hurries, false), Sending::Hurries);
        assert_eq!(sending(125, Sending::Hurries, false), Sending::Rests);
        assert!((0..=1000).all(|fill| !goes_through(fill, 1 << 20, false, true)));
    }

    #[test]
    fn a_buffer_that_waits_for_a_flush_is_full_as_well() {
        assert_eq!((crowding(100, 850), crowding(100, 851), crowding(700, 900)), (100, THROUGH_ABOVE + 1, 700));
    }

    #[test]
    fn quick_nodes_are_tried_before_anything_goes_through_to_them() {
        let through = |fill, len: u64| goes_through(fill, len, true, true);
        assert!((0..=1000).filter(|fill| through(*fill, LARGE)).all(is_tried));
        assert!(through(251, LARGE) && !through(251, 4096) && through(501, 4096) && through(0, VERY_LARGE));
        assert!((0..=1000).all(|fill| !goes_through(fill, 1 << 20, true, false)), "not to nodes that may hang");
        assert_eq!(sending(500, Sending::Rests, true), Sending::Tries);
        assert_eq!(sending(851, Sending::Tries, true), Sending::Hurries);
    }
}
