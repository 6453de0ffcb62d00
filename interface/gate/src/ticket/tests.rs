use std::sync::atomic::{AtomicU32, AtomicU64};

use everdisk_proto::ids::Generation;
use proptest::prelude::*;

use super::*;

fn word(mode: Mode, slot: usize, generation: u64) -> GateWord {
    GateWord { mode, slot: Slot::new(slot).unwrap(), generation: Generation(generation) }
}

/// M10: what is read under a closed gate is not executed. The same core may execute it once it has the gate again under
/// the same generation.
#[test]
fn m10_a_closed_gate_keeps_a_request_and_the_same_generation_may_execute_it() {
    let gate = AtomicU64::new(word(Mode::Open, 1, 5).encode());
    let state = AtomicU32::new(PARKED);
    let slot = Slot::new(1).unwrap();
    let Admission::Admitted(pass) = unpark(&gate, &state, slot) else { panic!("open") };
    assert!(enter(&gate, &state, pass));
    leave(&state);
    set(&gate, word(Mode::Closed, 1, 5));
    assert!(!enter(&gate, &state, pass));
    assert!(!is_in(&state));
    park(&state);
    assert!(is_in(&state));
    assert_eq!(unpark(&gate, &state, slot), Admission::Shut);

    set(&gate, word(Mode::Open, 1, 5));
    let Admission::Admitted(again) = unpark(&gate, &state, slot) else { panic!("reopened") };
    assert!(pass.continues_in(again));
    park(&state);

    set(&gate, word(Mode::Open, 1, 6));
    let Admission::Admitted(next) = unpark(&gate, &state, slot) else { panic!("next generation") };
    assert!(!pass.continues_in(next), "another core may have been given the request in between");
}

#[test]
fn a_change_to_synchronous_mode_does_not_stop_the_workers() {
    let gate = AtomicU64::new(word(Mode::Open, 0, 1).encode());
    let state = AtomicU32::new(PARKED);
    let Admission::Admitted(pass) = unpark(&gate, &state, Slot::new(0).unwrap()) else { panic!("open") };
    set(&gate, word(Mode::Synchronous, 0, 1));
    assert!(enter(&gate, &state, pass));
}

#[test]
fn a_revoked_probe_cannot_open_the_gate_any_more() {
    let probe = word(Mode::Probe, 2, 9);
    let gate = AtomicU64::new(probe.encode());
    assert!(revoke_probe(&gate, probe));
    assert!(!open_after_probe(&gate, probe));
}

proptest! {
    /// Any sequence of gate words: a worker is admitted and enters exactly when the reference says so.
    #[test]
    fn entering_follows_the_reference(words in proptest::collection::vec((1u8..5, 0usize..3, 0u64..3), 1..40)) {
        let slot = Slot::new(1).unwrap();
        let gate = AtomicU64::new(0);
        let state = AtomicU32::new(PARKED);
        let mut pass: Option<(Pass, u64)> = None;
        for (mode, at, generation) in words {
            let mode = [Mode::Open, Mode::Synchronous, Mode::Closed, Mode::Probe][usize::from(mode) - 1];
            let now = word(mode, at, generation);
            set(&gate, now);
            let mine = now.serves() && now.slot == slot;
            if let Some((pass, under)) = pass {
                prop_assert_eq!(enter(&gate, &state, pass), mine && under == generation);
                park(&state);
            }
            match unpark(&gate, &state, slot) {
                Admission::Admitted(new) => { prop_assert!(mine); pass = Some((new, generation)); }
                Admission::Probe(_) => prop_assert!(mode == Mode::Probe && now.slot == slot),
                Admission::Shut => prop_assert!(!mine),
            }
        }
    }
}
