//! The acts of an upgrade, with real processes. Which core is new and which is old is told by its program: until the
//! commit the recorded current program is the old one.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

use everdisk_proto::{
    frame::{HandoverFailure, HandoverReport, InterfaceStatus},
    journal::{CoreBuild, Event, JOURNAL_VERSION, Record as JournalRecord},
};
use everdisk_telemetry::event;
use everdisk_upgrade::{
    act::{Act, Fault, GivenBack},
    health::Observation,
    report::Report,
    step::Step,
};
use tracing::{info, warn};

use crate::{
    detach::flush_within,
    durable,
    error::{Doing, Error, Result},
    programs,
    progress::Progress,
    record::{Attachment, KnownCore},
    start::{self, ARMED_WITHIN, Unserved},
    volume::Volume,
};

/// Blocks a new core reads before it is given the gate.
const VERIFY_BLOCKS: u32 = 64;
/// The interface comes back, or a core takes the gate after another's death, within this time.
const SETTLED_WITHIN: Duration = Duration::from_secs(15);
/// The way back may take longer than the way there: what counts is that there is one.
const WAY_BACK_BUDGET: Duration = Duration::from_secs(1);
/// The standby of the new version is waited for at the commit, so that a crash right after it finds one.
const STANDBY_WITHIN: Duration = Duration::from_secs(5);
/// Waits look this often.
const LOOK: Duration = Duration::from_millis(10);

/// Acts on one volume for one upgrade.
pub struct Actor<'a> {
    volume: &'a Arc<Volume>,
    progress: &'a Progress,
    upgrade: u64,
    source: PathBuf,
    staged: Option<PathBuf>,
    to: Option<CoreBuild>,
    /// The new program could not be recorded, and perhaps it was.
    record_unknown: bool,
    began: Instant,
}

impl<'a> Actor<'a> {
    /// For the upgrade with this number to the program `source`.
    pub fn new(volume: &'a Arc<Volume>, upgrade: u64, source: &Path, progress: &'a Progress) -> Self {
        Self {
            volume,
            progress,
            upgrade,
            source: source.to_owned(),
            staged: None,
            to: None,
            record_unknown: false,
            began: Instant::now(),
        }
    }

    /// Whether a core was started from another program than the recorded one, or by nobody we remember.
    fn is_new(&self, pid: u32, current: &CoreBuild, attachment: &Attachment) -> bool {
        attachment.program_of(pid) != Some(&current.program)
    }

    /// Waits until the interface answers and `wanted` holds.
    fn wait_for(&self, wanted: impl Fn(&InterfaceStatus) -> bool) -> Result<InterfaceStatus> {
        let deadline = Instant::now() + SETTLED_WITHIN;
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
                _ => thread::sleep(LOOK),
            }
        }
    }

    /// The interface did not answer a hand-over: the segment says who serves.
    fn settle(&self, to: u32, why: &Error) -> Result<HandoverReport> {
        let status = self.wait_for(|status| status.serving.is_some())?;
        let failure = (status.serving != Some(to))
            .then(|| HandoverFailure { switched: false, reason: format!("the hand-over was not answered: {why}") });
        Ok(taken(&status, failure))
    }

    /// Gives the gate to an old core: one that is armed, or a new process.
    fn give_back(&self, serving: u32, current: &CoreBuild) -> Result<()> {
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
        match self.volume.interface().hand_over(old, WAY_BACK_BUDGET) {
            Ok(HandoverReport { failure: None, .. }) => return Ok(()),
            Ok(HandoverReport { failure: Some(failure), .. }) => {
                warn!(volume = %self.volume.name, "the new core does not let go: {}", failure.reason);
            }
            Err(e) => warn!(volume = %self.volume.name, "the way back was not answered: {e}"),
        }
        if self.volume.interface().status().is_ok_and(|status| status.serving.is_some_and(|pid| pid != serving)) {
            return Ok(());
        }
        // The crash path: the interface gives the gate to the armed one.
        if let Some(known) = attachment.cores.iter().find(|core| core.process.pid == serving) {
            known.process.end(Duration::ZERO);
        }
        self.wait_for(|status| status.serving.is_some_and(|pid| pid != serving)).map(|_| ())
    }

    fn end_cores(&self, unserved: Unserved, until: Option<Instant>, which: impl Fn(&KnownCore) -> bool) {
        let Some(attachment) = self.volume.attachment() else { return };
        let in_time = |_: &&KnownCore| until.is_none_or(|until| Instant::now() < until);
        for core in attachment.live_cores().filter(|core| which(core)).take_while(in_time) {
            start::end_core(self.volume, core, unserved);
        }
    }
}

/// A report of a hand-over that nobody reported.
fn taken(status: &InterfaceStatus, failure: Option<HandoverFailure>) -> HandoverReport {
    HandoverReport { failure, generation: status.generation, suspension: status.last_suspension, probe_blocks: 0 }
}

