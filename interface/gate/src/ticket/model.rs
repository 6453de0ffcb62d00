//! Loom: every interleaving of one closing interface, an old worker and a new one.

use loom::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, AtomicUsize},
    },
    thread,
};

use super::*;

fn word(mode: Mode, slot: usize, generation: u64) -> GateWord {
    GateWord { mode, slot: Slot::new(slot).unwrap(), generation: Generation(generation) }
}

struct Shared {
    word: AtomicU64,
    old: AtomicU32,
    new: AtomicU32,
    /// Workers that execute now: never two of different generations.
    executing: AtomicUsize,
}

/// M10, M4: once the interface has seen every ticket in, no worker of the old generation executes, under any
/// interleaving. The successor executes only after that.
#[test]
fn no_two_generations_execute_at_once() {
    loom::model(|| {
        let shared = Arc::new(Shared {
            word: AtomicU64::new(word(Mode::Open, 0, 1).encode()),
            old: AtomicU32::new(PARKED),
            new: AtomicU32::new(PARKED),
            executing: AtomicUsize::new(0),
        });
        let execute = |s: &Shared, state: &AtomicU32, pass: Pass| {
            if enter(&s.word, state, pass) {
                assert_eq!(s.executing.fetch_add(1, SeqCst), 0, "two generations execute at once");
                s.executing.fetch_sub(1, SeqCst);
                leave(state);
            }
            park(state);
        };
        let s = Arc::clone(&shared);
        let old = thread::spawn(move || {
            if let Admission::Admitted(pass) = unpark(&s.word, &s.old, Slot::new(0).unwrap()) {
                execute(&s, &s.old, pass);
            }
        });
        let s = Arc::clone(&shared);
        let new = thread::spawn(move || {
            let slot = Slot::new(1).unwrap();
            if let Admission::Probe(probe) = unpark(&s.word, &s.new, slot)
                && open_after_probe(&s.word, probe)
                && let Admission::Admitted(pass) = unpark(&s.word, &s.new, slot)
            {
                execute(&s, &s.new, pass);
            }
        });
        set(&shared.word, word(Mode::Closed, 0, 1));
        if is_in(&shared.old) {
            set(&shared.word, word(Mode::Probe, 1, 2));
        }
        old.join().unwrap();
        new.join().unwrap();
    });
}

/// The successor opens the gate while the interface takes it back: exactly one of them succeeds.
#[test]
fn a_probe_is_either_passed_or_revoked() {
    loom::model(|| {
        let probe = word(Mode::Probe, 1, 2);
        let gate = Arc::new(AtomicU64::new(probe.encode()));
        let g = Arc::clone(&gate);
        let opened = thread::spawn(move || open_after_probe(&*g, probe));
        let revoked = revoke_probe(&*gate, probe);
        assert_ne!(opened.join().unwrap(), revoked);
    });
}

/// The fence: a sender of the old generation and one of the new never write at the same time, although a hand-over does
/// not wait for the old core's sender.
#[test]
fn no_two_generations_write_to_the_storage_nodes_at_once() {
    loom::model(|| {
        let old_word = word(Mode::Open, 0, 1);
        let new_word = word(Mode::Open, 1, 2);
        let gate = Arc::new(AtomicU64::new(old_word.encode()));
        let old = Arc::new(AtomicU32::new(PARKED));
        let new = Arc::new(AtomicU32::new(PARKED));
        let writers = Arc::new(AtomicUsize::new(0));
        let write = |writers: &AtomicUsize| {
            assert_eq!(writers.fetch_add(1, SeqCst), 0, "two generations write at once");
            writers.fetch_sub(1, SeqCst);
        };
        let (g, o, w) = (Arc::clone(&gate), Arc::clone(&old), Arc::clone(&writers));
        let sender = thread::spawn(move || {
            if begin_sending(&*g, &*o, old_word.slot, old_word.generation) {
                write(&w);
                park(&*o);
            }
        });
        set(&*gate, new_word);
        if begin_sending(&*gate, &*new, new_word.slot, new_word.generation) && may_write([&*old]) {
            write(&writers);
        }
        sender.join().unwrap();
    });
}

/// One ticket, and the workers that execute: never two of different generations.
struct Door {
    word: AtomicU64,
    old: AtomicU32,
    executing: AtomicUsize,
}

