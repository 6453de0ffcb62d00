//! The supervisor: one thread for each attached volume that brings the processes back to what they should be.
//!
//! ```text
//!  should be            is                                   then
//!  an interface         gone, a core lives                   start one that takes the fds back (--restore)
//!                       gone, no core lives                  say so: the volume has failed
//!                       being restored, no core lives        end it: no process is left that could give it anything
//!                       hangs while it restores              end it, if this module started it
//!  its program recorded  it serves, and its program is not    copy and record it, later each time that fails
//!  one standby          none armed, none on its way          start one, later each time they die early
//!                       more than one, or another program    dismiss those
//!                       not armed for too long               end it, if another one serves
//!                       silent for the hang limit            end it
//!  writes buffered      they go through, no operation runs   have them buffered again
//! ```
//!
//! A dead serving core is not its business: the interface gives the gate to an armed core by itself (D3). While an
//! operation has the volume the supervisor keeps only what the operation relies on: an interface, and a core when there
//! is none at all.

use std::{
    collections::HashMap,
    fs,
    io::ErrorKind,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::{
    frame::{CoreDeath, GateState, InterfaceStatus, RESTORING},
    limits::CORES_MAX,
};
use everdisk_sys::link::LinkError;
use everdisk_telemetry::event;
use tracing::{error, info, warn};

use crate::{
    child::Child,
    error::{Error, Result},
    process::ProcessId,
    progress::milliseconds,
    record::{Attachment, KnownCore, Phase},
    stage,
    start::{self, ARMED_WITHIN, Unserved},
    status::all_gone,
    volume::Volume,
};

/// Interval between two passes.
const INTERVAL: Duration = Duration::from_millis(100);
/// Shortest and longest pause between starts that fail.
const STARTS: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
/// Shortest and longest pause between attempts to record a program: each may copy it.
const RECORDINGS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(300)];
/// An interface answers while it restores the volume. One that is silent for this long hangs.
const SILENT_FOR: Duration = Duration::from_secs(15);
/// An interface that dies earlier than this has died early.
const EARLY: Duration = Duration::from_secs(1);
/// The interface notices the death of a core within this time.
const NOTICED_WITHIN: Duration = Duration::from_secs(1);
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
        while !volume.operations.is_deleted() {
            let pause = if supervisor.pass() { INTERVAL } else { Duration::from_secs(3600) };
            volume.supervision.wait_kick(pause);
        }
    })?;
    Ok(())
}

/// Pauses that grow while something keeps failing.
#[derive(Debug)]
struct BackOff {
    /// Pause after the second failure in a row; doubled with each further one.
    shortest: Duration,
    longest: Duration,
    failures: u32,
    not_before: Option<Instant>,
}

impl BackOff {
    const fn new([shortest, longest]: [Duration; 2]) -> Self {
        Self { shortest, longest, failures: 0, not_before: None }
    }

    fn permits(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|at| now >= at)
    }

    fn failed(&mut self, now: Instant) {
        // The first death is no pattern: it does not lengthen the wait for a core.
        let pause = match self.failures {
            0 => Duration::ZERO,
            n => self.shortest.saturating_mul(1 << (n - 1).min(16)).min(self.longest),
        };
        self.failures += 1;
        self.not_before = Some(now + pause);
    }

    fn succeeded(&mut self) {
        *self = Self::new([self.shortest, self.longest]);
    }
}

/// A process under observation.
#[derive(Debug)]
struct Started {
    child: Child,
    at: Instant,
    /// When it was seen to be ready first: the core armed, the interface serving.
    ready_at: Option<Instant>,
}

impl Started {
    const fn new(child: Child, at: Instant) -> Self {
        Self { child, at, ready_at: None }
    }
}

/// A core that is dead, and whose end is not logged yet.
#[derive(Debug)]
struct Dead {
    core: KnownCore,
    child: Option<Child>,
    since: Instant,
}

