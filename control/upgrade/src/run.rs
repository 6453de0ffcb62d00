//! Runs an upgrade: every step through one function, every failure through one unwinder.

use std::time::Duration;

use everdisk_proto::{frame::HandoverReport, identity::Build, journal::Event as Journalled};

use crate::{
    act::{Act, Fault},
    health::{INTERVAL, Watch},
    policy::{Buffer, Handover},
    report::{Report, StepTime},
    state::{Event, State},
    step::{Limits, Step, Undo},
    unfinished::Unfinished,
};

/// Pauses between the attempts at a hand-over whose drain fails, ms: one long flush or punched hole at a storage node
/// must not cost the upgrade.
const PAUSES_MS: [u64; 4] = [50, 100, 200, 400];

/// Before the hand-over nothing else is done for this long: starting a process and making records durable cost the machine
/// more than the hand-over does, and would add to the pause that applications see. What follows it cannot wait: until
/// the switch is on record, a control module that takes over would know less.
const SETTLE: Duration = Duration::from_millis(100);

/// Time limit for the new core to read its stores. After it, the stores themselves are checked: a storage node that hangs
/// must not hold the upgrade up.
const READ_LIMIT: Duration = Duration::from_secs(5);

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The core that serves.
    pub from: Build,
    /// Its process id.
    pub from_pid: u32,
    /// What happens to buffered data.
    pub handover: Handover,
    /// How long it may take.
    pub limits: Limits,
    /// It goes back to the build before the last committed upgrade.
    pub rollback: bool,
}

/// What a run gives: the report, and whether the journal has its end.
#[derive(Debug)]
pub struct Ended {
    /// The report. It has no outcome where the upgrade has to be taken up again.
    pub report: Report,
    /// Why the end could not be journalled. It is in no report that is kept: a later attempt may journal the end.
    pub unjournalled: Option<Fault>,
}

impl Ended {
    /// Whether the journal has its end.
    pub const fn is_journalled(&self) -> bool {
        self.report.outcome.is_some() && self.unjournalled.is_none()
    }

    /// The report for those who wait for it, with what is wrong at this moment.
    pub fn answer(&self) -> Report {
        let mut answer = self.report.clone();
        if let Some(fault) = &self.unjournalled {
            answer.add_reason(format!("the end could not be journalled: {fault}"));
        }
        answer
    }
}

/// Runs an upgrade to its end. Whatever happens, the gate is open on a core that serves afterwards, and the report
/// says on which and why. `report` is [`Report::new`].
pub fn run<A: Act>(act: &mut A, plan: &Plan, report: Report) -> Ended {
    let mut run = Run::new(act, plan.limits, State::Begun, report);
    (run.report.handover, run.report.handover_asked) = (plan.handover, plan.handover);
    run.report.rollback = plan.rollback;
    let begin = Journalled::Begin {
        from: plan.from.clone(),
        from_pid: plan.from_pid,
        soak_ms: u64::try_from(plan.limits.soak.as_millis()).unwrap_or(u64::MAX),
        rollback: plan.rollback,
    };
    let ended = match run.act.record(begin) {
        Ok(()) => run.prepare().and_then(|new| run.hand_over(&new).and_then(|watch| run.soak(&new, watch))),
        Err(fault) => Err(fault),
    };
    run.end(ended)
}

/// Takes up an upgrade that a control module left without an end: finishes it where the new core serves, and clears it
/// away where it does not. `current` is the recorded program: once that is the new one, the upgrade is past its point
/// of no return. `report` is what was kept of it, or a new one.
pub fn resume<A: Act>(act: &mut A, left: &Unfinished, current: &Build, report: Report) -> Ended {
    let mut run = Run::new(act, Limits { soak: left.soak, ..Limits::default() }, left.state, report);
    run.report.rollback = left.rollback;
    if left.to.as_ref() == Some(current) {
        run.report.to = Some(current.identity.version.clone());
        run.report.digest.clone_from(&current.digest);
        run.advance(Event::Recorded);
        return run.close();
    }
    // What follows is found out anew.
    (run.report.reason, run.report.failed_step) = (None, None);
    run.report.steps.retain(|step| step.step < Step::Soak);
    run.undo.push(Undo::Unstage);
    run.undo.push(Undo::Dismiss);
    // Whether it was flushing is not in the journal.
    run.undo.push(Undo::EndSynchronous);
    let ended = match (&left.to, left.to_pid) {
        (Some(build), Some(pid)) => {
            let new = New { build: build.clone(), pid };
            run.find(new).and_then(|(new, watch)| run.soak(&new, watch))
        }
        _ => Err(Fault("it was interrupted before the new core was ready".to_owned())),
    };
    run.end(ended)
}

