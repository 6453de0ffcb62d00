//! A world of processes for the machine to act on: every act may fail, half-done or not, cores may die at any time,
//! and the control module itself may end between any two acts.

use std::{collections::BTreeMap, time::Duration};

use everdisk_proto::{
    frame::{HandoverFailure, HandoverReport, Suspension},
    ids::Generation,
    journal::{CoreBuild, Event, JOURNAL_VERSION, Outcome, Record},
    version::CoreIdentity,
};
use proptest::prelude::*;

use crate::{
    act::{Act, Fault, GivenBack},
    health::Observation,
    report::Report,
    run::{Plan, resume, run},
    step::Step,
    take_up::unfinished,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    Old,
    New,
}

fn build(version: Version) -> CoreBuild {
    let name = if version == Version::Old { "1.0.0" } else { "2.0.0" };
    let line = format!("everdisk-core {name} (abi 1..1, buffer 0..0)");
    CoreBuild { program: name.into(), identity: CoreIdentity::parse(&line).unwrap() }
}

/// What lasts when the control module ends.
#[derive(Clone, Debug)]
struct World {
    cores: BTreeMap<u32, Version>,
    serving: u32,
    next_pid: u32,
    staged: bool,
    current: Version,
    journal: Vec<Record>,
    kept: Option<Report>,
    /// So many hand-overs find a core that does not drain.
    undrained: u32,
    /// No old core can take the gate back.
    no_way_back: bool,
}

impl World {
    fn new() -> Self {
        let cores = BTreeMap::from([(10, Version::Old), (11, Version::Old)]);
        Self {
            cores,
            serving: 10,
            next_pid: 12,
            staged: false,
            current: Version::Old,
            journal: Vec::new(),
            kept: None,
            undrained: 0,
            no_way_back: false,
        }
    }

    fn start(&mut self, version: Version) -> u32 {
        let pid = self.next_pid;
        self.next_pid += 1;
        self.cores.insert(pid, version);
        pid
    }

    /// The crash path of the interface, and of the supervisor where no core is left.
    fn die(&mut self, pid: u32) {
        self.cores.remove(&pid);
        if self.serving == pid {
            self.serving = match self.cores.keys().next() {
                Some(next) => *next,
                None => self.start(self.current),
            };
        }
    }

    fn check(&self, outcome: Outcome) {
        let serving = self.cores.get(&self.serving).expect("a core serves");
        let new = outcome == Outcome::Committed;
        let expected = if new { Version::New } else { Version::Old };
        assert_eq!(*serving, expected, "{self:?}");
        assert_eq!(self.current, expected, "{self:?}");
        assert_eq!(self.staged, new, "{self:?}");
        assert!(self.cores.values().all(|v| *v == expected), "left over: {self:?}");
    }
}

/// A misfortune at the n-th act.
#[derive(Clone, Copy, Debug)]
enum Misfortune {
    /// The act fails and did nothing.
    Fails(usize),
    /// The act fails although it was done.
    FailsDone(usize),
    /// The core that serves dies before it.
    ServingDies(usize),
    /// The control module ends before it.
    ControlEnds(usize),
    /// The operator wants the old core back from then on.
    Rollback(usize),
}

struct Actor<'a> {
    world: &'a mut World,
    misfortunes: Vec<Misfortune>,
    acts: usize,
    now_us: u64,
    ended: bool,
    rollback: bool,
    new: Option<u32>,
}

impl<'a> Actor<'a> {
    fn new(world: &'a mut World, misfortunes: Vec<Misfortune>) -> Self {
        Self { world, misfortunes, acts: 0, now_us: 0, ended: false, rollback: false, new: None }
    }

