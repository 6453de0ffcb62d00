//! A world of processes for the machine to act on: every act may fail, half-done or not, cores may die at any time,
//! and the control module itself may end between any two acts.

mod examples;
mod properties;

use std::{collections::BTreeMap, time::Duration};

use everdisk_proto::{
    frame::{HandoverFailure, HandoverReport, Suspension},
    identity::{Build, Identity},
    ids::Generation,
    journal::{Entry, Event, JOURNAL_VERSION, Outcome},
};

use crate::{
    act::{Act, Fault, GivenBack},
    health::Observation,
    policy::{Buffer, Handover},
    report::Report,
    run::{Plan, run},
    step::{Limits, Step},
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
    fn runs(&mut self, pid: u32, build: &Build) -> bool {
        self.world.cores.get(&pid).is_some_and(|version| self.world.build(*version).program == build.program)
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
    let report = run(&mut actor, &plan(handover), Report::new("v".to_owned(), 1, "1.0.0".to_owned())).answer();
    (report, actor.ended)
}

fn upgrade(world: &mut World, misfortunes: Vec<Misfortune>) -> (Report, bool) {
    upgrade_by(Handover::Flush, world, misfortunes)
}