struct Supervisor<'a> {
    volume: &'a Arc<Volume>,
    interface: Option<Started>,
    interface_pause: BackOff,
    /// Interfaces in a row that were started, or were to be started, and did not restore the volume.
    unrestored_times: u32,
    /// The interface that was silent at each pass, and since when.
    silent: Option<(ProcessId, Instant)>,
    /// The interface whose program is known to be on record.
    recorded: Option<ProcessId>,
    recording_pause: BackOff,
    /// The dead interface whose death was logged, and since when no other has replaced it.
    headless: Option<(Option<ProcessId>, Instant)>,
    /// Why the last interface that was started ended by itself.
    unrestored: Option<String>,
    standby: Option<Started>,
    standby_pause: BackOff,
    /// Cores that run and are not armed, and since when.
    waiting: HashMap<u32, Instant>,
    dead: Vec<Dead>,
    /// Cores started by the attachment that was seen last: a smaller number is another attachment.
    started: u64,
    /// The failure that was logged last: the same one is not logged again.
    told: Option<String>,
}

impl<'a> Supervisor<'a> {
    fn new(volume: &'a Arc<Volume>) -> Self {
        Self {
            volume,
            interface: None,
            interface_pause: BackOff::new(STARTS),
            unrestored_times: 0,
            silent: None,
            recorded: None,
            recording_pause: BackOff::new(RECORDINGS),
            headless: None,
            unrestored: None,
            standby: None,
            standby_pause: BackOff::new(STARTS),
            waiting: HashMap::new(),
            dead: Vec::new(),
            started: 0,
            told: None,
        }
    }

    /// Makes one pass. False when there is nothing to supervise.
    fn pass(&mut self) -> bool {
        let _hands = self.volume.supervision.hands();
        let attachment = self.volume.attachment();
        if attachment.as_ref().is_none_or(|attachment| attachment.started < self.started) {
            // What was known of the processes of another attachment says nothing of this one's.
            *self = Self::new(self.volume);
            self.volume.findings.forget_attachment();
        }
        let Some(attachment) = attachment else { return false };
        self.started = attachment.started;
        // An attach under way and a detach have the hands; what they left half-done the start of the module clears.
        if attachment.phase != Phase::Attached {
            return true;
        }
        if !attachment.interface_alive() {
            let restored = self.restore(&attachment);
            self.complain("cannot start an interface", restored);
            return true;
        }
        let answer = self.volume.interface().status();
        if !matches!(&answer, Err(Error::Peer { source, .. }) if is_silence(source)) {
            self.silent = None;
        }
        match answer {
            Ok(status) => {
                self.interface_pause.succeeded();
                self.unrestored_times = 0;
                if let Some(interface) = &mut self.interface {
                    interface.ready_at.get_or_insert_with(Instant::now);
                }
                self.volume.findings.saw_buffered(status.buffer.map_or(0, |buffer| buffer.buffered_bytes));
                self.unrestored = None;
                if let Some((_, since)) = self.headless.take() {
                    let (volume, pid, took_ms) = (&self.volume.name, status.pid, milliseconds(since.elapsed()));
                    info!(event = event::INTERFACE_RESTORED, %volume, pid, took_ms, "another interface has taken the dead one's place");
                }
                let interface = attachment.interface;
                let kept = self.keep_standby(attachment, &status);
                self.volume.findings.set_standby_trouble(match &kept {
                    Err(e) => Some(e.to_string()),
                    Ok(()) => self.standby_trouble(&status),
                });
                self.complain("cannot keep a standby", kept);
                self.buffer_again(&status);
                // Last: it takes long.
                if let Some(process) = interface {
                    self.record_interface(process);
                }
            }
            Err(Error::Failed(why)) if why == RESTORING && attachment.live_cores().next().is_none() => {
                if let Some(interface) = attachment.interface {
                    interface.end(Duration::ZERO);
                }
                self.volume.findings.set_trouble(Some(all_gone(self.volume, &attachment)));
            }
            Err(Error::Peer { source, .. }) if is_silence(&source) => self.end_hung_restore(&attachment),
            Err(_) => {}
        }
        true
    }

