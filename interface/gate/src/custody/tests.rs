use proptest::prelude::*;

use super::*;

fn slot(index: usize) -> Slot {
    Slot::new(index).unwrap()
}

fn serving(cores: usize) -> Custody {
    let mut custody = Custody::new();
    for i in 0..cores {
        custody.joined(slot(i));
        assert_eq!(custody.armed(slot(i)), Act::Nothing);
    }
    assert!(matches!(custody.attach(slot(0)), Ok(Act::Give(word)) if word.slot == slot(0)));
    assert_eq!(custody.probed(slot(0), true), Act::Nothing);
    custody
}

/// D3: death of the serving core gives the gate to the standby under a new generation.
#[test]
fn d3_death_of_the_serving_core_gives_the_gate_to_the_standby() {
    let mut custody = serving(2);
    let before = custody.generation();
    let Act::Give(word) = custody.died(slot(0)) else { panic!("no take-over") };
    assert_eq!((word.slot, word.generation), (slot(1), before.next()));
    assert_eq!(custody.crashes(), 1);
}

/// D9: while the predecessor is parked, it is preferred to any standby.
#[test]
fn d9_the_parked_predecessor_comes_before_the_standby() {
    let mut custody = serving(3);
    assert!(matches!(custody.hand_over(slot(2)), Act::Give(_)));
    assert_eq!(custody.probed(slot(2), true), Act::Nothing);
    assert!(matches!(custody.died(slot(2)), Act::Grant(word) if word.slot == slot(0)));
}

#[test]
fn a_failed_probe_returns_the_gate_to_the_predecessor_without_another_probe() {
    let mut custody = serving(2);
    let before = custody.generation();
    assert!(matches!(custody.hand_over(slot(1)), Act::Give(_)));
    let Act::Grant(back) = custody.probed(slot(1), false) else { panic!("not returned") };
    assert_eq!((back.slot, back.mode, back.generation), (slot(0), Mode::Open, before.next().next()));
}

#[test]
fn when_every_probe_fails_a_core_serves_all_the_same() {
    let mut custody = serving(3);
    assert!(matches!(custody.died(slot(0)), Act::Give(word) if word.slot == slot(1)));
    assert!(matches!(custody.probed(slot(1), false), Act::Give(word) if word.slot == slot(2)));
    assert!(matches!(custody.probed(slot(2), false), Act::Grant(word) if word.slot == slot(1)));
    assert_eq!(custody.serving(), Some(slot(1)));
}

#[test]
fn a_postponed_giving_is_tried_again() {
    let mut custody = serving(2);
    let Act::Give(word) = custody.died(slot(0)) else { panic!("no take-over") };
    custody.postponed();
    assert_eq!(custody.serving(), None);
    assert!(
        matches!(custody.retry(), Act::Give(again) if again.slot == word.slot && again.generation > word.generation)
    );
}

/// D8, A: a suspension ends by its lease, under the same generation.
#[test]
fn d8_a_lease_ends_the_suspension_under_the_same_generation() {
    let mut custody = serving(1);
    let generation = custody.generation();
    assert!(matches!(custody.suspend(100), Ok(Act::Close(_))));
    assert_eq!(custody.tick(99), Act::Nothing);
    assert!(matches!(custody.tick(100), Act::Reopen(word) if word.generation == generation));
    assert_eq!(custody.resume(), Err(Refusal::NotSuspended));
}

#[test]
fn death_during_a_suspension_is_made_good_at_its_end() {
    let mut custody = serving(2);
    assert!(matches!(custody.suspend(100), Ok(Act::Close(_))));
    assert_eq!(custody.died(slot(0)), Act::Nothing);
    assert!(matches!(custody.resume(), Ok(Act::Give(word)) if word.slot == slot(1)));
}

/// The table of refusals: which command is refused in which state.
#[test]
fn the_table_of_refusals() {
    let detached = Custody::new();
    let mut suspended = serving(2);
    let _ = suspended.suspend(9);
    let mut recovering = serving(1);
    let _ = recovering.died(slot(0));
    let cases = [("detached", detached), ("serving", serving(2)), ("suspended", suspended), ("recovering", recovering)];
    let mut table = String::new();
    for (name, custody) in cases {
        let show = |r: Result<(), Refusal>| r.err().map_or("ok", Refusal::as_str);
        let lines = [
            ("attach", show(custody.clone().attach(slot(1)).map(drop))),
            ("suspend", show(custody.clone().suspend(5).map(drop))),
            ("resume", show(custody.clone().resume().map(drop))),
            ("synchronous", show(custody.clone().set_synchronous(true).map(drop))),
            ("hand over to 0", show(custody.may_hand_over(slot(0)).map(drop))),
            ("hand over to 1", show(custody.may_hand_over(slot(1)).map(drop))),
            ("hand over to 7", show(custody.may_hand_over(slot(7)).map(drop))),
        ];
        for (command, answer) in lines {
            table.push_str(&format!("{name:10} {command:15} {answer}\n"));
        }
    }
    insta::assert_snapshot!(table);
}

