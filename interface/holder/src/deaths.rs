//! The deaths of cores: succession, log and report.

use std::{os::fd::AsFd, sync::atomic::Ordering::Relaxed, time::Instant};

use everdisk_gate::{
    custody::{SlotState, State},
    ticket,
};
use everdisk_proto::{frame::CoreDeath, ids::Slot};
use everdisk_sys::{clock::monotonic_ns, signal};

use crate::{cores, holder::Holder, life, nodes::KeptNodes, suspension::TAKEOVER_LIMIT};

/// Number of deaths that are remembered.
const DEATHS_MAX: usize = 8;

/// How a death was noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noticed {
    /// By the marks that its threads left (D14).
    Marks,
    /// By the end of the process.
    Process,
}

impl Noticed {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Marks => "marks",
            Self::Process => "process",
        }
    }
}

impl Holder {
    /// A core is gone. If it had the gate, another gets it (D3): the same steps as a planned hand-over after its
    /// suspension.
    pub(crate) fn bury(&mut self, slot: Slot) {
        let noticed = Instant::now();
        let Some(core) = self.cores.remove(slot) else { return };
        let by = if core.stopped.is_so() { Noticed::Marks } else { Noticed::Process };
        if by == Noticed::Marks {
            // It is dying, so this changes nothing; were a mark wrong, what is cleared below would count it as harmless while it runs.
            let _ = signal::kill(core.handle.as_fd());
        }
        let served = self.has_gate(slot);
        let generation = self.custody.generation();
        let act = {
            if self.custody.serving() == Some(slot) {
                let gate = &self.segment.gate;
                gate.closed_ns.store(monotonic_ns(), Relaxed);
                gate.drained_ns.store(monotonic_ns(), Relaxed);
                ticket::set(&gate.word, self.custody.closed());
            }
            // Before its tickets are free: as long as one of the two says so, nobody writes to the nodes.
            self.hear_last_words(slot, &core);
            let drained = self.kept.drain(slot, &self.segment);
            let used = cores::node_connections(&self.segment, slot);
            if self.is_restored && used > drained {
                KeptNodes::wait_for_lost(used - drained, &self.segment);
            }
            cores::strike(&self.segment, slot);
            self.custody.died(slot)
        };
        self.segment.gate.crashes.store(self.custody.crashes(), Relaxed);
        self.perform(act, TAKEOVER_LIMIT, None);
        let version = &core.identity.version;
        if core.leaves && !served {
            let by = by.as_str();
            tracing::info!(event = "core_left", pid = core.pid, %version, by, "a core that was asked to leave has left");
            return;
        }
        let successor = self.custody.serving().and_then(|slot| self.cores.get(slot)).map(|core| core.pid);
        let recovered = successor.map(|_| noticed.elapsed());
        let death = CoreDeath {
            pid: core.pid,
            generation,
            served,
            killed: core.killed,
            successor: successor.filter(|_| served),
            recovered_us: recovered.filter(|_| served).and_then(|time| u64::try_from(time.as_micros()).ok()),
        };
        self.note_death(death, by);
    }

    /// Whether a core has the gate, or had it when it was suspended.
    fn has_gate(&self, slot: Slot) -> bool {
        let gate = match self.custody.state() {
            State::Serving { slot } | State::Suspended { slot: Some(slot), .. } => Some(slot),
            _ => None,
        };
        gate == Some(slot)
    }

    /// Remembers a death for the control module, and logs it.
    pub(crate) fn note_death(&mut self, death: CoreDeath, by: Noticed) {
        let (pid, generation, by) = (death.pid, death.generation, by.as_str());
        let killed = death.killed.as_deref().unwrap_or("not by this interface");
        match (death.served, death.successor, death.recovered_us) {
            (true, Some(successor), Some(recovered_us)) => tracing::warn!(
                event = "core_crashed",
                pid,
                %generation,
                killed,
                by,
                successor,
                recovered_us,
                "the core that served has died, and another one has taken over"
            ),
            (true, ..) => tracing::error!(
                event = "core_crashed",
                pid,
                %generation,
                killed,
                by,
                "the core that served has died, and no other is ready to take over yet: requests wait"
            ),
            (false, ..) => {
                tracing::warn!(event = "standby_crashed", pid, killed, by, "a core that did not serve has died");
            }
        }
        if death.served {
            self.orphaned = death.successor.is_none().then(Instant::now);
        }
        if self.deaths.len() >= DEATHS_MAX {
            self.deaths.remove(0);
        }
        self.deaths.push(death);
    }

    /// A core has the gate: it succeeds one whose death left no other core.
    pub(crate) fn note_successor(&mut self, slot: Slot) {
        let Some(since) = self.orphaned.take() else { return };
        let pid = self.cores.get(slot).map(|core| core.pid);
        if let Some(death) = self.deaths.iter_mut().rev().find(|death| death.served && death.successor.is_none()) {
            death.successor = pid;
            death.recovered_us = u64::try_from(since.elapsed().as_micros()).ok();
        }
    }

    /// Whether a core answers.
    pub(crate) fn answers(&self, slot: Slot) -> bool {
        let core = self.cores.get(slot).filter(|core| !core.is_gone());
        core.is_some_and(|core| life::answers(&life::core_socket(&self.socket, core.pid)))
    }

    /// A core does not answer, and does not serve: it is killed and no longer considered. It would have to report
    /// itself armed before it is given the gate. Its death is noticed like any other.
    pub(crate) fn put_down(&mut self, slot: Slot, why: String) {
        self.custody.joined(slot);
        self.kill(slot, why);
    }

    fn kill(&mut self, slot: Slot, why: String) {
        let Some(core) = self.cores.get_mut(slot) else { return };
        if core.killed.is_some() || core.is_gone() {
            return;
        }
        tracing::error!(event = "core_killed", pid = core.pid, why, "a core that does not answer is killed");
        if let Err(error) = signal::kill(core.handle.as_fd()) {
            tracing::error!(pid = core.pid, %error, "it cannot be killed");
        }
        core.killed = Some(why);
    }

    /// Replaces a core that serves, makes no progress and does not answer, while requests wait and another core could
    /// take over. A core whose nodes hang does answer.
    pub(crate) fn watch_over(&mut self) {
        if !self.watchdog.is_due() {
            return;
        }
        let waits = self.fronts.waiting() != Some(0);
        let Some(slot) = self.custody.serving().filter(|_| waits) else { return self.watchdog.rest() };
        let Some(core) = self.cores.get(slot) else { return self.watchdog.rest() };
        let Some(silent) = self.watchdog.watch(&self.segment, slot, core, &self.socket) else { return };
        let another =
            self.cores.iter().any(|(other, _)| other != slot && self.custody.slot_state(other) == SlotState::Armed);
        if another {
            let why = format!("it did not answer for {:.1} s while requests waited", silent.as_secs_f64());
            self.watchdog.rest();
            self.kill(slot, why);
        }
    }
}