    /// Kills an interface that was started here, has never been seen to serve, and answers nothing for longer than a restore takes: the next
    /// pass counts it as one that did not restore. Without a core that lives it stays, for it may be the last to hold the volume's descriptors.
    fn end_hung_restore(&mut self, attachment: &Attachment) {
        let Some(Started { child, ready_at: None, .. }) = &self.interface else { return };
        let id = child.id;
        if attachment.interface != Some(id) {
            return;
        }
        let since = self.silent.filter(|(of, _)| *of == id).map_or_else(Instant::now, |(_, since)| since);
        self.silent = Some((id, since));
        if since.elapsed() > SILENT_FOR && attachment.live_cores().next().is_some() {
            let (volume, pid, limit_s) = (&self.volume.name, id.pid, SILENT_FOR.as_secs());
            warn!(event = event::SUPERVISION_FAILED, %volume, pid, limit_s, "an interface that hangs while it restores the volume is killed");
            id.end(Duration::ZERO);
            self.silent = None;
        }
    }

    /// Logs a failure once, however often it is met.
    fn complain(&mut self, what: &str, done: Result<()>) {
        let failure = done.err().map(|e| format!("{what}: {e}"));
        if failure != self.told
            && let Some(failure) = &failure
        {
            warn!(event = event::SUPERVISION_FAILED, volume = %self.volume.name, "{failure}");
        }
        self.told = failure;
    }

    /// The interface is gone.
    fn restore(&mut self, attachment: &Attachment) -> Result<()> {
        let now = Instant::now();
        let dead = attachment.interface;
        if self.headless.is_none_or(|(told, _)| told != dead) {
            let (volume, pid) = (&self.volume.name, dead.map(|dead| dead.pid));
            let how = how_it_ended(dead.and_then(|dead| self.volume.children.find(dead)).as_ref());
            warn!(event = event::INTERFACE_ENDED, %volume, pid, how, "the interface has died: I/O goes on as long as a core lives");
            let since = self.headless.map_or(now, |(_, since)| since);
            self.headless = Some((dead, since));
            if let Some(started) = self.interface.take() {
                if started.at.elapsed() < EARLY {
                    self.interface_pause.failed(now);
                }
                self.unrestored_times += u32::from(started.ready_at.is_none());
                // One that was killed has nothing to say of why.
                let by_itself = started.child.ended_by_now().is_some_and(|status| status.code().is_some());
                self.unrestored = by_itself.then(|| started.child.last_words());
            }
        }
        if attachment.live_cores().next().is_none() {
            self.volume.findings.set_trouble(Some(all_gone(self.volume, attachment)));
            return Ok(());
        }
        if !self.interface_pause.permits(now) {
            return Ok(());
        }
        self.volume.findings.set_trouble(Some(match &self.unrestored {
            None => "the interface has died and is started again".to_owned(),
            Some(why) => format!("the interface has died, and the one that was started in its place ended: {why}"),
        }));
        let program = stage::restoring_interface(self.volume, self.unrestored_times);
        let started = start::interface(self.volume, &program, true);
        if started.is_err() {
            self.interface_pause.failed(now);
            self.unrestored_times += 1;
        }
        let started = started?;
        self.interface = Some(Started::new(started, now));
        Ok(())
    }

    /// Puts the program of the interface that serves on record, where it is not: a control module of record version 1 has started it, or it
    /// has restored the volume in place of the one on record. Whether it is there is found out once for each interface.
    fn record_interface(&mut self, process: ProcessId) {
        let now = Instant::now();
        // An operation that ends removes every copy that is not on record yet.
        let is_busy = self.volume.operations.running().is_some();
        if self.recorded == Some(process) || is_busy || !self.recording_pause.permits(now) {
            return;
        }
        let volume = &self.volume.name;
        let recorded = stage::is_on_record(self.volume, process)
            .and_then(|is_recorded| (!is_recorded).then(|| stage::adopt_interface(self.volume, process)).transpose());
        match recorded {
            Ok(adopted) => {
                if let Some(build) = adopted {
                    info!(%volume, program = %build.identity, "the program of the interface that runs is on record now");
                }
                self.recorded = Some(process);
                self.recording_pause.succeeded();
            }
            Err(e) => {
                if self.recording_pause.failures == 0 {
                    warn!(%volume, "the program of the interface that runs cannot be recorded, which is tried again: {e}");
                }
                self.recording_pause.failed(now);
            }
        }
    }

