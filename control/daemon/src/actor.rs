//! The acts of an upgrade, with real processes. The program of a core tells whether it is new or old: until the
//! commit the recorded current program is the old one.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use everdisk_proto::{
    frame::{HandoverFailure, HandoverReport, InterfaceStatus},
    identity::{Build, Component, Identity},
    journal::{Entry as JournalEntry, Event, JOURNAL_VERSION},
    node::NodeState,
};
use everdisk_sys::link::LinkError;
use everdisk_telemetry::event;
use everdisk_upgrade::{
    act::{Act, Fault, GivenBack},
    health::Observation,
    policy::Buffer,
    report::Report,
    step::Step,
};
use tracing::{debug, info, warn};

use crate::{
    durable,
    error::{Doing, Error, Result},
    flush,
    origin::Source,
    programs,
    progress::{Progress, milliseconds},
    record::{Attachment, KnownCore},
    stage,
    start::{self, ARMED_WITHIN, Unserved},
    volume::Volume,
};

/// Blocks a new core reads before it is given the gate.
const VERIFY_BLOCKS: u32 = 64;
/// Fewest blocks the new core has to read. The old core is held to the same number: see [`FEW_WITHIN`].
const FEW_BLOCKS: u32 = 8;
/// If the old core cannot read [`FEW_BLOCKS`] within this time, the storage node is at fault, and the new core is not refused for it.
const FEW_WITHIN: Duration = Duration::from_secs(2);
/// Time limit for a core to follow the write buffer before the hand-over. What it has not read by then it reads in the pause.
const FOLLOW_WITHIN: Duration = Duration::from_secs(2);
/// The interface comes back, or a core takes the gate after another's death, within this time.
const SETTLED_WITHIN: Duration = Duration::from_secs(15);
/// Giving the gate back may take longer than the hand-over: what counts is that it succeeds.
const WAY_BACK_BUDGET: Duration = Duration::from_secs(1);
/// The standby of the new version is waited for at the commit, so that a crash right after it finds one.
const STANDBY_WITHIN: Duration = Duration::from_secs(5);
/// Interval at which waits poll.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Acts on one volume for one upgrade.
pub struct Actor<'a> {
    volume: &'a Arc<Volume>,
    progress: &'a Progress,
    upgrade: u64,
    /// None: it is resumed, and past its stage.
    source: Option<PathBuf>,
    staged: Option<PathBuf>,
    /// Of what is staged.
    digest: Option<String>,
    to: Option<Build>,
    /// Recording the new program failed, and it is not known whether it is on record.
    record_unknown: bool,
    /// It goes back to the build before the last committed upgrade, and there is none before that one.
    pub rollback: bool,
    /// The operator wants the old core back, and it is taken up for nothing else.
    pub called_off: bool,
    /// How long a core that serves, or an interface that answers, is waited for.
    settled_within: Duration,
    began: Instant,
}

impl<'a> Actor<'a> {
    /// For the upgrade with this number to the program `source`.
    pub fn new(volume: &'a Arc<Volume>, upgrade: u64, source: &Path, progress: &'a Progress) -> Self {
        Self { source: Some(source.to_owned()), ..Self::resuming(volume, upgrade, progress) }
    }

    /// For the upgrade with this number, which was begun before.
    pub fn resuming(volume: &'a Arc<Volume>, upgrade: u64, progress: &'a Progress) -> Self {
        Self {
            volume,
            progress,
            upgrade,
            source: None,
            staged: None,
            digest: None,
            to: None,
            record_unknown: false,
            rollback: false,
            called_off: false,
            settled_within: SETTLED_WITHIN,
            began: Instant::now(),
        }
    }

    fn source(&self) -> &Path {
        self.source.as_ref().expect("an upgrade that is resumed is past its stage")
    }

    /// Whether a core was started from another program than the recorded one, or its start is not on record.
    fn is_new(&self, pid: u32, current: &Build, attachment: &Attachment) -> bool {
        attachment.program_of(pid) != Some(&current.program)
    }

    /// Waits until the interface answers and `wanted` holds.
    fn wait_for(&self, wanted: impl Fn(&InterfaceStatus) -> bool) -> Result<InterfaceStatus> {
        let deadline = Instant::now() + self.settled_within;
        loop {
            let attachment = self.volume.attached()?;
            if !attachment.interface_alive() && attachment.live_cores().next().is_none() {
                return Err(Error::Failed("core and interface are gone".to_owned()));
            }
            match self.volume.interface().status() {
                Ok(status) if wanted(&status) => return Ok(status),
                Err(e) if Instant::now() > deadline => return Err(e),
                Ok(_) if Instant::now() > deadline => {
                    return Err(Error::Failed("no core serves".to_owned()));
                }
                _ => thread::sleep(POLL_INTERVAL),
            }
        }
    }

