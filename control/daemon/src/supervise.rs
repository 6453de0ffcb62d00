//! The supervisor: one thread for each attached volume that brings the processes back to what they should be.
//!
//! ```text
//!  should be            is                                   then
//!  an interface         gone, a core lives                   start one that takes the fds back (--restore)
//!                       gone, no core lives                  say so: the volume has failed
//!  one standby          none armed, none on its way          start one, later each time they die early
//!                       more than one, or another program    dismiss those
//!                       not armed for too long               end it, if another one serves
//!  writes buffered      they go through, no operation runs   have them buffered again
//! ```
//!
//! A dead serving core is not its business: the interface gives the gate to an armed core by itself (D3). While an
//! operation has the volume the supervisor keeps only what the operation relies on: an interface, and a core when there
//! is none at all.

use std::{
    collections::HashMap,
    fs,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::{
    frame::{GateState, InterfaceStatus},
    limits::CORES_MAX,
};
use everdisk_telemetry::event;
use tracing::{info, warn};

use crate::{
    child::Child,
    error::Result,
    process::ProcessId,
    record::{Attachment, KnownCore, Phase},
    start::{self, ARMED_WITHIN, Unserved},
    status::all_gone,
    volume::{Volume, lock},
};

/// It looks this often.
const INTERVAL: Duration = Duration::from_millis(100);
/// Pause after the second early death in a row; doubled with each further one.
const BACK_OFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause.
const BACK_OFF_MAX: Duration = Duration::from_secs(5);
/// An interface that dies earlier than this has died early.
const EARLY: Duration = Duration::from_secs(1);
/// A core that dies earlier than this after it had armed has died early; one that had not armed always.
const EARLY_AFTER_ARMED: Duration = Duration::from_millis(200);

/// Starts the supervisor of a volume. It ends when the volume is deleted.
///
/// # Errors
/// No thread can be started.
pub fn supervise(volume: &Arc<Volume>) -> std::io::Result<()> {
    let volume = Arc::clone(volume);
    let name = format!("watch-{}", volume.name);
    thread::Builder::new().name(name).spawn(move || {
        let mut supervisor = Supervisor::new(&volume);
        while !volume.deleted.load(Ordering::Relaxed) {
            let pause = if supervisor.pass() { INTERVAL } else { Duration::from_secs(3600) };
            volume.wait_kick(pause);
        }
    })?;
    Ok(())
}

/// Pauses that grow while starts keep failing.
#[derive(Debug, Default)]
struct BackOff {
    failures: u32,
    not_before: Option<Instant>,
}

impl BackOff {
    fn permits(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|at| now >= at)
    }

    fn failed(&mut self, now: Instant) {
        // The first death is no pattern: whoever waits for a core shall not wait longer for that.
        let pause = match self.failures {
            0 => Duration::ZERO,
            n => BACK_OFF_MIN.saturating_mul(1 << (n - 1).min(6)).min(BACK_OFF_MAX),
        };
        self.failures += 1;
        self.not_before = Some(now + pause);
    }

    fn succeeded(&mut self) {
        *self = Self::default();
    }
}

/// A process under observation.
#[derive(Debug)]
struct Started {
    child: Child,
    at: Instant,
    armed_at: Option<Instant>,
}

impl Started {
    const fn new(child: Child, at: Instant) -> Self {
        Self { child, at, armed_at: None }
    }
}

struct Supervisor<'a> {
    volume: &'a Arc<Volume>,
    interface: Option<Started>,
    interface_pause: BackOff,
    standby: Option<Started>,
    standby_pause: BackOff,
    /// Cores that run and are not armed, and since when.
    waiting: HashMap<u32, Instant>,
}

impl<'a> Supervisor<'a> {
    fn new(volume: &'a Arc<Volume>) -> Self {
        Self {
            volume,
            interface: None,
            interface_pause: BackOff::default(),
            standby: None,
            standby_pause: BackOff::default(),
            waiting: HashMap::new(),
        }
    }

    /// Looks once. False when there is nothing to look at.
    fn pass(&mut self) -> bool {
        let _hands = lock(&self.volume.hands);
        let Some(attachment) = self.volume.attachment() else { return false };
        // An attach under way and a detach have the hands; what they left half-done the start of the module clears.
        if attachment.phase != Phase::Attached {
            return true;
        }
        if !attachment.interface_alive() {
            if let Err(e) = self.restore(&attachment) {
                warn!(volume = %self.volume.name, "cannot start an interface: {e}");
            }
            return true;
        }
        if let Ok(status) = self.volume.interface().status() {
            self.interface_pause.succeeded();
            self.volume.saw_buffered(status.buffer.map_or(0, |buffer| buffer.buffered_bytes));
            if let Err(e) = self.keep_standby(attachment, &status) {
                warn!(volume = %self.volume.name, "cannot keep a standby: {e}");
            }
            self.buffer_again(&status);
        }
        true
    }