#[cfg(test)]
std::thread_local! {
    /// What the machine has fired in which state: the model shows that it is the table.
    pub(crate) static FIRED: std::cell::RefCell<std::collections::HashSet<(State, Event)>> = std::cell::RefCell::default();
}

/// The new core.
#[derive(Clone)]
struct New {
    build: Build,
    pid: u32,
}

struct Run<'a, A> {
    act: &'a mut A,
    limits: Limits,
    state: State,
    report: Report,
    /// Undos of the steps that were begun.
    undo: Vec<Undo>,
    /// The gate has been with the new core.
    switched: bool,
    new: Option<New>,
}

impl<'a, A: Act> Run<'a, A> {
    fn new(act: &'a mut A, limits: Limits, state: State, report: Report) -> Self {
        Self { act, limits, state, report, undo: Vec::new(), switched: state == State::Soaking, new: None }
    }

    /// Runs one step: announces it, notes its undo, gives it its limit, times it. An error names the step.
    fn step<T>(&mut self, step: Step, work: impl FnOnce(&mut A, Duration) -> Result<T, Fault>) -> Result<T, Fault> {
        let rule = step.rule();
        let limit = rule.limit.of(&self.limits);
        self.act.begins(step);
        self.undo.push(rule.undo);
        let began = self.act.now_us();
        let result = work(self.act, limit);
        let took = self.act.now_us().saturating_sub(began);
        self.report.steps.push(StepTime::new(step, took));
        if result.is_err() {
            self.report.failed_step = Some(step);
        }
        result
    }

    /// The only place where the state changes.
    fn advance(&mut self, event: Event) {
        #[cfg(test)]
        FIRED.with_borrow_mut(|fired| fired.insert((self.state, event)));
        self.state = self.state.after(event).expect("the table knows every event that is fired in a state");
    }

    /// Everything before the suspension.
    fn prepare(&mut self) -> Result<New, Fault> {
        self.step(Step::Stage, |act, limit| act.stage(limit))?;
        self.advance(Event::Done);

        let (build, buffer) = self.verify()?;
        self.act.record(Journalled::Staged { to: build.clone() })?;
        self.advance(Event::Done);

        let new = self.stand_by(build)?;
        self.advance(Event::Done);

        let way = self.flush(&new.build, buffer.as_ref())?;
        self.advance(way);
        Ok(new)
    }

    /// The new core fits, and by `carry` it knows the write buffer.
    fn verify(&mut self) -> Result<(Build, Option<Buffer>), Fault> {
        let mut found = None;
        let handover = self.report.handover;
        let buffer = self.step(Step::Verify, |act, limit| {
            let build = found.insert(act.verify(limit)?);
            let buffer = act.buffer()?;
            match buffer.as_ref().and_then(|buffer| buffer.obstacle(&build.identity)) {
                Some(why) if handover == Handover::Carry => {
                    Err(Fault(format!("{why}, so it cannot be carried over: use --handover flush")))
                }
                _ => Ok(buffer),
            }
        });
        self.report.to = found.as_ref().map(|build| build.identity.version.clone());
        self.report.digest = found.as_ref().and_then(|build| build.digest.clone());
        let buffer = buffer?;
        self.report.buffered_bytes = buffer.as_ref().map_or(0, |buffer| buffer.bytes);
        Ok((found.expect("the step succeeded, so it has found the build"), buffer))
    }