    /// Whether this core has the gate.
    fn serves(&self, pid: u32) -> bool {
        self.volume.interface().status().is_ok_and(|status| status.serving == Some(pid))
    }

    fn must_serve(&self, pid: u32) -> Result<(), Fault> {
        match self.wait_for(|status| status.serving.is_some()).map(|status| status.serving) {
            Ok(Some(serving)) if serving == pid => Ok(()),
            Ok(_) => Err(Fault(format!("the new core (process {pid}) no longer serves: it died or lost the gate"))),
            Err(e) => Err(Fault(format!("it is not known whether the new core (process {pid}) serves: {e}"))),
        }
    }

    /// The interface did not answer a hand-over: the segment says which core serves.
    fn settle(&self, to: u32, why: &Error) -> Result<HandoverReport> {
        let status = self.wait_for(|status| status.serving.is_some())?;
        let failure = (status.serving != Some(to))
            .then(|| HandoverFailure { switched: false, reason: format!("the hand-over was not answered: {why}") });
        Ok(taken(&status, failure))
    }

    /// Gives the gate to an old core: one that is armed, or a new process.
    fn give_back(&self, serving: u32, current: &Build) -> Result<()> {
        let status = self.wait_for(|_| true)?;
        let attachment = self.volume.attached()?;
        let armed = |pid: u32| status.cores.iter().any(|core| core.pid == pid && core.armed);
        let old = attachment.live_cores().find(|core| core.program == current.program && armed(core.process.pid));
        let old = match old {
            Some(core) => core.process.pid,
            None => {
                let child = start::core(self.volume, current)?;
                start::core_armed(self.volume, &child, ARMED_WITHIN)?;
                child.id.pid
            }
        };
        follow(self.volume, old);
        match self.volume.interface().hand_over(old, WAY_BACK_BUDGET) {
            Ok(HandoverReport { failure: None, .. }) => return Ok(()),
            Ok(HandoverReport { failure: Some(failure), .. }) => {
                warn!(volume = %self.volume.name, "the new core does not let go: {}", failure.reason);
            }
            Err(e) => {
                warn!(volume = %self.volume.name, "the interface did not answer the request to hand the gate back: {e}");
            }
        }
        // By now another core of the new program may have been given the gate.
        let is_old = |pid: u32| self.volume.attachment().is_some_and(|a| a.program_of(pid) == Some(&current.program));
        // Without an answer it is taken to be the one that had it.
        let now = self.volume.interface().status().ok().and_then(|status| status.serving).unwrap_or(serving);
        if is_old(now) {
            return Ok(());
        }
        // The crash path: the interface gives the gate to one that is armed, so that has to be an old one.
        self.end_cores(Unserved::Goes, None, |core| core.program != current.program && core.process.pid != now);
        if let Some(known) = self.volume.attached()?.cores.iter().find(|core| core.process.pid == now) {
            known.process.end(Duration::ZERO);
        }
        self.wait_for(|status| status.serving.is_some_and(is_old)).map(|_| ())
    }

    /// A core of the program `to` is armed beside the one with this process id: one that is there, or a new one.
    fn stand_by(&self, to: &Build, pid: u32, limit: Duration) -> Result<()> {
        let (status, attachment) = (self.volume.interface().status()?, self.volume.attached()?);
        let armed = |pid: u32| status.cores.iter().any(|core| core.pid == pid && core.armed);
        let of_new = |core: &&KnownCore| core.program == to.program && core.process.pid != pid;
        if attachment.live_cores().filter(of_new).any(|core| armed(core.process.pid)) {
            return Ok(());
        }
        let child = start::core(self.volume, to)?;
        start::core_armed(self.volume, &child, limit)
    }

    fn end_cores(&self, unserved: Unserved, until: Option<Instant>, which: impl Fn(&KnownCore) -> bool) {
        let Some(attachment) = self.volume.attachment() else { return };
        let in_time = |_: &&KnownCore| until.is_none_or(|until| Instant::now() < until);
        for core in attachment.live_cores().filter(|core| which(core)).take_while(in_time) {
            start::end_core(self.volume, core, unserved);
        }
    }
}

/// A report of a hand-over whose own report was lost.
fn taken(status: &InterfaceStatus, failure: Option<HandoverFailure>) -> HandoverReport {
    HandoverReport {
        failure,
        generation: status.generation,
        suspension: status.last_suspension,
        probe_blocks: 0,
        carried_bytes: 0,
        adopted_us: None,
    }
}

/// The write buffer, and the core that has it: the one that serves, else one of the program `current`.
pub fn buffer(status: &InterfaceStatus, current: &Identity) -> Option<Buffer> {
    let serving = status.cores.iter().find(|core| Some(core.pid) == status.serving);
    let holder = serving.map_or(current, |core| &core.identity).clone();
    status.buffer.map(|buffer| Buffer { version: buffer.version, bytes: buffer.buffered_bytes, holder })
}

