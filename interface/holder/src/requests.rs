//! Requests of the control module.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use everdisk_gate::custody::{Act, Refusal, SlotState, State};
use everdisk_proto::{
    frame::{
        Answer, FileAttach, FromInterface, GateState, HandoverFailure, HandoverReport, InterfaceStatus, NbdListen,
        Request,
    },
    gate_word::Mode,
    limits::{LEASE_DEFAULT, LEASE_MAX},
};
use everdisk_sys::clock::monotonic_ns;

use crate::{
    cores,
    front::FileFront,
    holder::Holder,
    locks::NodeLocks,
    nbd::NbdFront,
    nodes::KeptNodes,
    peers::Peer,
    suspension::{self, Until, not_drained},
    unmounting::Unmounting,
};

/// A suspension by hand waits this long for requests under way.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// Limit of the core's first probe, at attach.
const ATTACH_LIMIT: Duration = Duration::from_secs(5);
/// The successor's first request, if some were held, comes within this time; else the report does not have its time.
const FIRST_REQUEST_LIMIT: Duration = Duration::from_millis(50);

fn failed(reason: impl Into<String>) -> Answer {
    Answer::Failed { reason: reason.into(), busy: false }
}

fn done_or(result: Result<(), String>) -> Answer {
    result.map_or_else(failed, |()| Answer::Done)
}

fn refused(refusal: Refusal) -> String {
    refusal.as_str().to_owned()
}

impl Holder {
    /// Carries out a request; `None` when the answer comes later.
    pub(crate) fn handle(&mut self, request: Request, peer: &Peer, id: u64) -> Option<Answer> {
        if self.unmounting.is_some() && request != Request::Status {
            return Some(failed("the volume is being detached"));
        }
        Some(match request {
            Request::Status => Answer::Status(Box::new(self.status())),
            Request::Attach { file, nbd, core } => done_or(self.attach(file.as_ref(), &nbd, core)),
            Request::Handover { to, budget_ms } => {
                self.hand_over(to, Duration::from_millis(budget_ms)).map_or_else(failed, Answer::Handover)
            }
            Request::Suspend { lease_ms } => done_or(self.suspend(Duration::from_millis(lease_ms))),
            Request::Resume => done_or(self.resume()),
            Request::Synchronous { on } => done_or(self.set_synchronous(on)),
            Request::Dismiss { core } => done_or(self.dismiss(core)),
            Request::Detach { force } => return self.detach(force, peer, id),
        })
    }

    fn status(&self) -> InterfaceStatus {
        let state = self.custody.state();
        let armed = |slot| matches!(self.custody.slot_state(slot), SlotState::Armed);
        InterfaceStatus {
            version: self.identity.version.clone(),
            identity: Some(self.identity.clone()),
            segment_abi: Some(self.segment.header.abi.load(Relaxed)),
            pid: std::process::id(),
            gate: match state {
                State::Detached => GateState::Detached,
                State::Serving { .. } => GateState::Serving,
                State::Suspended { .. } => GateState::Suspended,
                State::Recovering => GateState::Recovering,
            },
            generation: self.custody.generation(),
            serving: match state {
                State::Serving { slot } | State::Suspended { slot: Some(slot), .. } => {
                    self.cores.get(slot).map(|core| core.pid)
                }
                _ => None,
            },
            cores: self.cores.iter().map(|(s, core)| cores::status(&self.segment, s, core, armed(s))).collect(),
            file: self.fronts.file.as_ref().map(FileFront::lent),
            nbd: self.fronts.nbd.as_ref().map_or_else(Vec::new, NbdFront::status),
            in_flight: cores::in_flight(&self.segment),
            waiting: self.fronts.waiting(),
            lease_ms: match state {
                State::Suspended { until_ns, .. } => Some(until_ns.saturating_sub(monotonic_ns()) / 1_000_000),
                _ => None,
            },
            crashes_survived: self.custody.crashes(),
            last_suspension: suspension::times(&self.segment),
            buffer: suspension::buffer_status(&self.segment, self.custody.serving_mode() == Mode::Synchronous),
            deaths: self.deaths.clone(),
            undrained: KeptNodes::undrained(&self.segment),
        }
    }

    fn set_synchronous(&mut self, on: bool) -> Result<(), String> {
        let act = self.custody.set_synchronous(on).map_err(refused)?;
        self.perform(act, ATTACH_LIMIT, None).map_or(Ok(()), Err)
    }

    fn attach(&mut self, file: Option<&FileAttach>, nbd: &[NbdListen], core: u32) -> Result<(), String> {
        if self.fronts.kinds() > 0 {
            return Err(refused(Refusal::Attached));
        }
        if file.is_none() && nbd.is_empty() {
            return Err("name a front end: a file, or a place for NBD clients".to_owned());
        }
        let slot = self.cores.slot_of(core).ok_or_else(|| refused(Refusal::NotArmed))?;
        if self.custody.slot_state(slot) != SlotState::Armed {
            return Err(refused(Refusal::NotArmed));
        }
        self.open_fronts(file, nbd).inspect_err(|_| self.close_fronts())?;
        self.fronts.lend_to_all(&mut self.cores);
        let others: Vec<_> = self.cores.iter().map(|(other, _)| other).filter(|other| *other != slot).collect();
        for other in others {
            // It is armed again once it has workers for the new front ends.
            self.custody.joined(other);
        }
        let failure = match self.custody.attach(slot) {
            Ok(act) => self.perform(act, ATTACH_LIMIT, None),
            Err(refusal) => Some(refused(refusal)),
        };
        // A core that was given the gate although its probe failed serves clients that are attached already. Here no
        // client is yet.
        if failure.is_none() && self.custody.serving() == Some(slot) {
            return Ok(());
        }
        self.close_fronts();
        self.custody.detached();
        let why = failure.unwrap_or_else(|| "it did not take the gate".to_owned());
        Err(format!("the core (process {core}) does not serve: {why}"))
    }