    /// The interface is gone.
    fn restore(&mut self, attachment: &Attachment) -> Result<()> {
        let now = Instant::now();
        if let Some(dead) = self.interface.take() {
            warn!(event = event::INTERFACE_ENDED, volume = %self.volume.name, pid = dead.child.id.pid);
            if dead.at.elapsed() < EARLY {
                self.interface_pause.failed(now);
            }
        }
        if attachment.live_cores().next().is_none() {
            self.volume.set_trouble(Some(all_gone(self.volume, attachment)));
            return Ok(());
        }
        if !self.interface_pause.permits(now) {
            return Ok(());
        }
        self.volume.set_trouble(Some("the interface has died and is started again".to_owned()));
        let started = start::interface(self.volume, true);
        if started.is_err() {
            self.interface_pause.failed(now);
        }
        self.interface = Some(Started::new(started?, now));
        Ok(())
    }

    fn keep_standby(&mut self, attachment: Attachment, status: &InterfaceStatus) -> Result<()> {
        let attachment = self.forget_the_dead(attachment)?;
        let live: Vec<&KnownCore> = attachment.live_cores().collect();
        self.look_at_standby(status);
        self.tell_trouble(status);
        if let Some(running) = self.volume.running() {
            // An upgrade tends its cores itself.
            if matches!(running.name, "upgrade" | "rollback") && !(live.is_empty() && status.cores.is_empty()) {
                return Ok(());
            }
        }
        let build = self.volume.current()?;
        let now = Instant::now();
        let armed = |pid: u32| status.cores.iter().any(|core| core.pid == pid && core.armed);
        self.waiting.retain(|pid, _| live.iter().any(|core| core.process.pid == *pid) && !armed(*pid));
        let mut standbys = 0;
        // The youngest first: of two good ones the older leaves.
        for core in live.iter().rev().filter(|core| status.serving != Some(core.process.pid)) {
            let pid = core.process.pid;
            let overdue = !armed(pid) && now - *self.waiting.entry(pid).or_insert(now) > ARMED_WITHIN;
            if status.serving.is_none() {
                // Whoever is alive may hold what the next one needs, so all stay. Those that have hung for long are
                // not waited for, as long as there is room beside them.
                standbys += usize::from(!overdue || live.len() >= CORES_MAX / 2);
            } else if overdue || standbys > 0 || core.program != build.program {
                if !start::end_core(self.volume, core, Unserved::Stays) {
                    // It has the gate by now, or nobody answers: the rest is looked at afresh in the next pass.
                    break;
                }
            } else {
                standbys += 1;
            }
        }
        for core in &status.cores {
            let known = attachment.cores.iter().any(|known| known.process.pid == core.pid);
            if !known && status.serving != Some(core.pid) {
                self.volume.interface().dismiss(core.pid)?;
            }
        }
        if standbys == 0 && self.standby_pause.permits(now) {
            let started = start::core(self.volume, &build);
            if started.is_err() {
                self.standby_pause.failed(now);
            }
            self.standby = Some(Started::new(started?, now));
        }
        Ok(())
    }

    /// Writes still go through to the storage nodes, and nobody is left who wanted it: whoever did has died.
    fn buffer_again(&self, status: &InterfaceStatus) {
        let through = status.buffer.is_some_and(|buffer| buffer.synchronous);
        if !through || status.gate != GateState::Serving || self.volume.running().is_some() {
            return;
        }
        match self.volume.interface().synchronous(false) {
            Ok(()) => info!(volume = %self.volume.name, "writes are buffered again, which an operation had not done"),
            Err(e) => warn!(volume = %self.volume.name, "writes go through to the storage nodes: {e}"),
        }
    }

    fn forget_the_dead(&self, mut attachment: Attachment) -> Result<Attachment> {
        let (living, dead): (Vec<_>, Vec<_>) = attachment.cores.into_iter().partition(|core| core.process.alive());
        attachment.cores = living;
        if !dead.is_empty() {
            let living = attachment.cores.clone();
            self.volume.update_attachment(|recorded| recorded.cores = living)?;
        }
        for KnownCore { process: ProcessId { pid, .. }, .. } in dead {
            if attachment.program_of(pid).is_none() {
                let _ = fs::remove_file(self.volume.paths.core_socket(pid));
            }
        }
        Ok(attachment)
    }

    /// Whether the last standby that was started has armed, or has died, and when.
    fn look_at_standby(&mut self, status: &InterfaceStatus) {
        let Some(standby) = &mut self.standby else { return };
        let pid = standby.child.id.pid;
        if standby.child.id.alive() {
            if status.cores.iter().any(|core| core.pid == pid && core.armed) {
                standby.armed_at.get_or_insert_with(Instant::now);
            }
            return;
        }
        let early = standby.armed_at.is_none_or(|at| at.elapsed() < EARLY_AFTER_ARMED);
        if early {
            let words = standby.child.last_words();
            warn!(event = event::CORE_ENDED, volume = %self.volume.name, pid, "a core ended early: {words}");
            self.standby_pause.failed(Instant::now());
        } else {
            info!(event = event::CORE_ENDED, volume = %self.volume.name, pid);
            self.standby_pause.succeeded();
        }
        self.standby = None;
    }

    fn tell_trouble(&self, status: &InterfaceStatus) {
        let trouble = status.serving.is_none().then(|| match &self.standby {
            Some(standby) => format!("no core serves; process {} is on its way", standby.child.id.pid),
            None => "no core serves; they keep ending, see the core logs in the run directory".to_owned(),
        });
        self.volume.set_trouble(trouble);
    }
}

#[cfg(test)]
mod tests;
