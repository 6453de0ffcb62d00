//! Entering the gate, and closing it.
//!
//! A worker announces itself on its own cache line and then reads the gate word. The interface changes the word and
//! then reads the workers' lines. Both put a sequentially consistent fence between the two steps, so at least one of
//! them sees the other (Dekker): a worker that was admitted is seen, and a worker that is not seen is not admitted.
//!
//! ```text
//!  worker                                    interface
//!    read(2) returns a request                 word := Closed; fence
//!    state := BUSY              (seq-cst)      state == PARKED or FREE for all? ── no ─► evict, sleep, poll again
//!    word still mine?           (seq-cst)      yes: no worker executes or will before the word changes
//!    yes: execute, reply, state := READING
//!    no:  keep the request, state := PARKED
//! ```
//! A worker that has to wait for a storage node goes [`away`] first. A drain does not wait for it, and it asks to be
//! let in again ([`enter`]) before it changes or answers anything. While its write may still reach a node it is
//! [`writing`]. The next core sends no write while another core may still write ([`may_write`]). The sender of buffered
//! data announces itself in the same way ([`begin_sending`]). That is the fence: Dekker once more, with the word
//! changed first and the writers checked afterwards.

use core::sync::atomic::Ordering::{self, Acquire, Release, SeqCst};
#[cfg(not(loom))]
use core::sync::atomic::fence;
#[cfg(loom)]
use loom::sync::atomic::fence;

use everdisk_proto::{
    gate_word::{GateWord, Mode},
    ids::{Generation, Slot},
    segment::ticket_state::{AWAY, BUSY, FREE, PARKED, READING, WRITING},
};

/// An atomic integer: those of std in the product, those of loom in its model.
pub trait Cell<T> {
    /// Loads.
    fn load(&self, order: Ordering) -> T;
    /// Stores.
    fn store(&self, value: T, order: Ordering);
    /// Replaces `current` by `new`. Returns whether the value was `current`.
    fn replace(&self, current: T, new: T) -> bool;
}

macro_rules! cell {
    ($atomic:ty, $int:ty) => {
        impl Cell<$int> for $atomic {
            fn load(&self, order: Ordering) -> $int {
                self.load(order)
            }
            fn store(&self, value: $int, order: Ordering) {
                self.store(value, order);
            }
            fn replace(&self, current: $int, new: $int) -> bool {
                self.compare_exchange(current, new, SeqCst, SeqCst).is_ok()
            }
        }
    };
}
cell!(core::sync::atomic::AtomicU32, u32);
cell!(core::sync::atomic::AtomicU64, u64);
#[cfg(loom)]
cell!(loom::sync::atomic::AtomicU32, u32);
#[cfg(loom)]
cell!(loom::sync::atomic::AtomicU64, u64);

/// Permission to execute requests as long as the gate word bears the same core and generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass(u64);

impl Pass {
    /// Permission under a gate word that was found to admit: work without a request is done under the word that was
    /// read.
    pub const fn of(word: u64) -> Self {
        Self(word)
    }

    /// The word it was given under.
    ///
    /// # Panics
    /// When it was made [of](Pass::of) a word that admits no core.
    pub fn word(self) -> GateWord {
        GateWord::decode(self.0).expect("a pass is given under a word that admits")
    }

    /// Whether a request that was kept under `self` may be executed under `other`. It may if core and generation are
    /// the same: then no other core was given the request in between.
    pub const fn continues_in(self, other: Self) -> bool {
        self.0 >> 8 == other.0 >> 8
    }
}

/// The state of the gate for a parked worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Go and read. The ticket is READING.
    Admitted(Pass),
    /// This core is to probe its stores and open the gate itself ([`open_after_probe`]). The ticket is PARKED.
    Probe(GateWord),
    /// Sleep on. The ticket is PARKED.
    Shut,
}

/// A parked worker of the core in `slot` asks to be admitted.
pub fn unpark(word: &impl Cell<u64>, state: &impl Cell<u32>, slot: Slot) -> Admission {
    state.store(READING, Release);
    fence(SeqCst);
    let seen = word.load(Acquire);
    match GateWord::decode(seen) {
        Some(gate) if gate.slot == slot && gate.serves() => Admission::Admitted(Pass(seen)),
        Some(gate) if gate.slot == slot && gate.mode == Mode::Probe => {
            state.store(PARKED, Release);
            Admission::Probe(gate)
        }
        _ => {
            state.store(PARKED, Release);
            Admission::Shut
        }
    }
}

