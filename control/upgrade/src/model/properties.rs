//! What holds of every upgrade in the model, whatever goes wrong.

use everdisk_proto::journal::Outcome;
use proptest::prelude::*;

use super::{Actor, Misfortune, Version, World, upgrade_by};
use crate::{
    policy::Handover,
    report::Report,
    run::{FIRED, resume},
    state::{self, State},
    unfinished::unfinished,
};

fn misfortune() -> impl Strategy<Value = Misfortune> {
    (1usize..30, 0..5u8).prop_map(|(n, kind)| match kind {
        0 => Misfortune::Fails(n),
        1 => Misfortune::FailsDone(n),
        2 => Misfortune::ServingDies(n),
        3 => Misfortune::ControlEnds(n),
        _ => Misfortune::Rollback(n),
    })
}

/// Every row of the table is fired by some run of the model, and what a run fires stands in the table: there is no other way to a state.
#[test]
fn what_the_machine_fires_is_the_table() {
    const ACTS: usize = 24;
    FIRED.take();
    for world in [World::new(), World { no_way_back: true, ..World::new() }, World { adopts: false, ..World::new() }] {
        for handover in [Handover::Flush, Handover::Carry] {
            // Two misfortunes at one act, and another one later.
            for act in 1..=ACTS {
                for (first, second) in misfortunes_at(act).into_iter().flat_map(|a| misfortunes_at(act).map(|b| (a, b)))
                {
                    for third in (act..=ACTS).flat_map(misfortunes_at) {
                        run_to_the_end(world.clone(), handover, vec![first, second, third]);
                    }
                }
            }
        }
    }
    let fired = FIRED.take();
    let rows = State::ALL.into_iter().flat_map(|state| state::Event::ALL.map(|event| (state, event)));
    let mut unused = rows.filter(|(state, event)| state.after(*event).is_some() && !fired.contains(&(*state, *event)));
    assert_eq!(unused.next(), None, "a row that no run needs");
}

/// An upgrade of a volume with one old core, whose death gives the new one the gate, taken up until it has an end. Between the end of
/// one control module and the start of the next the core that serves may die.
fn run_to_the_end(mut world: World, handover: Handover, misfortunes: Vec<Misfortune>) {
    world.cores.remove(&11);
    upgrade_by(handover, &mut world, misfortunes);
    for dies in [false, true] {
        let mut world = world.clone();
        if dies {
            world.die(world.serving);
        }
        let Some(left) = unfinished(&world.journal) else { break };
        let kept = Report::new("v".to_owned(), 1, "1.0.0".to_owned());
        let current = world.build(world.current);
        resume(&mut Actor::new(&mut world, Vec::new()), &left, &current, kept);
    }
}

fn misfortunes_at(act: usize) -> [Misfortune; 5] {
    [
        Misfortune::Fails(act),
        Misfortune::FailsDone(act),
        Misfortune::ServingDies(act),
        Misfortune::ControlEnds(act),
        Misfortune::Rollback(act),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 4000, ..ProptestConfig::default() })]

    /// The post-condition: exactly one version is left, it serves, it is the recorded one, writes are buffered; after a crash of the
    /// control module this holds once it has taken the upgrade up, however often it crashes in doing so.
    #[test]
    fn whatever_goes_wrong_one_core_serves_and_nothing_is_left_over(
        first in proptest::collection::vec(misfortune(), 0..4),
        second in proptest::collection::vec(misfortune(), 0..3),
        (carry, buffer, adopts, ailing) in any::<(bool, bool, bool, bool)>(),
    ) {
        let handover = if carry { Handover::Carry } else { Handover::Flush };
        let mut world = World { buffer, dirty: buffer, adopts, ailing, ..World::new() };
        let (mut report, mut ended) = upgrade_by(handover, &mut world, first);
        for misfortunes in [second, Vec::new()] {
            let Some(left) = unfinished(&world.journal) else { break };
            let kept = world.kept.clone().unwrap_or_else(|| Report::new("v".to_owned(), 1, "1.0.0".to_owned()));
            let current = world.build(world.current);
            let mut actor = Actor::new(&mut world, misfortunes);
            report = resume(&mut actor, &left, &current, kept).report;
            ended = actor.ended;
        }
        if ended {
            // It ended in the very last act: the world must be sound, whatever was reported.
            let outcome = if world.current == Version::New { Outcome::Committed } else { Outcome::Aborted };
            world.check(outcome);
        } else if let Some(outcome) = report.outcome {
            world.check(outcome);
        }
    }
}