impl Door {
    fn new(old_word: GateWord, state: u32) -> Arc<Self> {
        let (word, old) = (AtomicU64::new(old_word.encode()), AtomicU32::new(state));
        Arc::new(Self { word, old, executing: AtomicUsize::new(0) })
    }

    fn execute(&self) {
        assert_eq!(self.executing.fetch_add(1, SeqCst), 0, "two generations execute at once");
        self.executing.fetch_sub(1, SeqCst);
    }
}

/// Every way into the gate. A worker asks to be let in while the interface closes the gate, finds it in, and gives the
/// gate to another core, which executes at once. The worker is seen, or is not let in. It comes from a node, where the
/// drain does not wait for it ([`AWAY`]); from a write that may still be under way ([`WRITING`]); with a request that
/// was read ([`READING`]) or kept ([`PARKED`]); and between two requests that arrived together ([`BUSY`], and [`leave`]
/// before it).
#[test]
fn who_comes_from_anywhere_is_seen_or_not_let_in() {
    for from in [PARKED, READING, AWAY, WRITING, BUSY] {
        loom::model(move || {
            let old_word = word(Mode::Open, 0, 1);
            let door = Door::new(old_word, from);
            let pass = Pass(old_word.encode());
            let d = Arc::clone(&door);
            let old = thread::spawn(move || {
                if from == BUSY {
                    leave(&d.old);
                }
                if enter(&d.word, &d.old, pass) {
                    d.execute();
                    leave(&d.old);
                }
                park(&d.old);
            });
            set(&door.word, word(Mode::Closed, 0, 1));
            if is_in(&door.old) {
                set(&door.word, word(Mode::Open, 1, 2));
                door.execute();
            }
            old.join().unwrap();
        });
    }
}

/// A worker is let in, goes to a node, and comes back to change and answer something. It is let in anew each time, and
/// what it does in between concerns no other core.
#[test]
fn who_goes_to_a_node_and_comes_back_is_let_in_anew() {
    for go in [away as fn(&AtomicU32), writing] {
        loom::model(move || {
            let door = Door::new(word(Mode::Open, 0, 1), PARKED);
            let d = Arc::clone(&door);
            let old = thread::spawn(move || {
                if let Admission::Admitted(pass) = unpark(&d.word, &d.old, Slot::new(0).unwrap())
                    && enter(&d.word, &d.old, pass)
                {
                    d.execute();
                    go(&d.old);
                    if enter(&d.word, &d.old, pass) {
                        d.execute();
                        leave(&d.old);
                    }
                }
                park(&d.old);
            });
            set(&door.word, word(Mode::Closed, 0, 1));
            if is_in(&door.old) {
                set(&door.word, word(Mode::Open, 1, 2));
                door.execute();
            }
            old.join().unwrap();
        });
    }
}

/// The fence for workers. A worker of the old core was let in and writes to a node, and the drain does not wait for it.
/// The new core writes only when that write is over, also where the worker came from a node before.
#[test]
fn no_worker_writes_beside_the_next_generation() {
    for from in [READING, AWAY] {
        loom::model(move || {
            let (old_word, new_word) = (word(Mode::Open, 0, 1), word(Mode::Open, 1, 2));
            let door = Door::new(old_word, from);
            let d = Arc::clone(&door);
            let old = thread::spawn(move || {
                if enter(&d.word, &d.old, Pass(old_word.encode())) {
                    writing(&d.old);
                    d.execute();
                    away(&d.old);
                }
                park(&d.old);
            });
            set(&door.word, word(Mode::Closed, 0, 1));
            if is_in(&door.old) {
                set(&door.word, new_word);
                let sender = AtomicU32::new(PARKED);
                if begin_sending(&door.word, &sender, new_word.slot, new_word.generation) && may_write([&door.old]) {
                    door.execute();
                }
            }
            old.join().unwrap();
        });
    }
}