/// Whether the pass still holds. A worker asks before it reads.
pub fn holds(word: &impl Cell<u64>, pass: Pass) -> bool {
    still(word.load(Acquire), pass)
}

/// A worker has read a request and asks whether it may execute it. `true`: it may, and its ticket is out (BUSY) until
/// [`leave`]. `false`: the request must be kept unanswered, and the ticket is BUSY until [`park`].
#[must_use]
pub fn enter(word: &impl Cell<u64>, state: &impl Cell<u32>, pass: Pass) -> bool {
    state.store(BUSY, Release);
    fence(SeqCst);
    still(word.load(Acquire), pass)
}

fn still(seen: u64, pass: Pass) -> bool {
    seen == pass.0 || (Pass(seen).continues_in(pass) && GateWord::decode(seen).is_some_and(|gate| gate.serves()))
}

/// The request is answered; the worker goes on reading.
pub fn leave(state: &impl Cell<u32>) {
    state.store(READING, Release);
}

/// The worker waits for something, or reads from a storage node. The ticket is not out. [`enter`] lets the worker in
/// again.
pub fn away(state: &impl Cell<u32>) {
    state.store(AWAY, Release);
}

/// As [`away`], but until the next change of the ticket a write of the worker may reach a storage node.
pub fn writing(state: &impl Cell<u32>) {
    state.store(WRITING, Release);
}

/// The sender of a core asks whether it may send buffered data. It may as long as the gate word bears its core and
/// generation, whether the gate is open or not. `true`: it is announced until [`park`].
#[must_use]
pub fn begin_sending(word: &impl Cell<u64>, state: &impl Cell<u32>, slot: Slot, generation: Generation) -> bool {
    state.store(WRITING, Release);
    fence(SeqCst);
    let ours =
        GateWord::decode(word.load(Acquire)).is_some_and(|gate| gate.slot == slot && gate.generation == generation);
    if !ours {
        state.store(PARKED, Release);
    }
    ours
}

/// Whether a core that has read its own slot in the gate word may write to the storage nodes: none of these workers and
/// senders of other cores writes any more. Once true, it remains true for the generation.
#[must_use]
pub fn may_write<'a, C: Cell<u32> + 'a>(others: impl IntoIterator<Item = &'a C>) -> bool {
    fence(SeqCst);
    others.into_iter().all(|state| state.load(Acquire) != WRITING)
}

/// The worker will neither read nor execute before it is admitted again.
pub fn park(state: &impl Cell<u32>) {
    state.store(PARKED, Release);
}

/// The successor has read from its stores and opens the gate for itself. False when the interface has taken the gate
/// back.
#[must_use]
pub fn open_after_probe(word: &impl Cell<u64>, probe: GateWord) -> bool {
    word.replace(probe.encode(), probe.with(Mode::Open).encode())
}

/// The interface takes the gate back from a successor that did not open it in time. False when the successor has just
/// opened it.
#[must_use]
pub fn revoke_probe(word: &impl Cell<u64>, probe: GateWord) -> bool {
    word.replace(probe.encode(), probe.with(Mode::Closed).encode())
}

/// Changes the gate. Check the tickets with [`is_in`] afterwards.
pub fn set(word: &impl Cell<u64>, gate: GateWord) {
    word.store(gate.encode(), Release);
    fence(SeqCst);
}

/// Whether this worker executes nothing that another core must not execute as well, and will not before it is let in
/// again.
pub fn is_in(state: &impl Cell<u32>) -> bool {
    matches!(state.load(Acquire), PARKED | FREE | AWAY | WRITING)
}

/// As [`is_in`], and the worker changes nothing on a storage node either.
pub fn is_still(state: &impl Cell<u32>) -> bool {
    matches!(state.load(Acquire), PARKED | FREE | AWAY)
}

/// Whether this worker sleeps at the gate.
pub fn is_parked(state: &impl Cell<u32>) -> bool {
    state.load(Acquire) == PARKED
}

/// Whether this worker may be blocked in a read, from which it must be evicted.
pub fn may_be_reading(state: &impl Cell<u32>) -> bool {
    state.load(Acquire) == READING
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;

#[cfg(test)]
#[cfg(loom)]
mod model;