impl Act for Actor<'_> {
    fn now_us(&mut self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn sleep(&mut self, time: Duration) {
        thread::sleep(time);
    }

    fn begins(&mut self, step: Step) {
        info!(event = event::UPGRADE_STEP, volume = %self.volume.name, upgrade = self.upgrade, %step);
        self.progress.step(step.name());
    }

    fn record(&mut self, event: Event) -> Result<(), Fault> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let at_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let record = JournalRecord { v: JOURNAL_VERSION, upgrade: self.upgrade, at_ms, event };
        let line = serde_json::to_string(&record).map_err(|e| Fault(e.to_string()))?;
        let written = durable::append_line(&self.volume.paths.journal(), &line);
        Ok(written.doing(|| "write the upgrade journal".to_owned())?)
    }

    fn stage(&mut self, limit: Duration) -> Result<(), Fault> {
        let program = start::next_program(self.volume)?;
        self.staged = Some(program.clone());
        Ok(programs::copy(&self.source, &program, limit)?)
    }

    fn verify(&mut self, limit: Duration) -> Result<CoreBuild, Fault> {
        let program = self.staged.clone().ok_or_else(|| Fault("nothing is staged".to_owned()))?;
        let identity = programs::identify(&program, &self.source, limit)?;
        let build = CoreBuild { program, identity };
        self.to = Some(build.clone());
        Ok(build)
    }

    fn start(&mut self, limit: Duration) -> Result<u32, Fault> {
        let build = self.to.clone().ok_or_else(|| Fault("nothing was verified".to_owned()))?;
        let named = |e: Error| Fault(format!("core {} cannot serve this volume: {e}", build.identity.version));
        let child = start::core(self.volume, &build).map_err(named)?;
        start::core_armed(self.volume, &child, limit).map_err(named)?;
        Ok(child.id.pid)
    }

    fn read_stores(&mut self, pid: u32, limit: Duration) -> Result<u32, Fault> {
        let read = self.volume.with_core(pid, |core| core.verify(VERIFY_BLOCKS, limit));
        read.map_err(|e| Fault(format!("the new core cannot read the volume: {e}")))
    }

    fn flush(&mut self, limit: Duration) -> Result<(), Fault> {
        Ok(flush_within(self.volume, limit)?)
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
            rollback_wanted: self.volume.rollback_wanted.load(Ordering::Relaxed),
        })
    }

    fn keep(&mut self, report: &Report) {
        if let Err(e) = self.volume.update(|record| record.unfinished = Some(report.clone())) {
            warn!(volume = %self.volume.name, "the figures of the upgrade are not kept: {e}");
        }
    }

    fn commit(&mut self, to: &CoreBuild, pid: u32, limit: Duration) -> Result<(), Fault> {
        let until = Instant::now() + limit;
        let serving = self.wait_for(|status| status.serving.is_some()).ok().and_then(|status| status.serving);
        if serving.is_some_and(|serving| serving != pid) {
            return Err(Fault(format!("the new core (process {pid}) no longer serves: it died or lost the gate")));
        }
        let recorded = self.volume.update(|record| {
            if record.current.as_ref() != Some(to) {
                record.previous = record.current.replace(to.clone());
            }
        });
        if let Err(e) = recorded {
            // The file may bear the new program all the same: then it has to be there.
            self.record_unknown = self.volume.rewrite_record().is_err();
            return Err(Fault(format!("the new program cannot be recorded as the current one: {e}")));
        }
        let standby = start::core(self.volume, to).and_then(|child| {
            let left = until.saturating_duration_since(Instant::now());
            start::core_armed(self.volume, &child, STANDBY_WITHIN.min(left))?;
            Ok(child.id.pid)
        });
        if let Err(e) = &standby {
            warn!(volume = %self.volume.name, "no standby of the new version yet: {e}");
        }
        // Those that time is too short for, the supervisor ends.
        self.end_cores(Unserved::Stays, Some(until), |core| core.process.pid != pid && core.program != to.program);
        start::prune_programs(self.volume);
        Ok(())
    }

    fn hand_back(&mut self) -> Result<GivenBack, Fault> {
        let current = self.volume.current()?;
        let attachment = self.volume.attached()?;
        // Where nobody serves, the supervisor brings an old core; where nobody answers, there is nothing to take.
        let Ok(status) = self.wait_for(|status| status.serving.is_some()) else {
            return Ok(GivenBack { had_switched: false });
        };
        let Some(serving) = status.serving.filter(|pid| self.is_new(*pid, &current, &attachment)) else {
            return Ok(GivenBack { had_switched: false });
        };
        self.give_back(serving, &current)?;
        Ok(GivenBack { had_switched: true })
    }

    fn dismiss(&mut self) {
        let Ok(current) = self.volume.current() else { return };
        self.end_cores(Unserved::Goes, None, |core| core.program != current.program);
    }

    fn unstage(&mut self) {
        if self.record_unknown {
            return;
        }
        start::prune_programs(self.volume);
    }
}

#[cfg(test)]
mod tests;
