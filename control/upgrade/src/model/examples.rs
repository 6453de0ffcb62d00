//! Single upgrades in the model, each with the misfortunes that make its point.

use everdisk_proto::journal::Outcome;

use super::{Actor, Misfortune, Version, World, old_build, plan, upgrade, upgrade_by};
use crate::{
    policy::Handover,
    report::Report,
    run::{resume, run},
    step::Step,
    unfinished::unfinished,
};

#[test]
fn an_upgrade_that_meets_no_misfortune_is_committed_and_journalled_in_order() {
    let mut world = World::new();
    let (report, _) = upgrade(&mut world, Vec::new());
    assert_eq!(report.outcome, Some(Outcome::Committed));
    assert_eq!(report.reason, None);
    world.check(Outcome::Committed);
    let names: Vec<String> =
        world.journal.iter().map(|r| format!("{:?}", r.event).split([' ', '{']).next().unwrap().to_owned()).collect();
    assert_eq!(names, ["Begin", "Staged", "Standby", "Handover", "Switched", "End"]);
    assert_eq!(report.verified_blocks, 64);
    assert_eq!((report.handover, report.buffered_bytes, report.carried_bytes), (Handover::Flush, 4096, 0));
    assert!(report.flush_ms.is_some() && report.notes.is_empty());
}

/// Number of the act that flushes.
const FLUSH: usize = 10;

#[test]
fn a_flush_that_fails_becomes_a_carry_where_the_new_core_knows_the_buffer_and_else_stops_the_upgrade() {
    for misfortune in [Misfortune::Fails(FLUSH - 1), Misfortune::FailsDone(FLUSH - 1), Misfortune::Fails(FLUSH)] {
        let mut world = World::new();
        let (report, _) = upgrade(&mut world, vec![misfortune]);
        world.check(Outcome::Committed);
        assert_eq!((report.outcome, report.reason, report.failed_step), (Some(Outcome::Committed), None, None));
        assert_eq!((report.handover, report.handover_asked), (Handover::Carry, Handover::Flush));
        assert_eq!(report.carried_bytes, 4096);
        assert!(report.notes[0].contains("is carried over"), "{:?}", report.notes);

        let mut world = World { adopts: false, ..World::new() };
        let (report, _) = upgrade(&mut world, vec![misfortune]);
        world.check(Outcome::Aborted);
        assert_eq!((report.outcome, report.failed_step), (Some(Outcome::Aborted), Some(Step::Flush)));
        assert_eq!((report.handover, report.attempts), (Handover::Flush, 0));
        assert!(report.reason.unwrap().contains("cannot be carried over"));

        let mut world = World { buffer: false, dirty: false, ..World::new() };
        let (report, _) = upgrade(&mut world, vec![Misfortune::Fails(FLUSH - 1)]);
        world.check(Outcome::Committed);
        assert_eq!((report.handover, report.notes.len()), (Handover::Carry, 1));
    }
}

#[test]
fn by_carry_nothing_is_flushed_and_a_core_that_does_not_know_the_buffer_is_refused_before_it_is_started() {
    let mut world = World::new();
    let (report, _) = upgrade_by(Handover::Carry, &mut world, Vec::new());
    world.check(Outcome::Committed);
    assert_eq!((report.handover, report.flush_ms, report.carried_bytes), (Handover::Carry, None, 4096));
    assert!(report.steps.iter().all(|s| s.step != Step::Flush));

    let mut world = World { adopts: false, ..World::new() };
    let (report, _) = upgrade_by(Handover::Carry, &mut world, Vec::new());
    world.check(Outcome::Aborted);
    assert_eq!((report.failed_step, world.next_pid), (Some(Step::Verify), 12));
    let reason = report.reason.unwrap();
    assert!(reason.contains("version 1 and everdisk-core 2.0.0 adopts 0..0"), "{reason}");
    assert!(reason.contains("use --handover flush"), "{reason}");

    // Without a write buffer there is nothing that a core would have to know.
    let mut world = World { adopts: false, buffer: false, dirty: false, ..World::new() };
    let (report, _) = upgrade_by(Handover::Carry, &mut world, Vec::new());
    world.check(Outcome::Committed);
    assert_eq!((report.flush_ms, report.buffered_bytes), (None, 0));
}