/// A hand-over to this core is near.
fn follow(volume: &Volume, pid: u32) {
    match volume.with_core(pid, |core| core.follow(FOLLOW_WITHIN)) {
        Ok(bytes) => debug!(volume = %volume.name, pid, bytes, "the core follows"),
        Err(e) => debug!(volume = %volume.name, pid, "the core does not follow: {e}"),
    }
}

impl Act for Actor<'_> {
    fn now_us(&mut self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).expect("an upgrade takes less than 500 000 years")
    }

    fn sleep(&mut self, time: Duration) {
        thread::sleep(time);
    }

    fn begins(&mut self, step: Step) {
        info!(event = event::UPGRADE_STEP, volume = %self.volume.name, upgrade = self.upgrade, %step, "a step begins");
        self.progress.step(step.name());
    }

    fn record(&mut self, event: Event) -> Result<(), Fault> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("Linux sets no clock to before 1970");
        let at_ms = milliseconds(now);
        let record = JournalEntry { v: JOURNAL_VERSION, upgrade: self.upgrade, at_ms, event };
        let line = serde_json::to_string(&record).map_err(|e| Fault(e.to_string()))?;
        let written = durable::append_line(&self.volume.paths.journal(), &line);
        written.doing(|| "write the upgrade journal".to_owned())?;
        Ok(())
    }

    fn stage(&mut self, limit: Duration) -> Result<(), Fault> {
        let program = stage::next_program(self.volume, Component::Core)?;
        self.staged = Some(program.clone());
        let mut source = Source::open_trusted(self.source())?;
        self.digest = Some(programs::copy(&mut source, &program, limit)?);
        Ok(())
    }

    fn verify(&mut self, limit: Duration) -> Result<Build, Fault> {
        let program = self.staged.clone().expect("a program is staged before it is verified");
        let identity = programs::identify(Component::Core, &program, self.source(), limit)?;
        // The segment outlives every program: it may be older than the interface that keeps it.
        programs::serves(&identity, stage::segment_abi(self.volume, &self.wait_for(|_| true)?)?)?;
        let build = Build { program, identity, digest: self.digest.clone() };
        self.to = Some(build.clone());
        Ok(build)
    }

    fn buffer(&mut self) -> Result<Option<Buffer>, Fault> {
        let current = self.volume.current()?;
        let status = self.wait_for(|status| status.serving.is_some())?;
        Ok(buffer(&status, &current.identity))
    }

    fn start(&mut self, limit: Duration) -> Result<u32, Fault> {
        let build = self.to.clone().expect("a program is verified before it is started");
        let named = |e: Error| Fault(format!("core {} cannot serve this volume: {e}", build.identity.version));
        let child = start::core(self.volume, &build).map_err(named)?;
        start::core_armed(self.volume, &child, limit).map_err(named)?;
        Ok(child.id.pid)
    }

    fn read_stores(&mut self, pid: u32, limit: Duration) -> Result<u32, Fault> {
        let began = Instant::now();
        let read = |blocks, limit| self.volume.with_core(pid, |core| core.verify(blocks, limit));
        let few = read(FEW_BLOCKS, limit);
        let read = few.and_then(|few| match read(VERIFY_BLOCKS, limit.saturating_sub(began.elapsed())) {
            Err(Error::Peer { source: LinkError::Deadline(_), .. }) => Ok(few),
            read => read,
        });
        read.map_err(|e| Fault(format!("the new core cannot read the volume: {e}")))
    }

    fn ailing(&mut self) -> Option<String> {
        let serving = self.volume.interface().status().ok()?.serving?;
        // A core that does not answer names no node: whether it reads is asked next.
        let nodes = self.volume.with_core(serving, |core| core.nodes()).unwrap_or_default();
        if let Some(node) = nodes.iter().find(|node| node.state != NodeState::InStep) {
            let error = node.error.as_deref().map_or(String::new(), |error| format!(" ({error})"));
            return Some(format!("storage node {} is {}{error}", node.url, node.state));
        }
        let read = self.volume.with_core(serving, |core| core.verify(FEW_BLOCKS, FEW_WITHIN));
        read.err().map(|e| format!("the core that serves cannot read it either: {e}"))
    }

    fn synchronous(&mut self) -> Result<(), Fault> {
        Ok(self.volume.interface().synchronous(true)?)
    }

    fn flush(&mut self, limit: Duration) -> Result<(), Fault> {
        let unwanted = || self.volume.operations.rollback_wanted();
        flush::send(self.volume, flush::Patience::Whole(limit), self.progress, &unwanted)
            .map_err(|e| Fault(format!("what was acknowledged could not be sent to the storage nodes: {e}")))
    }

    fn follow(&mut self, pid: u32) {
        follow(self.volume, pid);
    }

    fn hand_over(&mut self, to: u32, budget: Duration) -> Result<HandoverReport, Fault> {
        let status = self.wait_for(|status| status.serving.is_some())?;
        if status.serving == Some(to) {
            return Ok(taken(&status, None));
        }
        match self.volume.interface().hand_over(to, budget) {
            Ok(report) => Ok(report),
            Err(e) => Ok(self.settle(to, &e)?),
        }
    }

    fn observe(&mut self, new: u32) -> Result<Observation, Fault> {
        let status = self.volume.interface().status()?;
        Ok(Observation {
            serving: status.serving,
            io_errors: status.cores.iter().find(|core| core.pid == new).map(|core| core.io_errors),
            // One that goes back itself is what is wanted.
            rollback_wanted: !self.rollback && (self.called_off || self.volume.operations.rollback_wanted()),
        })
    }

    fn runs(&mut self, pid: u32, build: &Build) -> bool {
        self.volume.attachment().is_some_and(|attachment| attachment.program_of(pid) == Some(&build.program))
    }

    fn keep(&mut self, report: &Report) {
        if let Err(e) = self.volume.update(|record| record.unfinished = Some(report.clone())) {
            warn!(volume = %self.volume.name, "the figures of the upgrade are not kept: {e}");
        }
    }

    fn commit(&mut self, to: &Build, pid: u32, limit: Duration) -> Result<(), Fault> {
        let until = Instant::now() + limit;
        self.must_serve(pid)?;
        let unrecorded = |e: Error| Fault(format!("the new program cannot be recorded as the current one: {e}"));
        // Known before an old core is dismissed: to go back then takes a new process, which has to be recorded as well.
        self.volume.files.rewrite_record().map_err(unrecorded)?;
        let old = |core: &KnownCore| core.process.pid != pid && core.program != to.program;
        // Those that time is too short for, the supervisor ends.
        let dismiss = || self.end_cores(Unserved::Stays, Some(until), |core| old(core) && self.serves(pid));
        let stands_by = self.stand_by(to, pid, STANDBY_WITHIN.min(limit));
        match &stands_by {
            Ok(()) => dismiss(),
            Err(e) => warn!(volume = %self.volume.name, "no standby of the new version yet: {e}"),
        }
        self.must_serve(pid)?;
        let recorded = self.volume.update(|record| {
            if record.current.as_ref() != Some(to) {
                record.previous = record.current.replace(to.clone()).filter(|_| !self.rollback);
            }
        });
        if let Err(e) = recorded {
            // The file may name the new program in spite of the error: then the program's copy has to stay.
            self.record_unknown = self.volume.files.rewrite_record().is_err();
            return Err(unrecorded(e));
        }
        if stands_by.is_err() {
            dismiss();
        }
        stage::prune(self.volume);
        Ok(())
    }

    fn hand_back(&mut self) -> Result<GivenBack, Fault> {
        let current = self.volume.current()?;
        let attachment = self.volume.attached()?;
        let is_new = |pid: u32| self.is_new(pid, &current, &attachment);
        let status = match self.wait_for(|status| status.serving.is_some()) {
            Ok(status) => status,
            // The interface alone knows whether it is the new core that serves.
            Err(e @ Error::Peer { .. }) if attachment.live_cores().any(|core| is_new(core.process.pid)) => {
                return Err(e.into());
            }
            // When no core serves, the supervisor starts an old core. Without the interface and a new core there is nothing to take.
            Err(_) => return Ok(GivenBack { had_switched: false }),
        };
        let Some(serving) = status.serving.filter(|pid| is_new(*pid)) else {
            return Ok(GivenBack { had_switched: false });
        };
        self.give_back(serving, &current)?;
        Ok(GivenBack { had_switched: true })
    }

    fn end_synchronous(&mut self) {
        let through = |status: &InterfaceStatus| status.buffer.is_some_and(|buffer| buffer.synchronous);
        let done = match self.wait_for(|_| true) {
            Ok(status) if through(&status) => self.volume.interface().synchronous(false),
            other => other.map(|_| ()),
        };
        if let Err(e) = done {
            // The supervisor does it when this upgrade has ended.
            warn!(volume = %self.volume.name, "writes may still go through to the storage nodes: {e}");
        }
    }

    fn dismiss(&mut self) {
        let Ok(current) = self.volume.current() else { return };
        self.end_cores(Unserved::Goes, None, |core| core.program != current.program);
    }

    fn unstage(&mut self) {
        if self.record_unknown {
            return;
        }
        stage::prune(self.volume);
    }
}

#[cfg(test)]
mod tests;