    /// Passes an act that can fail through the misfortunes.
    fn act<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, Fault>) -> Result<T, Fault> {
        self.acts += 1;
        let now = self.acts;
        let (mut fails, mut done) = (false, false);
        for misfortune in self.misfortunes.clone() {
            match misfortune {
                Misfortune::Fails(n) if n == now => fails = true,
                Misfortune::FailsDone(n) if n == now => done = true,
                Misfortune::ServingDies(n) if n == now && !self.ended => self.world.die(self.world.serving),
                Misfortune::ControlEnds(n) if n == now => self.ended = true,
                Misfortune::Rollback(n) if n == now => self.rollback = true,
                _ => {}
            }
        }
        if self.ended || fails {
            return Err(Fault("misfortune".to_owned()));
        }
        let result = work(self);
        if done { Err(Fault("misfortune, done".to_owned())) } else { result }
    }
}

impl Act for Actor<'_> {
    fn now_us(&mut self) -> u64 {
        self.now_us += 1;
        self.now_us
    }
    fn sleep(&mut self, time: Duration) {
        self.now_us += u64::try_from(time.as_micros()).unwrap();
    }
    fn begins(&mut self, _: Step) {}
    fn record(&mut self, event: Event) -> Result<(), Fault> {
        self.act(|a| {
            a.world.journal.push(Record { v: JOURNAL_VERSION, upgrade: 1, at_ms: 0, event });
            Ok(())
        })
    }
    fn stage(&mut self, _: Duration) -> Result<(), Fault> {
        self.act(|a| {
            a.world.staged = true;
            Ok(())
        })
    }
    fn verify(&mut self, _: Duration) -> Result<CoreBuild, Fault> {
        self.act(|_| Ok(build(Version::New)))
    }
    fn start(&mut self, _: Duration) -> Result<u32, Fault> {
        self.act(|a| {
            let pid = a.world.start(Version::New);
            a.new = Some(pid);
            Ok(pid)
        })
    }
    fn read_stores(&mut self, _: u32, _: Duration) -> Result<u32, Fault> {
        self.act(|_| Ok(64))
    }
    fn flush(&mut self, _: Duration) -> Result<(), Fault> {
        self.act(|_| Ok(()))
    }
    fn hand_over(&mut self, to: u32, _: Duration) -> Result<HandoverReport, Fault> {
        self.act(|a| {
            let undrained = a.world.undrained > 0;
            a.world.undrained = a.world.undrained.saturating_sub(1);
            let failure = (undrained || !a.world.cores.contains_key(&to))
                .then(|| HandoverFailure { switched: false, reason: "no such core, or not drained".to_owned() });
            if failure.is_none() {
                a.world.serving = to;
            }
            Ok(HandoverReport {
                failure,
                generation: Generation(2),
                suspension: Suspension::default(),
                probe_blocks: 1,
            })
        })
    }
    fn observe(&mut self, _: u32) -> Result<Observation, Fault> {
        self.act(|a| {
            Ok(Observation { serving: Some(a.world.serving), io_errors: Some(0), rollback_wanted: a.rollback })
        })
    }
    fn keep(&mut self, report: &Report) {
        if !self.ended {
            self.world.kept = Some(report.clone());
        }
    }
    fn commit(&mut self, _: &CoreBuild, pid: u32, _: Duration) -> Result<(), Fault> {
        // It is recorded or not: an error after it was done there is not.
        self.act(|a| if a.world.serving == pid { Ok(()) } else { Err(Fault("it died".to_owned())) })?;
        self.world.current = Version::New;
        self.world.cores.retain(|p, _| *p == pid);
        Ok(())
    }
    fn hand_back(&mut self) -> Result<GivenBack, Fault> {
        if self.ended {
            return Ok(GivenBack { had_switched: false });
        }
        let had_switched = self.world.cores[&self.world.serving] == Version::New;
        if had_switched && self.world.no_way_back {
            return Err(Fault("no old core".to_owned()));
        }
        if had_switched {
            let old = self.world.cores.iter().find(|(_, v)| **v == Version::Old).map(|(p, _)| *p);
            self.world.serving = old.unwrap_or_else(|| self.world.start(Version::Old));
        }
        Ok(GivenBack { had_switched })
    }
    fn dismiss(&mut self) {
        if !self.ended {
            self.world.cores.retain(|_, v| *v == Version::Old);
        }
    }
    fn unstage(&mut self) {
        if !self.ended {
            self.world.staged = false;
        }
    }
}