#[test]
fn a_core_that_does_not_know_the_buffer_is_given_the_gate_when_it_is_empty() {
    let mut world = World { adopts: false, ..World::new() };
    let (report, _) = upgrade(&mut world, Vec::new());
    world.check(Outcome::Committed);
    assert_eq!((report.handover, report.carried_bytes), (Handover::Flush, 0));
}

#[test]
fn a_new_core_that_reads_no_worse_than_the_old_one_goes_on() {
    const READ_STORES: usize = 8;
    for (ailing, outcome) in [(true, Outcome::Committed), (false, Outcome::Aborted)] {
        let mut world = World { ailing, ..World::new() };
        let (report, _) = upgrade(&mut world, vec![Misfortune::Fails(READ_STORES)]);
        world.check(outcome);
        assert_eq!((report.verified_blocks, report.notes.len()), (0, usize::from(ailing)));
        assert_eq!(report.failed_step, (!ailing).then_some(Step::Standby));
    }
}

/// The old core dies while writes go through, and the new one is given the gate by its death, not by a hand-over.
#[test]
fn writes_are_buffered_again_also_when_the_new_core_has_the_gate_by_the_death_of_the_old_ones() {
    let mut world = World::new();
    world.cores.remove(&11);
    let (report, _) = upgrade(&mut world, vec![Misfortune::ServingDies(FLUSH)]);
    assert_eq!(report.outcome, Some(Outcome::Committed));
    world.check(Outcome::Committed);
}

#[test]
fn a_rollback_asked_for_in_the_soak_is_one() {
    let mut world = World::new();
    let (report, _) = upgrade(&mut world, vec![Misfortune::Rollback(16)]);
    assert_eq!(report.outcome, Some(Outcome::RolledBack));
    assert_eq!(report.failed_step, Some(Step::Soak));
    world.check(Outcome::RolledBack);
}

#[test]
fn a_rollback_asked_for_before_the_hand_over_stops_the_upgrade_there() {
    for act in 1..=11 {
        let mut world = World::new();
        let (report, _) = upgrade(&mut world, vec![Misfortune::Rollback(act)]);
        assert_eq!((report.outcome, report.attempts), (Some(Outcome::Aborted), 0));
        world.check(Outcome::Aborted);
    }
}

#[test]
fn a_core_that_does_not_drain_is_tried_again_and_not_for_ever() {
    for (undrained, outcome, attempts) in
        [(0, Outcome::Committed, 1), (4, Outcome::Committed, 5), (5, Outcome::Aborted, 5)]
    {
        let mut world = World { undrained, ..World::new() };
        let (report, _) = upgrade(&mut world, Vec::new());
        assert_eq!((report.outcome, report.attempts), (Some(outcome), attempts), "{report:?}");
        assert_eq!(report.steps.iter().filter(|s| s.step == Step::Suspend).count(), 1, "those of the last attempt");
        world.check(outcome);
    }
}

/// Number of the act that commits when nothing goes wrong: the one before the last.
fn commit_act() -> usize {
    let mut world = World::new();
    let mut actor = Actor::new(&mut world, Vec::new());
    run(&mut actor, &plan(Handover::Flush), Report::new("v".to_owned(), 1, "1.0.0".to_owned()));
    actor.acts - 1
}

#[test]
fn what_cannot_be_recorded_is_not_committed() {
    let mut world = World::new();
    let (report, _) = upgrade(&mut world, vec![Misfortune::Fails(commit_act())]);
    assert_eq!((report.outcome, report.failed_step), (Some(Outcome::RolledBack), Some(Step::Commit)));
    world.check(Outcome::RolledBack);
}

#[test]
fn what_can_neither_be_recorded_nor_undone_is_taken_up_again() {
    let mut world = World { no_way_back: true, ..World::new() };
    let commit = commit_act();
    let (report, _) = upgrade(&mut world, vec![Misfortune::Fails(commit), Misfortune::Fails(commit + 1)]);
    assert_eq!(report.outcome, None);
    assert!(report.reason.unwrap().contains("no old core"));
    let left = unfinished(&world.journal).unwrap();
    let mut actor = Actor::new(&mut world, Vec::new());
    let report = resume(&mut actor, &left, &old_build(), Report::new("v".to_owned(), 1, "1.0.0".to_owned())).report;
    assert_eq!(report.outcome, Some(Outcome::Committed));
    world.check(Outcome::Committed);
}

