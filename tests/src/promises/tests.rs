//! The judge can object: fabricated histories, each with one promise broken.

use super::{
    content::{self, Content, fill},
    history::{Broken, History},
};

const SEED: u64 = 77;
const BLOCK: usize = 512;

/// A history of four blocks from block 10 on, and the volume it is about.
struct Case {
    history: History,
    volume: Vec<u8>,
}

impl Case {
    fn new() -> Self {
        Self { history: History::new(SEED, 10, 4, BLOCK), volume: vec![0; 4 * BLOCK] }
    }

    /// The bytes that write `write` puts into the blocks from `first` on.
    fn lay(&mut self, first: u64, count: u64, write: u64) {
        for block in first..first + count {
            let at = usize::try_from(block - 10).unwrap() * BLOCK;
            fill(SEED, block, write, &mut self.volume[at..at + BLOCK]);
        }
    }

    /// A write that is acknowledged and arrives.
    fn write(&mut self, first: u64, count: u64) -> u64 {
        let write = self.history.begin_write(&(first..first + count));
        self.lay(first, count, write);
        self.history.acknowledge(&(first..first + count), write);
        write
    }

    fn flush(&mut self) {
        let mark = self.history.begin_flush();
        self.history.flushed(&mark);
    }

    fn read(&mut self) -> Result<(), Broken> {
        let floor = self.history.floor(10..14);
        self.history.read(&floor, &self.volume)
    }

    fn lose(&mut self) -> Result<u64, Broken> {
        self.history.lose(&self.volume).map(|loss| loss.blocks)
    }
}

#[test]
fn a_block_says_what_it_is() {
    let mut bytes = [0; BLOCK];
    assert_eq!(content::read(SEED, 5, &bytes), Content::Zero);
    fill(SEED, 5, 9, &mut bytes);
    assert_eq!(content::read(SEED, 5, &bytes), Content::Write(9));
    assert_eq!(content::read(SEED, 6, &bytes), Content::Elsewhere { seed: SEED, block: 5 });
    assert_eq!(content::read(SEED + 1, 5, &bytes), Content::Elsewhere { seed: SEED, block: 5 });
    for at in (0..BLOCK).step_by(7).chain([BLOCK - 1]) {
        bytes[at] ^= 1;
        assert!(!matches!(content::read(SEED, 5, &bytes), Content::Write(_)), "byte {at} was changed");
        bytes[at] ^= 1;
    }
}

#[test]
fn an_honest_volume_is_believed() {
    let mut case = Case::new();
    case.read().unwrap();
    case.write(10, 4);
    case.write(11, 2);
    case.read().unwrap();
    case.flush();
    // Under way: each block may be old or new.
    let write = case.history.begin_write(&(10..13));
    case.read().unwrap();
    case.lay(11, 1, write);
    case.read().unwrap();
    case.lay(10, 3, write);
    case.history.acknowledge(&(10..13), write);
    case.read().unwrap();
    let zero = case.history.begin_zero(&(12..14));
    case.volume[3 * BLOCK..].fill(0);
    case.read().unwrap();
    case.volume[2 * BLOCK..].fill(0);
    case.history.acknowledge(&(12..14), zero);
    case.read().unwrap();
    assert_eq!(case.lose(), Ok(0));
    case.read().unwrap();
}

#[test]
fn a_lost_write_is_noticed() {
    let mut case = Case::new();
    let write = case.history.begin_write(&(12..13));
    case.history.acknowledge(&(12..13), write);
    let broken = case.read().unwrap_err();
    assert_eq!((broken.block, broken.content, broken.oldest), (12, Content::Zero, write));
}

#[test]
fn a_stale_block_is_noticed_and_so_is_a_lost_zeroing() {
    let mut case = Case::new();
    let old = case.write(10, 4);
    let new = case.write(11, 2);
    case.lay(12, 1, old);
    let broken = case.read().unwrap_err();
    assert_eq!((broken.block, broken.content, broken.oldest), (12, Content::Write(old), new));

    let mut case = Case::new();
    case.write(10, 4);
    let zero = case.history.begin_zero(&(10..11));
    case.history.acknowledge(&(10..11), zero);
    assert_eq!(case.read().unwrap_err().block, 10);
    // And the other way round: zeros that a newer write has covered come back.
    case.volume[..BLOCK].fill(0);
    case.read().unwrap();
    case.write(10, 1);
    case.volume[..BLOCK].fill(0);
    assert_eq!(case.read().unwrap_err().content, Content::Zero);
}

