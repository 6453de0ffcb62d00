//! What a flush has to wait for, and what it may promise.
//!
//! `NBD_CMD_FLUSH` covers the writes that were answered before it was sent; with several connections it covers those of all
//! of them (`NBD_FLAG_CAN_MULTI_CONN`). So a flush waits for the changes begun before it.
//!
//! ```text
//! change change │ change change change │ change
//!               flush a                flush b        an epoch of changes lies between two flushes;
//!                                                     a flush goes when every earlier epoch is empty
//! ```

use std::collections::VecDeque;

#[derive(Debug, Default)]
struct Epoch {
    /// Changes that have begun and not ended.
    changes: usize,
    /// Flushes that wait for this epoch and all before.
    flushes: Vec<usize>,
}

/// The epochs that have not ended, and what is known of data that is not durable.
#[derive(Debug)]
pub(crate) struct Flushes {
    /// Never empty.
    epochs: VecDeque<Epoch>,
    /// The number of the first one.
    first: u64,
    /// Changes that were answered without being durable.
    answered: u64,
    /// The number of those that are durable, the first ones.
    durable: u64,
    /// Some were not durable when a connection was lost, and no flush has reported that yet.
    suspect: bool,
}

impl Default for Flushes {
    fn default() -> Self {
        Self { epochs: [Epoch::default()].into(), first: 0, answered: 0, durable: 0, suspect: false }
    }
}

impl Flushes {
    /// A change begins; the number of its epoch.
    pub(crate) fn begin_change(&mut self) -> u64 {
        self.epochs.back_mut().expect("never empty").changes += 1;
        self.first + u64::try_from(self.epochs.len() - 1).expect("a count in memory")
    }

    /// A change has ended; the flushes that go now.
    pub(crate) fn end_change(&mut self, epoch: u64) -> Vec<usize> {
        let index = usize::try_from(epoch - self.first).expect("an epoch ends after its changes");
        self.epochs[index].changes -= 1;
        self.release()
    }

    /// A flush begins; the flushes that go now, it among them if nothing is outstanding.
    pub(crate) fn begin_flush(&mut self, task: usize) -> Vec<usize> {
        self.epochs.back_mut().expect("never empty").flushes.push(task);
        self.epochs.push_back(Epoch::default());
        self.release()
    }

    fn release(&mut self) -> Vec<usize> {
        let mut released = Vec::new();
        while self.epochs.len() > 1 && self.epochs.front().is_some_and(|epoch| epoch.changes == 0) {
            let epoch = self.epochs.pop_front().expect("there are two");
            released.extend(epoch.flushes);
            self.first += 1;
        }
        released
    }

    /// Nothing is outstanding any more, because everything has failed.
    pub(crate) fn clear(&mut self) {
        self.first += u64::try_from(self.epochs.len()).expect("a count in memory");
        self.epochs = [Epoch::default()].into();
    }

    /// A change was answered, and is not durable.
    pub(crate) const fn answered(&mut self) {
        self.answered += 1;
    }

    /// What a flush covers that is sent now.
    pub(crate) const fn covers(&self) -> u64 {
        self.answered
    }

    /// A flush has succeeded that covers this.
    pub(crate) fn flushed(&mut self, covers: u64) {
        self.durable = self.durable.max(covers);
    }

    /// A connection was lost. `others`: what other processes wrote may not be durable either. Whether data may be lost by
    /// that.
    pub(crate) const fn connection_lost(&mut self, others: bool) -> bool {
        self.suspect |= others || self.answered > self.durable;
        self.suspect
    }

    /// Whether a flush that begins now has to report a loss.
    pub(crate) const fn is_suspect(&self) -> bool {
        self.suspect
    }

    /// A flush has reported it.
    pub(crate) const fn reported(&mut self) {
        self.suspect = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_waits_for_the_changes_begun_before_it_and_for_no_other() {
        let mut flushes = Flushes::default();
        assert_eq!(flushes.begin_flush(1), [1], "nothing to wait for");
        let first = flushes.begin_change();
        let second = flushes.begin_change();
        assert!(flushes.begin_flush(2).is_empty());
        let later = flushes.begin_change();
        assert!(flushes.begin_flush(3).is_empty());
        assert!(flushes.end_change(second).is_empty());
        assert!(flushes.end_change(later).is_empty(), "an earlier change is outstanding");
        assert_eq!(flushes.end_change(first), [2, 3]);
    }

    #[test]
    fn a_loss_is_reported_if_something_was_answered_and_not_flushed() {
        let mut flushes = Flushes::default();
        assert!(!flushes.connection_lost(false));
        flushes.answered();
        flushes.flushed(flushes.covers());
        assert!(!flushes.connection_lost(false), "all was durable");
        let covers = flushes.covers();
        flushes.answered();
        flushes.flushed(covers);
        assert!(flushes.connection_lost(false), "the change was answered after the flush was sent");
        assert!(flushes.is_suspect());
        flushes.reported();
        assert!(!flushes.is_suspect());
        assert!(Flushes::default().connection_lost(true), "others may have written");
    }
}