/// A worker that was seen parked after the gate was closed reads nothing. Otherwise it would keep what it read, and no
/// core would be given it.
#[test]
fn who_is_seen_parked_reads_nothing() {
    loom::model(|| {
        let door = Door::new(word(Mode::Open, 0, 1), PARKED);
        let d = Arc::clone(&door);
        let worker = thread::spawn(move || {
            if let Admission::Admitted(pass) = unpark(&d.word, &d.old, Slot::new(0).unwrap()) {
                if holds(&d.word, pass) {
                    d.execute();
                }
                park(&d.old);
            }
        });
        set(&door.word, word(Mode::Closed, 0, 1));
        if is_in(&door.old) {
            door.execute();
        }
        worker.join().unwrap();
    });
}

/// The fence where the new core is not the interface and gets no message from it: it only reads its own slot in the
/// gate word.
#[test]
fn who_finds_the_gate_its_own_writes_beside_nobody() {
    loom::model(|| {
        let (old_word, new_word) = (word(Mode::Open, 0, 1), word(Mode::Open, 1, 2));
        let door = Door::new(old_word, PARKED);
        let d = Arc::clone(&door);
        let old = thread::spawn(move || {
            if begin_sending(&d.word, &d.old, old_word.slot, old_word.generation) {
                d.execute();
                park(&d.old);
            }
        });
        let d = Arc::clone(&door);
        let new = thread::spawn(move || {
            let sender = AtomicU32::new(PARKED);
            if begin_sending(&d.word, &sender, new_word.slot, new_word.generation) && may_write([&d.old]) {
                d.execute();
            }
        });
        set(&door.word, new_word);
        old.join().unwrap();
        new.join().unwrap();
    });
}

/// The sender of the old core asks while the gate goes to another core, whose worker writes: the sender is seen, or
/// does not send.
#[test]
fn a_sender_that_begins_is_seen_or_does_not_send() {
    for mode in [Mode::Open, Mode::Synchronous, Mode::Closed, Mode::Probe] {
        loom::model(move || {
            let (old_word, new_word) = (word(mode, 0, 1), word(Mode::Open, 1, 2));
            let door = Door::new(old_word, PARKED);
            let d = Arc::clone(&door);
            let sender = thread::spawn(move || {
                for _ in 0..2 {
                    if begin_sending(&d.word, &d.old, old_word.slot, old_word.generation) {
                        d.execute();
                        park(&d.old);
                    }
                }
            });
            set(&door.word, new_word);
            let worker = AtomicU32::new(READING);
            assert!(enter(&door.word, &worker, Pass(new_word.encode())));
            writing(&worker);
            if may_write([&door.old]) {
                door.execute();
            }
            sender.join().unwrap();
        });
    }
}

/// A successor opens the gate too late: the gate was taken back, and the predecessor executes under a generation of its
/// own.
#[test]
fn who_probes_too_late_executes_nothing() {
    loom::model(|| {
        let probe = word(Mode::Probe, 1, 2);
        let door = Door::new(probe, PARKED);
        let d = Arc::clone(&door);
        let late = thread::spawn(move || {
            let slot = Slot::new(1).unwrap();
            if let Admission::Probe(seen) = unpark(&d.word, &d.old, slot)
                && open_after_probe(&d.word, seen)
                && let Admission::Admitted(pass) = unpark(&d.word, &d.old, slot)
            {
                if enter(&d.word, &d.old, pass) {
                    d.execute();
                    leave(&d.old);
                }
                park(&d.old);
            }
        });
        if revoke_probe(&door.word, probe) {
            set(&door.word, word(Mode::Open, 0, 3));
            door.execute();
        }
        late.join().unwrap();
    });
}

/// Two workers of one core probe at once, and the gate is closed as soon as one has opened it. The other opens nothing.
#[test]
fn of_two_that_probe_one_opens_the_gate_once() {
    loom::model(|| {
        let probe = word(Mode::Probe, 1, 2);
        let gate = Arc::new(AtomicU64::new(probe.encode()));
        let g = Arc::clone(&gate);
        let other = thread::spawn(move || open_after_probe(&*g, probe));
        let opened = open_after_probe(&*gate, probe);
        let closed = word(Mode::Closed, 1, 2);
        if opened {
            set(&*gate, closed);
        }
        assert_ne!(other.join().unwrap(), opened);
        let found = GateWord::decode(Cell::load(&*gate, SeqCst)).unwrap();
        assert_eq!(found, if opened { closed } else { probe.with(Mode::Open) });
    });
}