    /// Starts the new core and has it read its stores. Where it cannot and the old core cannot either, it is no worse.
    fn stand_by(&mut self, build: Build) -> Result<New, Fault> {
        let mut started = None;
        let mut unread = None;
        let verified = self.step(Step::Standby, |act, limit| {
            let began = act.now_us();
            let pid = act.start(limit)?;
            started = Some(pid);
            act.record(Journalled::Standby { to_pid: pid })?;
            let took = Duration::from_micros(act.now_us().saturating_sub(began));
            let read = act.read_stores(pid, limit.saturating_sub(took).min(READ_LIMIT));
            read.or_else(|fault| match act.ailing() {
                Some(why) => {
                    unread = Some(format!("{fault}; the upgrade goes on in spite of this, because {why}"));
                    Ok(0)
                }
                None => Err(fault),
            })
        });
        self.report.notes.extend(unread);
        // Known from its start on: should every old core die now, it is this one that serves.
        self.new = started.map(|pid| New { build, pid });
        self.report.verified_blocks = verified?;
        Ok(self.new.clone().expect("the step succeeded, so it has started the core"))
    }

    /// Sends what is buffered to the storage nodes, as far as the policy wants it and they take it. What they do not take
    /// goes over as it is where both cores know the write buffer; then writes are buffered again at once.
    fn flush(&mut self, to: &Build, buffer: Option<&Buffer>) -> Result<Event, Fault> {
        if self.report.handover == Handover::Carry {
            return Ok(Event::Carried);
        }
        let flushed = self.step(Step::Flush, |act, limit| {
            if buffer.is_some() {
                act.synchronous()?;
            }
            act.flush(limit)
        });
        self.report.flush_ms = self.report.steps.last().map(|s| s.ms);
        let Err(fault) = flushed else { return Ok(Event::Done) };
        if let Some(obstacle) = buffer.and_then(|buffer| buffer.obstacle(&to.identity)) {
            return Err(Fault(format!("{fault}; and {obstacle}, so it cannot be carried over")));
        }
        self.act.end_synchronous();
        self.report.failed_step = None;
        self.report.handover = Handover::Carry;
        let instead =
            if buffer.is_some() { "what is buffered is carried over" } else { "the hand-over does without it" };
        self.report.notes.push(format!("{fault}; {instead}"));
        Ok(Event::Carried)
    }

    /// Whether the operator stopped the upgrade; else how many requests the new core has ended with EIO.
    fn look(&mut self, new: &New) -> Result<Option<u64>, Fault> {
        match self.act.observe(new.pid) {
            Ok(seen) if seen.rollback_wanted => Err(Fault("a rollback was asked for".to_owned())),
            Ok(seen) => Ok(seen.io_errors),
            Err(_) => Ok(None),
        }
    }

    /// Commands the hand-over, again where the old core did not drain and serves on.
    fn attempt(&mut self, new: &New) -> Result<HandoverReport, Fault> {
        let steps = self.report.steps.len();
        let mut pauses = PAUSES_MS.into_iter();
        loop {
            self.report.attempts += 1;
            self.act.follow(new.pid);
            let report = self.act.hand_over(new.pid, self.limits.pause_budget)?;
            self.report.steps.truncate(steps);
            self.report.enter(&report);
            let Some(pause) = report.failure.as_ref().filter(|failure| !failure.switched).and_then(|_| pauses.next())
            else {
                return Ok(report);
            };
            self.act.sleep(Duration::from_millis(pause));
            self.look(new)?;
        }
    }

    /// Suspend, switch, probe and resume. The journal has it before it is commanded.
    fn hand_over(&mut self, new: &New) -> Result<Watch, Fault> {
        let before = self.look(new)?;
        self.act.record(Journalled::Handover)?;
        self.advance(Event::Done);
        for step in [Step::Suspend, Step::Switch, Step::Probe, Step::Resume] {
            self.act.begins(step);
            self.undo.push(step.rule().undo);
        }
        self.report.failed_step = Some(Step::Suspend);
        self.act.sleep(SETTLE);
        let report = self.attempt(new)?;
        if let Some(failure) = report.failure {
            self.switched = failure.switched;
            self.report.failed_step = Some(if failure.switched { Step::Probe } else { Step::Suspend });
            return Err(Fault(failure.reason));
        }
        self.report.failed_step = None;
        self.switched = true;
        self.advance(Event::NewServes);
        self.act.keep(&self.report);
        self.act.record(Journalled::Switched)?;
        self.buffer_again();
        Ok(Watch::new(new.pid, before))
    }