    /// Why there is no standby, when there is none.
    fn standby_trouble(&self, status: &InterfaceStatus) -> Option<String> {
        let is_armed = status.cores.iter().any(|core| core.armed && Some(core.pid) != status.serving);
        let before = || self.volume.findings.standby_trouble().filter(|_| self.standby_pause.failures > 0);
        let starting = |standby: &Started| format!("process {} is being started", standby.child.id.pid);
        (!is_armed).then(|| before().or_else(|| self.standby.as_ref().map(starting))).flatten()
    }

    fn keep_standby(&mut self, attachment: Attachment, status: &InterfaceStatus) -> Result<()> {
        let attachment = self.forget_the_dead(attachment)?;
        let live: Vec<&KnownCore> = attachment.live_cores().collect();
        self.mourn(status);
        self.look_at_standby(status);
        self.tell_trouble(status);
        if let Some(running) = self.volume.operations.running() {
            // An upgrade tends its cores itself.
            if running.name.replaces_the_core() && !(live.is_empty() && status.cores.is_empty()) {
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
            if armed(pid) && self.is_silent(pid) {
                let limit_s = self.volume.programs.hang_limit.as_secs();
                let volume = &self.volume.name;
                warn!(event = event::CORE_KILLED, %volume, pid, limit_s, "a standby that does not answer is killed, and another one started");
                core.process.end(Duration::ZERO);
                continue;
            }
            let overdue = !armed(pid) && now - *self.waiting.entry(pid).or_insert(now) > ARMED_WITHIN;
            if status.serving.is_none() {
                // A core that is alive may hold what the next one needs, so all stay. Cores that have hung for long are
                // not waited for, as long as there is room beside them.
                standbys += usize::from(!overdue || live.len() >= CORES_MAX / 2);
            } else if overdue || standbys > 0 || core.program != build.program {
                if !start::end_core(self.volume, core, Unserved::Stays) {
                    // It has the gate by now, or the interface does not answer: the next pass checks the rest afresh.
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

    /// Ends the synchronous mode when writes still go through to the storage nodes although the operation that asked for it has died.
    fn buffer_again(&self, status: &InterfaceStatus) {
        let through = status.buffer.is_some_and(|buffer| buffer.synchronous);
        if !through || status.gate != GateState::Serving || self.volume.operations.running().is_some() {
            return;
        }
        match self.volume.interface().synchronous(false) {
            Ok(()) => info!(volume = %self.volume.name, "writes are buffered again, which an operation had not done"),
            Err(e) => warn!(volume = %self.volume.name, "writes go through to the storage nodes: {e}"),
        }
    }

    /// Whether a core has not answered for the hang limit.
    fn is_silent(&self, pid: u32) -> bool {
        self.volume.findings.silent_for(pid).is_some_and(|time| time >= self.volume.programs.hang_limit)
    }

    fn forget_the_dead(&mut self, mut attachment: Attachment) -> Result<Attachment> {
        let (living, dead): (Vec<_>, Vec<_>) = attachment.cores.into_iter().partition(|core| core.process.alive());
        attachment.cores = living;
        for core in &dead {
            if self.dead.iter().all(|known| known.core != *core) {
                let child = self.volume.children.find(core.process);
                self.dead.push(Dead { core: core.clone(), child, since: Instant::now() });
            }
        }
        if !dead.is_empty() {
            let living = attachment.cores.clone();
            self.volume.update_attachment(|recorded| recorded.cores = living)?;
        }
        for KnownCore { process: ProcessId { pid, .. }, .. } in dead {
            if attachment.program_of(pid).is_none() {
                // It is not there where the core had not made it, or has removed it.
                let _ = fs::remove_file(self.volume.paths.core_socket(pid));
            }
        }
        Ok(attachment)
    }

    /// One line for each core that has died: what it did, how it ended, and what happened to its work. The interface may notice a
    /// moment later than this process.
    fn mourn(&mut self, status: &InterfaceStatus) {
        let volume = &self.volume.name;
        self.dead.retain(|Dead { core, child, since }| {
            let pid = core.process.pid;
            let death = status.deaths.iter().find(|death| death.pid == pid);
            let is_known = death.is_some_and(|death| !death.served || death.successor.is_some());
            if !is_known && since.elapsed() < NOTICED_WITHIN {
                return true;
            }
            let (how, child) = (how_it_ended(child.as_ref()), child.as_ref());
            let killed = death.and_then(|death| death.killed.as_deref()).unwrap_or("by nobody of everdisk");
            match death.filter(|death| death.served) {
                Some(CoreDeath { generation, successor: Some(successor), recovered_us, .. }) => warn!(
                    event = event::CORE_CRASHED, %volume, pid, how, killed, %generation, successor, recovered_us,
                    "the core that served has died, and another one has taken over"
                ),
                Some(CoreDeath { generation, .. }) => error!(
                    event = event::CORE_CRASHED, %volume, pid, how, killed, %generation,
                    "the core that served has died, and none was ready to take over: requests wait for the next one"
                ),
                None if child.and_then(Child::ended).is_some_and(|status| status.success()) => {
                    info!(event = event::CORE_ENDED, %volume, pid, "a core that did not serve has left");
                }
                None => warn!(
                    event = event::CORE_ENDED, %volume, pid, how, killed,
                    "a core that did not serve has died, and another one is started"
                ),
            }
            false
        });
    }

    /// Whether the last standby that was started has armed, or has died, and when.
    fn look_at_standby(&mut self, status: &InterfaceStatus) {
        let Some(standby) = &mut self.standby else { return };
        let pid = standby.child.id.pid;
        if standby.child.id.alive() {
            if status.cores.iter().any(|core| core.pid == pid && core.armed) {
                standby.ready_at.get_or_insert_with(Instant::now);
            }
            return;
        }
        let early = standby.ready_at.is_none_or(|at| at.elapsed() < EARLY_AFTER_ARMED);
        if early {
            let why = format!("the last one (process {pid}) ended at once: {}", standby.child.last_words());
            self.volume.findings.set_standby_trouble(Some(why));
            self.standby_pause.failed(Instant::now());
        } else {
            self.standby_pause.succeeded();
        }
        self.standby = None;
    }

    fn tell_trouble(&self, status: &InterfaceStatus) {
        let trouble = status.serving.is_none().then(|| match &self.standby {
            Some(standby) => format!("no core serves; process {} is on its way", standby.child.id.pid),
            None => "no core serves; they keep ending, see the core logs in the run directory".to_owned(),
        });
        self.volume.findings.set_trouble(trouble);
    }
}

/// Whether the peer says nothing. A shortage of descriptors or memory is this process's own, and an answer that is not understood is one.
fn is_silence(error: &LinkError) -> bool {
    match error {
        LinkError::Deadline(_) | LinkError::Closed => true,
        LinkError::Io(e) => {
            matches!(e.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound | ErrorKind::WouldBlock)
        }
        LinkError::Frame(_) => false,
    }
}

/// How a process ended, as far as that is known.
fn how_it_ended(child: Option<&Child>) -> String {
    let Some(child) = child else { return "it was started by an earlier control module".to_owned() };
    match child.ended_by_now() {
        Some(status) if status.success() || status.code().is_none() => status.to_string(),
        Some(status) => format!("{status}: {}", child.last_words()),
        None => "its exit status is not known yet".to_owned(),
    }
}

#[cfg(test)]
mod tests;
