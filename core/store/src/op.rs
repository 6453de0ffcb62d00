//! Operations on a storage node as data, and what becomes of one that was begun.

use std::{fmt, sync::Arc, thread};

use parking_lot::{Condvar, Mutex};

use crate::StoreError;

/// What [`Op::Seek`] searches for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sought {
    /// A byte that may be other than zero.
    Data,
    /// A byte that takes no space and reads as zero. The end of the node counts as one.
    Hole,
}

/// An operation at an offset of a node. `R` is the memory that a read fills, `W` the data that is written. Lengths are in
/// bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op<R, W> {
    /// Fills the memory with the bytes from the offset on.
    Read(R),
    /// Writes the data. After an error any part of the range may hold the old or the new bytes.
    Write(W),
    /// Makes everything written so far durable. After an error it is unknown what has become durable since the last flush
    /// that succeeded. The offset says nothing.
    Flush,
    /// Makes this number of bytes read as zero and frees their space. Fails with EOPNOTSUPP where the node cannot free space.
    Discard(u64),
    /// Makes this number of bytes read as zero. Their space stays reserved where the node can do that.
    WriteZeroes(u64),
    /// Reserves space for this number of bytes, so that writes there do not run out of space. No byte changes. Fails with
    /// EOPNOTSUPP where the node cannot reserve space.
    Allocate(u64),
    /// Finds the next data or hole at or after the offset: the outcome is its offset, or `None` when there is none before
    /// the node's end. From inside the node a hole is always found, because the node's end counts as one.
    Seek(Sought),
    /// Reads the identity from the node anew and compares it with what was opened (D11): fails with
    /// [`StoreError::Changed`]. The offset says nothing.
    Identify,
}

/// An operation on memory of the caller.
pub type Lent<'a> = Op<&'a mut [u8], &'a [u8]>;

/// An operation that owns its memory, so that it can outlive its caller.
pub type Owned = Op<Vec<u8>, Vec<u8>>;

/// How an operation ended. `Some` is the offset that an [`Op::Seek`] found.
pub type Outcome = Result<Option<u64>, StoreError>;

impl<R, W> Op<R, W> {
    /// The same operation on other memory.
    fn on<'a, S, X>(&'a mut self, read: impl FnOnce(&'a mut R) -> S, write: impl FnOnce(&'a mut W) -> X) -> Op<S, X> {
        match self {
            Self::Read(memory) => Op::Read(read(memory)),
            Self::Write(data) => Op::Write(write(data)),
            Self::Flush => Op::Flush,
            Self::Discard(len) => Op::Discard(*len),
            Self::WriteZeroes(len) => Op::WriteZeroes(*len),
            Self::Allocate(len) => Op::Allocate(*len),
            Self::Seek(sought) => Op::Seek(*sought),
            Self::Identify => Op::Identify,
        }
    }
}

impl Owned {
    /// The same operation on the memory of this one.
    pub fn lend(&mut self) -> Lent<'_> {
        self.on(|memory| &mut memory[..], |data| &data[..])
    }
}

impl Lent<'_> {
    /// The same operation with memory of its own: a copy of what is written.
    pub fn copied(&mut self) -> Owned {
        self.on(|memory| vec![0; memory.len()], |data| data.to_vec())
    }

    /// Takes over what the copy has read.
    ///
    /// # Panics
    /// When the two are not the same operation.
    pub fn take_over(&mut self, copy: &Owned) {
        match (self, copy) {
            (Self::Read(memory), Op::Read(read)) => memory.copy_from_slice(read),
            (Self::Read(_), _) | (_, Op::Read(_)) => unreachable!("a copy is of the same kind"),
            _ => {}
        }
    }
}

type Then = Box<dyn FnOnce(Owned, Outcome) + Send>;

/// What is to be done when an operation that was begun has ended. It is used exactly once, on any thread. It gets the
/// operation back, with its memory. It must be short, and must not wait: a store's only thread may run it.
#[must_use]
pub struct Completion(Option<Then>);

impl Completion {
    /// Does `then`.
    pub fn new(then: impl FnOnce(Owned, Outcome) + Send + 'static) -> Self {
        Self(Some(Box::new(then)))
    }

    /// The operation has ended.
    pub fn complete(mut self, op: Owned, outcome: Outcome) {
        let then = self.0.take().expect("a completion is used once");
        then(op, outcome);
    }
}

impl Drop for Completion {
    /// Without its end, the thread that waits for the operation would wait for ever.
    fn drop(&mut self) {
        assert!(self.0.is_none() || thread::panicking(), "a store ends every operation that it has begun");
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Completion")
    }
}

/// An operation that was begun, for a thread that waits for its end.
#[derive(Debug)]
#[must_use]
pub struct Pending(Arc<Cell>);

#[derive(Debug, Default)]
struct Cell {
    ended: Mutex<Option<(Owned, Outcome)>>,
    is_set: Condvar,
}

/// An operation to be begun: its completion, and its end.
pub fn pending() -> (Completion, Pending) {
    let cell = Arc::new(Cell::default());
    let pending = Pending(Arc::clone(&cell));
    let completion = Completion::new(move |op, outcome| {
        *cell.ended.lock() = Some((op, outcome));
        cell.is_set.notify_all();
    });
    (completion, pending)
}

impl Pending {
    /// Waits until the operation has ended, as long as that takes.
    pub fn wait(self) -> (Owned, Outcome) {
        let mut ended = self.0.ended.lock();
        loop {
            if let Some(ended) = ended.take() {
                return ended;
            }
            self.0.is_set.wait(&mut ended);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_reads_for_the_caller_and_writes_what_the_caller_wrote() {
        let mut memory = [0; 3];
        let mut read: Lent<'_> = Op::Read(&mut memory);
        let mut copy = read.copied();
        let Op::Read(into) = copy.lend() else { unreachable!() };
        into.copy_from_slice(&[1, 2, 3]);
        read.take_over(&copy);
        assert_eq!(memory, [1, 2, 3]);
        let mut write: Lent<'_> = Op::Write(&[4, 5]);
        let copy = write.copied();
        assert_eq!(copy, Op::Write(vec![4, 5]));
        write.take_over(&copy);
    }

    #[test]
    fn a_thread_that_waits_gets_the_operation_back() {
        let (completion, pending) = pending();
        let thread = thread::spawn(|| completion.complete(Op::Read(vec![7]), Ok(None)));
        let (op, outcome) = pending.wait();
        assert_eq!(op, Op::Read(vec![7]));
        assert!(outcome.is_ok());
        thread.join().unwrap();
    }

    /// D15: an operation without an end would keep its request waiting for ever.
    #[test]
    #[should_panic(expected = "a store ends every operation that it has begun")]
    fn d15_a_store_that_forgets_a_completion_ends_the_core() {
        drop(pending());
    }
}