    /// After a crash of the control module: asks which core serves. Where the new core has died, that is the standby which the commit had
    /// started from the same program.
    fn find(&mut self, mut new: New) -> Result<(New, Watch), Fault> {
        self.new = Some(new.clone());
        self.report.to = Some(new.build.identity.version.clone());
        self.report.digest.clone_from(&new.build.digest);
        let mut blind = Watch::new(new.pid, None);
        loop {
            let look = self.act.observe(new.pid).ok();
            match look.and_then(|seen| seen.serving) {
                Some(serving) if serving == new.pid || self.act.runs(serving, &new.build) => {
                    new.pid = serving;
                    break;
                }
                Some(_) => {
                    return Err(Fault("it was interrupted, and another core was found serving".to_owned()));
                }
                None => blind.see(look).map_err(Fault)?,
            }
            self.act.sleep(INTERVAL);
        }
        self.new = Some(new.clone());
        self.switched = true;
        self.advance(Event::NewServes);
        self.act.record(Journalled::Switched)?;
        self.buffer_again();
        let watch = Watch::new(new.pid, None);
        Ok((new, watch))
    }

    /// A hand-over ends the synchronous mode by itself, but the new core may have the gate by the death of the old one.
    fn buffer_again(&mut self) {
        if self.undo.contains(&Undo::EndSynchronous) {
            self.act.end_synchronous();
        }
    }

    fn soak(&mut self, new: &New, mut watch: Watch) -> Result<(), Fault> {
        self.step(Step::Soak, |act, soak| {
            let until = act.now_us().saturating_add(u64::try_from(soak.as_micros()).unwrap_or(u64::MAX));
            loop {
                let look = act.observe(new.pid).ok();
                watch.see(look).map_err(Fault)?;
                let left = until.saturating_sub(act.now_us());
                if left == 0 && look.is_some_and(|seen| seen.serving.is_some()) {
                    return Ok(());
                }
                act.sleep(INTERVAL.min(Duration::from_micros(left.max(1000))));
            }
        })?;
        self.advance(Event::Done);
        Ok(())
    }

    /// Commits or unwinds, and closes.
    fn end(mut self, ended: Result<(), Fault>) -> Ended {
        if let Err(fault) = ended.and_then(|()| self.commit()) {
            self.unwind(fault);
        }
        self.close()
    }

    /// Journals the end and hands the report out.
    fn close(mut self) -> Ended {
        self.report.outcome = self.state.outcome();
        let unjournalled = self
            .report
            .outcome
            .and_then(|outcome| self.act.record(Journalled::End { outcome, reason: self.report.reason.clone() }).err());
        Ended { report: self.report, unjournalled }
    }

    /// The new core serves for good, once it is recorded as the current one. An error: it is not recorded.
    fn commit(&mut self) -> Result<(), Fault> {
        let new = self.new.clone().expect("only a core that is known is committed");
        self.step(Step::Commit, |act, limit| act.commit(&new.build, new.pid, limit))?;
        self.advance(Event::Recorded);
        Ok(())
    }

    /// No old core can take the gate: the core that serves goes on. Where it cannot be recorded as the current one, the
    /// upgrade stays without an end and is taken up again; where it is not known, nothing can be recorded of it.
    fn go_on(&mut self, why: &Fault) {
        self.buffer_again();
        self.report.add_reason(format!("and no old core could take the gate back: {why}; the new core goes on"));
        if self.new.is_none() {
            self.report.add_reason("the core that serves is not known".to_owned());
            return self.advance(Event::StrangerServes);
        }
        self.advance(Event::NewServes);
        if let Err(fault) = self.commit() {
            self.report.add_reason(fault.0);
        }
    }

    /// Undoes what was begun, last first. The gate is taken care of before anything else.
    fn unwind(&mut self, fault: Fault) {
        self.report.add_reason(fault.0);
        self.advance(Event::Failed);
        if self.state == State::HandingBack {
            match self.act.hand_back() {
                Ok(given) if given.had_switched || self.switched => self.advance(Event::OldServesAgain),
                Ok(_) => self.advance(Event::OldServes),
                Err(fault) => return self.go_on(&fault),
            }
        }
        while let Some(undo) = self.undo.pop() {
            match undo {
                Undo::EndSynchronous => self.act.end_synchronous(),
                Undo::Dismiss => self.act.dismiss(),
                Undo::Unstage => self.act.unstage(),
                Undo::Nothing | Undo::Reopen | Undo::HandBack | Undo::Impossible => {}
            }
        }
    }
}