#[derive(Clone, Debug)]
enum Event {
    Join(usize),
    Arm(usize),
    Die(usize),
    Attach(usize),
    Suspend(u64),
    Resume,
    Tick(u64),
    Retry,
    HandOver(usize),
    Fail,
    Postpone,
    Synchronous(bool),
}

fn event() -> impl Strategy<Value = Event> {
    let core = 0..4usize;
    prop_oneof![
        core.clone().prop_map(Event::Join),
        core.clone().prop_map(Event::Arm),
        core.clone().prop_map(Event::Die),
        core.clone().prop_map(Event::Attach),
        (1..50u64).prop_map(Event::Suspend),
        Just(Event::Resume),
        (0..60u64).prop_map(Event::Tick),
        Just(Event::Retry),
        core.prop_map(Event::HandOver),
        Just(Event::Fail),
        Just(Event::Postpone),
        any::<bool>().prop_map(Event::Synchronous),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    /// In any sequence: generations only grow, and grow each time the gate is given; only armed cores are given the
    /// gate; it is reopened only for the core and generation that had it; no request waits while there is an armed
    /// core.
    #[test]
    fn custody_keeps_its_invariants(events in proptest::collection::vec(event(), 1..60)) {
        let mut custody = Custody::new();
        let mut given: Option<GateWord> = None;
        for event in events {
            let before = custody.generation();
            let act = match event {
                Event::Join(i) if custody.slot_state(slot(i)) == SlotState::Vacant => { custody.joined(slot(i)); Act::Nothing }
                Event::Arm(i) if custody.slot_state(slot(i)) == SlotState::Joined => custody.armed(slot(i)),
                Event::Die(i) if custody.slot_state(slot(i)) != SlotState::Vacant => custody.died(slot(i)),
                Event::Attach(i) => custody.attach(slot(i)).unwrap_or(Act::Nothing),
                Event::Suspend(until) => custody.suspend(until).unwrap_or(Act::Nothing),
                Event::Resume => custody.resume().unwrap_or(Act::Nothing),
                Event::Tick(now) => {
                    let act = custody.tick(now);
                    if let State::Suspended { until_ns, .. } = custody.state() { prop_assert!(now < until_ns); }
                    act
                }
                Event::Retry => custody.retry(),
                Event::HandOver(i) if custody.may_hand_over(slot(i)).is_ok() => custody.hand_over(slot(i)),
                Event::Fail => custody.serving().map_or(Act::Nothing, |s| custody.probed(s, false)),
                Event::Postpone if matches!(custody.state(), State::Serving { .. }) => {
                    custody.postponed();
                    custody.retry()
                }
                Event::Synchronous(on) => custody.set_synchronous(on).unwrap_or(Act::Nothing),
                _ => Act::Nothing,
            };
            match act {
                Act::Give(word) | Act::Grant(word) => {
                    prop_assert_eq!(word.generation, before.next());
                    prop_assert_eq!(custody.serving(), Some(word.slot));
                    let probes = word.mode == Mode::Probe;
                    prop_assert_eq!(probes, matches!(act, Act::Give(_)));
                    prop_assert!(matches!(custody.slot_state(word.slot), SlotState::Armed | SlotState::Unfit));
                    prop_assert!(!probes || custody.slot_state(word.slot) == SlotState::Armed);
                    prop_assert_eq!(custody.serving_mode(), Mode::Open);
                    given = Some(word);
                }
                Act::Reopen(word) | Act::SetMode(word) => {
                    let had = given.expect("given before");
                    prop_assert_eq!((word.slot, word.generation), (had.slot, had.generation));
                    prop_assert_eq!(word.mode, custody.serving_mode());
                }
                Act::Close(word) => prop_assert_eq!(word.mode, Mode::Closed),
                Act::Nothing => {}
            }
            if !matches!(act, Act::Give(_) | Act::Grant(_)) { prop_assert_eq!(custody.generation(), before); }
            match custody.state() {
                State::Serving { slot } => prop_assert!(matches!(custody.slot_state(slot), SlotState::Armed | SlotState::Unfit)),
                State::Recovering => {
                    prop_assert!(Slot::all().all(|s| matches!(custody.slot_state(s), SlotState::Vacant | SlotState::Joined)));
                }
                _ => {}
            }
        }
    }
}