/// beyond 1: the new core has died after the soak, the standby of the same program serves, and no old core can take the gate.
#[test]
fn the_standby_of_the_new_program_is_committed_where_it_serves_and_what_is_kept_does_not_grow() {
    let mut world = World { no_way_back: true, ..World::new() };
    let (mut report, _) = upgrade(&mut world, vec![Misfortune::ServingDies(commit_act())]);
    assert_eq!((report.outcome, world.serving), (None, 13), "{report:?}");
    let left = unfinished(&world.journal).unwrap();
    let take_up = |world: &mut World, misfortunes, report: &Report| {
        let mut actor = Actor::new(world, misfortunes);
        let report = resume(&mut actor, &left, &old_build(), report.clone()).report;
        (report, actor.acts)
    };
    // The last act before the end is the record. While it cannot be written, what is kept is as long after one attempt as after another.
    let (_, acts) = take_up(&mut world.clone(), Vec::new(), &report);
    let cannot_record = || (acts - 1..acts + 9).map(Misfortune::Fails).collect::<Vec<_>>();
    let (first, _) = take_up(&mut world.clone(), cannot_record(), &report);
    assert_eq!(first.outcome, None);
    let (second, _) = take_up(&mut world.clone(), cannot_record(), &first);
    assert_eq!((&second.reason, second.steps.len()), (&first.reason, first.steps.len()));
    (report, _) = take_up(&mut world, Vec::new(), &second);
    assert_eq!((report.outcome, report.reason, report.failed_step), (Some(Outcome::Committed), None, None));
    world.check(Outcome::Committed);
}

/// An end that could not be journalled is journalled later, with the reasons of the upgrade alone.
#[test]
fn that_the_end_is_not_journalled_is_told_and_not_kept() {
    let mut world = World::new();
    let end = commit_act() + 1;
    let mut actor = Actor::new(&mut world, vec![Misfortune::Fails(end)]);
    let ended = run(&mut actor, &plan(Handover::Flush), Report::new("v".to_owned(), 1, "1.0.0".to_owned()));
    assert!(!ended.is_journalled());
    assert_eq!((ended.report.outcome, &ended.report.reason), (Some(Outcome::Committed), &None));
    assert!(ended.answer().reason.unwrap().contains("could not be journalled"));
}

/// The control module ended after it had started the new core and before it had written that down.
#[test]
fn a_core_that_nobody_knows_and_nobody_can_replace_ends_the_upgrade_all_the_same() {
    let mut world = World::new();
    upgrade(&mut world, vec![Misfortune::ControlEnds(7)]);
    world.cores.retain(|_, version| *version == Version::New);
    (world.serving, world.no_way_back) = (12, true);
    let left = unfinished(&world.journal).unwrap();
    let mut actor = Actor::new(&mut world, Vec::new());
    let report = resume(&mut actor, &left, &old_build(), Report::new("v".to_owned(), 1, "1.0.0".to_owned())).report;
    assert_eq!(report.outcome, Some(Outcome::Aborted));
    assert!(report.reason.unwrap().contains("the new core goes on"));
    assert_eq!(unfinished(&world.journal), None);
}

/// A step that fails names itself.
#[test]
fn each_failing_act_names_its_step() {
    let mut lines = String::new();
    for n in 1..=14 {
        let mut line = format!("act {n:<3}");
        for (handover, adopts) in [(Handover::Flush, true), (Handover::Flush, false), (Handover::Carry, true)] {
            let mut world = World { adopts, ..World::new() };
            let (report, _) = upgrade_by(handover, &mut world, vec![Misfortune::Fails(n)]);
            let (step, outcome) = (report.failed_step.map_or("-", Step::name), report.outcome.unwrap());
            world.check(outcome);
            line += &format!(" {} {step:<8} {:<11}", report.handover, format!("{outcome:?}"));
        }
        lines += line.trim_end();
        lines += "\n";
    }
    insta::assert_snapshot!(lines);
}