#[test]
fn a_torn_block_is_noticed_unless_the_read_met_its_write_half_way() {
    let mut case = Case::new();
    case.write(10, 4);
    let old = case.volume.clone();
    let write = case.history.begin_write(&(11..12));
    case.lay(11, 1, write);
    let half = BLOCK + BLOCK / 2;
    case.volume[half..2 * BLOCK].copy_from_slice(&old[half..2 * BLOCK]);
    case.read().unwrap();
    case.history.acknowledge(&(11..12), write);
    let broken = case.read().unwrap_err();
    assert_eq!((broken.block, broken.content), (11, Content::Torn));
    assert_eq!(case.lose().unwrap_err().content, Content::Torn);

    let mut case = Case::new();
    let write = case.history.begin_write(&(11..12));
    case.lay(11, 1, write);
    case.volume[BLOCK + 40] ^= 1;
    assert_eq!(case.lose().unwrap_err().content, Content::Torn, "nor may a death tear a write that was under way");
}

#[test]
fn a_block_in_another_ones_place_and_one_from_nowhere_are_noticed() {
    let mut case = Case::new();
    case.write(10, 4);
    let (first, rest) = case.volume.split_at_mut(BLOCK);
    rest[..BLOCK].copy_from_slice(first);
    assert_eq!(case.read().unwrap_err().content, Content::Elsewhere { seed: SEED, block: 10 });
    let mut case = Case::new();
    case.lay(10, 1, 99);
    assert_eq!(case.read().unwrap_err().content, Content::Write(99), "this write was never begun");
}

#[test]
fn what_was_read_once_may_not_go_back() {
    let mut case = Case::new();
    let old = case.write(10, 1);
    let new = case.history.begin_write(&(10..11));
    case.read().unwrap();
    case.lay(10, 1, new);
    case.read().unwrap();
    case.lay(10, 1, old);
    let broken = case.read().unwrap_err();
    assert_eq!((broken.content, broken.oldest), (Content::Write(old), new));
}

#[test]
fn a_read_is_judged_by_what_was_known_when_it_began() {
    let mut case = Case::new();
    let floor = case.history.floor(10..14);
    let stale = case.volume.clone();
    case.write(10, 4);
    case.read().unwrap();
    case.history.read(&floor, &stale).unwrap();
    let floor = case.history.floor(10..14);
    assert_eq!(case.history.read(&floor, &stale).unwrap_err().block, 10);
}

#[test]
fn a_loss_may_take_what_was_not_flushed_and_nothing_else() {
    let mut case = Case::new();
    let flushed = case.write(10, 4);
    case.flush();
    case.write(11, 2);
    case.write(12, 2);
    let newest = case.volume.clone();
    // Only the last one lost; then everything since the flush.
    case.lay(11, 3, flushed);
    assert_eq!(case.lose(), Ok(3));
    case.read().unwrap();
    // What was lost has not come back later.
    case.volume = newest;
    assert_eq!(case.read().unwrap_err().block, 11);
}

#[test]
fn a_flush_that_did_not_hold_is_noticed() {
    let mut case = Case::new();
    let first = case.write(10, 4);
    let second = case.write(11, 2);
    case.flush();
    case.write(11, 1);
    // The write after the flush has arrived, one before it has not: the order across the flush is broken.
    case.lay(12, 1, first);
    let broken = case.lose().unwrap_err();
    assert_eq!((broken.block, broken.content, broken.oldest), (12, Content::Write(first), second));
}

#[test]
fn a_flush_covers_what_was_acknowledged_before_it_began_and_holds_once_acknowledged() {
    let mut case = Case::new();
    let under_way = case.history.begin_write(&(13..14));
    let mark = case.history.begin_flush();
    case.history.acknowledge(&(13..14), under_way);
    case.history.flushed(&mark);
    assert_eq!(case.lose(), Ok(1), "a write under way when the flush began may be lost");

    let mut case = Case::new();
    case.write(10, 4);
    let _unanswered = case.history.begin_flush();
    case.volume.fill(0);
    assert_eq!(case.lose(), Ok(4), "a flush that was not acknowledged promises nothing");

    // The same for zeros: durable zeros may not turn into what was there before.
    let mut case = Case::new();
    case.write(10, 1);
    let before = case.volume.clone();
    let zero = case.history.begin_zero(&(10..11));
    case.history.acknowledge(&(10..11), zero);
    case.flush();
    case.volume = before;
    assert_eq!(case.lose().unwrap_err().oldest, zero);
}