fn plan() -> Plan {
    Plan {
        from: build(Version::Old),
        from_pid: 10,
        pause_budget: Duration::from_millis(100),
        soak: Duration::from_secs(1),
    }
}

fn upgrade(world: &mut World, misfortunes: Vec<Misfortune>) -> (Report, bool) {
    let mut actor = Actor::new(world, misfortunes);
    let report = run(&mut actor, &plan(), Report::new("v".to_owned(), 1, "1.0.0".to_owned()));
    let ended = actor.ended;
    (report, ended)
}

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
}

#[test]
fn a_rollback_asked_for_in_the_soak_is_one() {
    let mut world = World::new();
    let (report, _) = upgrade(&mut world, vec![Misfortune::Rollback(14)]);
    assert_eq!(report.outcome, Some(Outcome::RolledBack));
    assert_eq!(report.failed_step, Some(Step::Soak));
    world.check(Outcome::RolledBack);
}

#[test]
fn a_rollback_asked_for_before_the_hand_over_stops_the_upgrade_there() {
    for act in 1..=9 {
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
    run(&mut actor, &plan(), Report::new("v".to_owned(), 1, "1.0.0".to_owned()));
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
    let report = resume(&mut actor, &left, &build(Version::Old), Report::new("v".to_owned(), 1, "1.0.0".to_owned()));
    assert_eq!(report.outcome, Some(Outcome::Committed));
    world.check(Outcome::Committed);
}

/// The control module ended after it had started the new core and before it had written that down.
#[test]
fn a_core_that_nobody_knows_and_nobody_can_replace_ends_the_upgrade_all_the_same() {
    let mut world = World::new();
    upgrade(&mut world, vec![Misfortune::ControlEnds(6)]);
    world.cores.retain(|_, version| *version == Version::New);
    (world.serving, world.no_way_back) = (12, true);
    let left = unfinished(&world.journal).unwrap();
    let mut actor = Actor::new(&mut world, Vec::new());
    let report = resume(&mut actor, &left, &build(Version::Old), Report::new("v".to_owned(), 1, "1.0.0".to_owned()));
    assert_eq!(report.outcome, Some(Outcome::Aborted));
    assert!(report.reason.unwrap().contains("the new core goes on"));
    assert_eq!(unfinished(&world.journal), None);
}

/// A step that fails names itself.
#[test]
fn each_failing_act_names_its_step() {
    let mut lines = String::new();
    for n in 1..=12 {
        let mut world = World::new();
        let (report, _) = upgrade(&mut world, vec![Misfortune::Fails(n)]);
        let step = report.failed_step.map_or("-", Step::name);
        lines += &format!("act {n:<3} {step:<8} {:?}\n", report.outcome.unwrap());
    }
    insta::assert_snapshot!(lines);
}

fn misfortune() -> impl Strategy<Value = Misfortune> {
    (1usize..26, 0..5u8).prop_map(|(n, kind)| match kind {
        0 => Misfortune::Fails(n),
        1 => Misfortune::FailsDone(n),
        2 => Misfortune::ServingDies(n),
        3 => Misfortune::ControlEnds(n),
        _ => Misfortune::Rollback(n),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 4000, ..ProptestConfig::default() })]

    /// The post-condition: exactly one version is left, it serves, it is the recorded one; after a crash of the
    /// control module this holds once it has taken the upgrade up, however often it crashes in doing so.
    #[test]
    fn whatever_goes_wrong_one_core_serves_and_nothing_is_left_over(
        first in proptest::collection::vec(misfortune(), 0..4),
        second in proptest::collection::vec(misfortune(), 0..3),
    ) {
        let mut world = World::new();
        let (mut report, mut ended) = upgrade(&mut world, first);
        for misfortunes in [second, Vec::new()] {
            let Some(left) = unfinished(&world.journal) else { break };
            let kept = world.kept.clone().unwrap_or_else(|| Report::new("v".to_owned(), 1, "1.0.0".to_owned()));
            let current = build(world.current);
            let mut actor = Actor::new(&mut world, misfortunes);
            report = resume(&mut actor, &left, &current, kept);
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