    fn open_fronts(&mut self, file: Option<&FileAttach>, nbd: &[NbdListen]) -> Result<(), String> {
        self.fronts.locks = NodeLocks::take(&self.nodes)?;
        if !nbd.is_empty() {
            self.fronts.nbd = Some(NbdFront::listen(nbd)?);
        }
        if let Some(attach) = file {
            let front = FileFront::mount(attach, &self.segment, nbd.is_empty());
            self.fronts.file = Some(front.map_err(|e| format!("cannot mount on {}: {e}", attach.path.display()))?);
        }
        Ok(())
    }

    fn close_fronts(&mut self) {
        if let Some(mut nbd) = self.fronts.nbd.take() {
            nbd.close();
        }
        if let Some(Err(e)) = self.fronts.file.take().map(|front| front.unmount()) {
            tracing::error!("a mount that could not be served stays behind: {e}");
        }
        self.fronts.locks = NodeLocks::default();
    }

    /// Suspend, switch, probe, resume. At the end a core serves: the successor, or else the predecessor.
    fn hand_over(&mut self, to: u32, budget: Duration) -> Result<HandoverReport, String> {
        if budget.is_zero() || budget > LEASE_DEFAULT {
            return Err(format!("a pause budget of {budget:?}: give one of at most {LEASE_DEFAULT:?}"));
        }
        let slot = self.cores.slot_of(to).ok_or_else(|| refused(Refusal::NotArmed))?;
        let closed = self.custody.may_hand_over(slot).map_err(refused)?;
        let start = monotonic_ns();
        let mut failure = None;
        match suspension::close_and_drain(&self.segment, &self.cores, closed, Until::In, budget) {
            Err(why) => {
                suspension::reopen(&self.segment, closed.with(self.custody.serving_mode()));
                failure = Some(HandoverFailure { switched: false, reason: not_drained(why) });
            }
            Ok(()) => {
                let left = budget.saturating_sub(Duration::from_nanos(monotonic_ns() - start));
                let act = self.custody.hand_over(slot);
                if let Some(reason) = self.perform(act, left, Some(closed.slot)) {
                    failure = Some(HandoverFailure { switched: true, reason });
                } else if self.segment.gate.held.load(Relaxed) > 0 {
                    suspension::await_first_request(&self.segment, FIRST_REQUEST_LIMIT);
                }
            }
        }
        Ok(HandoverReport {
            failure,
            generation: self.custody.generation(),
            suspension: suspension::times(&self.segment),
            probe_blocks: self.segment.gate.probe_blocks.load(Relaxed),
            carried_bytes: self.segment.gate.adopted_bytes.load(Relaxed),
            adopted_us: suspension::adopted_us(&self.segment),
        })
    }

    fn suspend(&mut self, lease: Duration) -> Result<(), String> {
        if lease.is_zero() || lease > LEASE_MAX {
            return Err(format!("a lease of {lease:?}: give one of at most {LEASE_MAX:?}"));
        }
        let lease_ns = u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX);
        let until = monotonic_ns().saturating_add(lease_ns);
        let act = self.custody.suspend(until).map_err(refused)?;
        if let Act::Close(word) = act {
            if let Err(why) = suspension::close_and_drain(&self.segment, &self.cores, word, Until::Still, DRAIN_LIMIT) {
                self.resume()?;
                return Err(not_drained(why));
            }
            let held = self.fronts.waiting();
            self.segment.gate.held.store(held.unwrap_or_else(|| suspension::holding(&self.segment)), Relaxed);
        }
        self.segment.gate.lease_until_ns.store(until, Relaxed);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), String> {
        let act = self.custody.resume().map_err(refused)?;
        self.perform(act, ATTACH_LIMIT, None).map_or(Ok(()), Err)
    }

    fn dismiss(&mut self, pid: u32) -> Result<(), String> {
        let slot = self.cores.slot_of(pid).ok_or_else(|| format!("no core has process id {pid}"))?;
        let holds = match self.custody.state() {
            State::Serving { slot } | State::Suspended { slot: Some(slot), .. } => Some(slot),
            _ => None,
        };
        if holds == Some(slot) {
            return Err(refused(Refusal::HasGate));
        }
        self.custody.joined(slot);
        let core = self.cores.get_mut(slot).ok_or_else(|| refused(Refusal::NotArmed))?;
        core.tell(FromInterface::Quit, &[]).map_err(|e| e.to_string())
    }

    /// Unmounts on a thread of its own: the kernel may write mapped pages back first, and a core must serve that.
    fn detach(&mut self, force: bool, peer: &Peer, id: u64) -> Option<Answer> {
        if matches!(self.custody.state(), State::Suspended { .. } | State::Recovering) && !force {
            return Some(failed("I/O is suspended or recovering: resume it first, or force the detach"));
        }
        let clients = self.fronts.nbd.as_ref().map_or(0, |nbd| nbd.connections().len());
        if clients > 0 && !force {
            let reason = match clients {
                1 => "an NBD client is connected".to_owned(),
                n => format!("{n} NBD clients are connected"),
            };
            return Some(Answer::Failed { reason, busy: true });
        }
        let Some(front) = &self.fronts.file else {
            self.end();
            return Some(Answer::Done);
        };
        self.unmounting = Some(Unmounting::begin(front.mount_now(), force, peer.number, id));
        None
    }
}
