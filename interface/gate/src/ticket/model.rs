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
    /// Workers that are executing now: never two of different generations.
    executing: AtomicUsize,
}

/// M10, M4: once the interface has seen every ticket in, no worker of the old generation executes, whatever the
/// interleaving; the successor executes only after that.
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

/// Of the successor that opens and the interface that takes the gate back exactly one prevails.
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

/// The fence: a sender of the old generation and one of the new never write at once, even though the old core is not waited
/// for when it is given to the new one.
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
