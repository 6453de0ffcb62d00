//! A world of processes for the machine to act on: every act may fail, half-done or not, cores may die at any time,
//! and the control module itself may end between any two acts.

use std::{collections::BTreeMap, time::Duration};

use everdisk_proto::{
    frame::{HandoverFailure, HandoverReport, Suspension},
    identity::{Build, Identity},
    ids::Generation,
    journal::{Entry, Event, JOURNAL_VERSION, Outcome},
};
use proptest::prelude::*;

use crate::{
    act::{Act, Fault, GivenBack},
    health::Observation,
    policy::{Buffer, Handover},
    report::Report,
    run::{FIRED, Plan, resume, run},
    state::{self, State},
    step::{Limits, Step},
    unfinished::unfinished,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    Old,
    New,
}

fn identity(name: &str, buffer: &str) -> Identity {
    Identity::parse(&format!("everdisk-core {name} (abi 1..1, buffer {buffer})")).unwrap()
}

fn old_build() -> Build {
    Build { program: "1.0.0".into(), identity: identity("1.0.0", "0..1"), digest: None }
}

/// What lasts when the control module ends.
#[derive(Clone, Debug)]
struct World {
    cores: BTreeMap<u32, Version>,
    serving: u32,
    next_pid: u32,
    staged: bool,
    current: Version,
    journal: Vec<Entry>,
    kept: Option<Report>,
    /// Number of hand-overs that find a core that does not drain.
    undrained: u32,
    /// No old core can take the gate back.
    no_way_back: bool,
    /// The volume has a write buffer, of version 1.
    buffer: bool,
    /// The new core knows it.
    adopts: bool,
    /// There is something in it.
    dirty: bool,
    /// Writes go through to the storage nodes.
    synchronous: bool,
    /// The old core cannot read them either.
    ailing: bool,
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
            buffer: true,
            adopts: true,
            dirty: true,
            synchronous: false,
            ailing: false,
        }
    }

    fn build(&self, version: Version) -> Build {
        match (version, self.adopts) {
            (Version::Old, _) => old_build(),
            (Version::New, adopts) => {
                let buffer = if adopts { "0..1" } else { "0..0" };
                Build { program: "2.0.0".into(), identity: identity("2.0.0", buffer), digest: None }
            }
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
            let fits = |version: Version| version == Version::Old || self.adopts || !self.dirty;
            self.serving = match self.cores.iter().find(|(_, version)| fits(**version)) {
                Some((next, _)) => *next,
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
        assert!(!self.synchronous, "writes are not buffered again: {self:?}");
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

    /// The core that serves does not leave, whichever it is.
    fn dismiss_old(&mut self) {
        let serving = self.world.serving;
        self.world.cores.retain(|pid, version| *version == Version::New || *pid == serving);
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
            a.world.journal.push(Entry { v: JOURNAL_VERSION, upgrade: 1, at_ms: 0, event });
            Ok(())
        })
    }
    fn stage(&mut self, _: Duration) -> Result<(), Fault> {
        self.act(|a| {
            a.world.staged = true;
            Ok(())
        })
    }
    fn verify(&mut self, _: Duration) -> Result<Build, Fault> {
        self.act(|a| Ok(a.world.build(Version::New)))
    }
    fn buffer(&mut self) -> Result<Option<Buffer>, Fault> {
        self.act(|a| {
            let buffer = Buffer { version: 1, bytes: 4096, holder: old_build().identity };
            Ok(a.world.buffer.then_some(buffer))
        })
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
    fn ailing(&mut self) -> Option<String> {
        self.world.ailing.then(|| "node a is stalled".to_owned())
    }
    fn synchronous(&mut self) -> Result<(), Fault> {
        self.act(|a| {
            assert!(a.world.buffer, "a volume without a write buffer is always synchronous");
            a.world.synchronous = true;
            Ok(())
        })
    }
    fn flush(&mut self, _: Duration) -> Result<(), Fault> {
        self.act(|a| {
            assert!(a.world.synchronous || !a.world.buffer, "M3");
            a.world.dirty = false;
            Ok(())
        })
    }
    fn follow(&mut self, _: u32) {}
    fn hand_over(&mut self, to: u32, _: Duration) -> Result<HandoverReport, Fault> {
        self.act(|a| {
            // A core that cannot adopt the buffer is never given the gate while there is something in it.
            assert!(a.world.adopts || !a.world.dirty, "{:?}", a.world);
            assert!(!a.world.dirty || !a.world.synchronous, "writes wait while they are carried over: {:?}", a.world);
            let undrained = a.world.undrained > 0;
            a.world.undrained = a.world.undrained.saturating_sub(1);
            let failure = (undrained || !a.world.cores.contains_key(&to))
                .then(|| HandoverFailure { switched: false, reason: "no such core, or not drained".to_owned() });
            // One that has the gate already is not given it again.
            if failure.is_none() && a.world.serving != to {
                a.world.serving = to;
                a.world.synchronous = false;
            }
            Ok(HandoverReport {
                failure,
                generation: Generation(2),
                suspension: Suspension::default(),
                probe_blocks: 1,
                carried_bytes: if a.world.dirty { 4096 } else { 0 },
                adopted_us: Some(1),
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
    fn commit(&mut self, _: &Build, pid: u32, _: Duration) -> Result<(), Fault> {
        let serves = |a: &Self| if a.world.serving == pid { Ok(()) } else { Err(Fault("it died".to_owned())) };
        // Whether the record can be written is tried before any core is dismissed.
        self.act(|a| serves(a))?;
        let stands_by = self.act(|a| {
            a.world.start(Version::New);
            Ok(())
        });
        if stands_by.is_ok() && !self.ended {
            self.dismiss_old();
        }
        // It is recorded or not: an error after it was done there is not.
        self.act(|a| serves(a))?;
        self.world.current = Version::New;
        self.dismiss_old();
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
    fn end_synchronous(&mut self) {
        if !self.ended {
            self.world.synchronous = false;
            // A core that does not know the write buffer puts nothing into it.
            let knows = self.world.adopts || self.world.cores.get(&self.world.serving) == Some(&Version::Old);
            self.world.dirty = self.world.buffer && knows;
        }
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

fn plan(handover: Handover) -> Plan {
    let limits = Limits {
        pause_budget: Duration::from_millis(100),
        soak: Duration::from_secs(1),
        flush: Duration::from_secs(30),
    };
    Plan { from: old_build(), from_pid: 10, handover, limits, rollback: false }
}

fn upgrade_by(handover: Handover, world: &mut World, misfortunes: Vec<Misfortune>) -> (Report, bool) {
    let mut actor = Actor::new(world, misfortunes);
    let report = run(&mut actor, &plan(handover), Report::new("v".to_owned(), 1, "1.0.0".to_owned()));
    let ended = actor.ended;
    (report, ended)
}

fn upgrade(world: &mut World, misfortunes: Vec<Misfortune>) -> (Report, bool) {
    upgrade_by(Handover::Flush, world, misfortunes)
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
    let report = resume(&mut actor, &left, &old_build(), Report::new("v".to_owned(), 1, "1.0.0".to_owned()));
    assert_eq!(report.outcome, Some(Outcome::Committed));
    world.check(Outcome::Committed);
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
    let report = resume(&mut actor, &left, &old_build(), Report::new("v".to_owned(), 1, "1.0.0".to_owned()));
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
