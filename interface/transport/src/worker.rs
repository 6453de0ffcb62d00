//! A worker's part in the gate: parking, probing, and the statistics on its ticket. The same for every front end.

use std::{
    cell::Cell,
    sync::atomic::{
        AtomicBool,
        Ordering::{AcqRel, Acquire, Relaxed, SeqCst},
    },
    thread,
    time::Duration,
};

use everdisk_gate::{
    hold::Hold,
    ticket::{self, Admission, Pass},
};
use everdisk_proto::{
    gate_word::{GateWord, Mode},
    ids::Slot,
    segment::{CoreArea, FrontArea, GateArea, Segment, Ticket, probe_verdict, ticket_state},
};
use everdisk_sys::{
    clock::monotonic_ns,
    process::thread_id,
    schedule,
    wake::{self, Who},
};
use parking_lot::Mutex;

use crate::{channel::Lead, disk::Disk};

/// Interval at which a parked worker polls the gate without a wake.
const PARKED_POLL: Duration = Duration::from_secs(1);

/// Held from an answer that tells the users of the file of a failed flush until it is noted. A process is one core, and
/// a volume has one file.
static TELLING: Mutex<()> = Mutex::new(());

/// Other workers that are to probe begin within this time, or are held up.
const OTHERS_PROBE: Duration = Duration::from_millis(1);

/// One worker's access in the segment.
pub struct GateAccess<'a> {
    gate: &'a GateArea,
    front: &'a FrontArea,
    core: &'a CoreArea,
    ticket: &'a Ticket,
    slot: Slot,
    index: usize,
    who: Who,
    stop: &'a AtomicBool,
    /// The worker's thread has a short slice: from when it sleeps at the gate until it has answered a request.
    prompt: Cell<bool>,
}

impl<'a> GateAccess<'a> {
    /// Takes the ticket `index` of the core in `slot`. The ticket is PARKED.
    ///
    /// # Panics
    /// When a core has no ticket of that number.
    pub fn take(segment: &'a Segment, slot: Slot, index: usize, stop: &'a AtomicBool) -> Self {
        let core = &segment.cores[slot.index()];
        let ticket = &core.tickets[index];
        ticket.holding.store(0, Relaxed);
        ticket.tid.store(thread_id(), Relaxed);
        ticket::park(&ticket.state);
        Self {
            gate: &segment.gate,
            front: &segment.front,
            core,
            ticket,
            slot,
            index,
            who: if index == 0 { Who::First } else { Who::Others },
            stop,
            prompt: Cell::new(false),
        }
    }

    /// Index of the ticket.
    pub const fn index(&self) -> usize {
        self.index
    }

    /// Whether the core is to end.
    pub fn must_stop(&self) -> bool {
        self.stop.load(Acquire)
    }

    /// Sleeps until the gate admits this core; `None` when the core is to end.
    pub fn wait(&self, disk: &dyn Disk) -> Option<Pass> {
        loop {
            let seen = self.core.wake.load(Acquire);
            if self.must_stop() {
                return None;
            }
            match ticket::unpark(&self.gate.word, &self.ticket.state, self.slot) {
                Admission::Admitted(pass) => {
                    disk.adopt(pass.word().generation.0);
                    return Some(pass);
                }
                Admission::Probe(gate) if self.may_probe() => self.probe(gate, disk),
                Admission::Probe(_) | Admission::Shut => {
                    self.set_prompt(true);
                    wake::sleep_while(&self.core.wake, seen, PARKED_POLL, self.who);
                }
            }
        }
    }

    /// While the worker waits for the gate, requests may wait for it to wake: a dying core that unmaps its memory would
    /// keep the CPU from it (D14).
    fn set_prompt(&self, is_prompt: bool) {
        if self.prompt.replace(is_prompt) != is_prompt {
            schedule::set_prompt(is_prompt);
        }
    }

    /// Whether this worker may probe: it is the first worker, or that one waits for a storage node.
    fn may_probe(&self) -> bool {
        self.who == Who::First || !ticket::is_parked(&self.core.tickets[0].state)
    }

    /// Adopts what the predecessor left and reads from every store. When that succeeds, opens the gate for this core
    /// (M4: completion is determined).
    fn probe(&self, gate: GateWord, disk: &dyn Disk) {
        disk.adopt(gate.generation.0);
        let verdict = match disk.probe() {
            Ok(blocks) => {
                let now = monotonic_ns();
                if !ticket::open_after_probe(&self.gate.word, gate) {
                    return;
                }
                self.gate.opened_ns.store(now, Relaxed);
                self.gate.probe_blocks.store(blocks, Relaxed);
                self.core.wake.fetch_add(1, AcqRel);
                wake::wake(&self.core.wake, Who::Others);
                probe_verdict::PASSED
            }
            Err(errno) => {
                tracing::error!(errno = errno.0, "the stores cannot be read: the gate is not taken");
                if !ticket::revoke_probe(&self.gate.word, gate) {
                    return;
                }
                probe_verdict::FAILED
            }
        };
        self.gate.probe.store(verdict, SeqCst);
        wake::wake(&self.gate.probe, Who::All);
    }

    /// Whether to go on reading.
    pub fn may_read(&self, pass: Pass) -> bool {
        ticket::holds(&self.gate.word, pass)
    }

    /// A request was read: whether to execute it. If not, keep it and [`GateAccess::park`].
    #[must_use]
    pub fn enter(&self, pass: Pass) -> bool {
        ticket::enter(&self.gate.word, &self.ticket.state, pass)
    }

    /// Records the time of the first request of a generation: the end of the pause.
    pub fn note_first_request(&self) {
        if self.gate.first_request_ns.load(Relaxed) == 0 {
            // If the exchange fails, another worker was the first.
            let _ = self.gate.first_request_ns.compare_exchange(0, monotonic_ns(), AcqRel, Relaxed);
        }
    }

    /// The request is answered.
    pub fn leave(&self, read: u64, written: u64, io_error: bool) {
        let add = |counter: &std::sync::atomic::AtomicU64, n: u64| counter.store(counter.load(Relaxed) + n, Relaxed);
        add(&self.ticket.requests, 1);
        add(&self.ticket.read_bytes, read);
        add(&self.ticket.written_bytes, written);
        if io_error {
            self.ticket.io_errors.fetch_add(1, Relaxed);
        }
        ticket::leave(&self.ticket.state);
        self.set_prompt(false);
    }

    /// What was let in is not answered yet: it waits for the client. The worker asks to be let in again
    /// ([`GateAccess::enter`]).
    pub fn read_on(&self) {
        ticket::leave(&self.ticket.state);
    }

    /// Probes for a core that has no other worker to do so, until the core is to end. While `others` is true other
    /// workers probe, which then need not be woken again when the gate is open. This worker does so only where they are
    /// held up.
    pub fn stand_guard(&self, disk: &dyn Disk, others: impl Fn() -> bool) {
        loop {
            let seen = self.core.wake.load(Acquire);
            if self.must_stop() {
                return;
            }
            let others = others();
            if others {
                // The ticket is not PARKED, so the interface wakes all workers.
                ticket::away(&self.ticket.state);
            } else {
                ticket::park(&self.ticket.state);
            }
            let probe = GateWord::decode(self.gate.word.load(Acquire))
                .filter(|gate| gate.slot == self.slot && gate.mode == Mode::Probe);
            match probe {
                None => {
                    self.set_prompt(true);
                    wake::sleep_while(&self.core.wake, seen, PARKED_POLL, self.who);
                }
                Some(gate) => {
                    if others {
                        thread::sleep(OTHERS_PROBE);
                    }
                    if self.gate.word.load(Acquire) == gate.encode() {
                        self.probe(gate, disk);
                    }
                }
            }
        }
    }

    /// The right to carry out a request that was let in. `lead`: another worker may go on while it waits for a slow
    /// node. `told`: the number of failed flushes that the client was told of, where the request may have to report
    /// one.
    pub const fn hold<'s>(&'s self, pass: Pass, lead: Option<&'s Lead>, told: Option<u64>) -> SeatHold<'s, 'a> {
        SeatHold { access: self, pass, lead, told, tells: Cell::new(None) }
    }

    /// Flushes of the storage nodes that failed.
    pub fn flush_errors(&self) -> u64 {
        self.gate.flush_errors.load(Acquire)
    }

    /// The number of failed flushes that the users of the file were told of.
    pub fn file_told(&self) -> u64 {
        let told = || self.front.flush_errors_told.load(Acquire);
        if told() != self.flush_errors() {
            // Another worker may have answered and not noted it yet: the application that got that answer is not told again.
            drop(TELLING.lock());
        }
        told()
    }

    /// `answer` tells the users of the file of this number of failed flushes. It is noted after the answer: a death in between has them told
    /// again, and the other order would have them told by nobody.
    pub fn tell_file(&self, errors: u64, answer: impl FnOnce()) {
        let _telling = TELLING.lock();
        answer();
        self.front.flush_errors_told.fetch_max(errors, AcqRel);
    }

    /// Parks the ticket. `holding`: a request stays unanswered with this worker.
    pub fn park(&self, holding: bool) {
        if holding {
            self.ticket.suspended.fetch_add(1, Relaxed);
        }
        self.ticket.holding.store(u32::from(holding), Relaxed);
        ticket::park(&self.ticket.state);
        self.gate.drained.fetch_add(1, SeqCst);
        wake::wake(&self.gate.drained, Who::All);
    }

    /// The worker waits for the lead of its channel, not at the gate: another one probes.
    pub fn idle(&self) {
        ticket::away(&self.ticket.state);
    }

    /// The worker no longer holds anything.
    pub fn let_go(&self) {
        self.ticket.holding.store(0, Relaxed);
    }
}

/// A request that a worker carries out.
pub struct SeatHold<'s, 'a> {
    access: &'s GateAccess<'a>,
    pass: Pass,
    lead: Option<&'s Lead>,
    told: Option<u64>,
    tells: Cell<Option<u64>>,
}

impl SeatHold<'_, '_> {
    /// The number of failed flushes that the answer reports to the client; `None`: none that it was not told of before.
    pub const fn tells(&self) -> Option<u64> {
        self.tells.get()
    }

    /// Wakes an interface that drains: this ticket need not be waited for any longer.
    fn tell(&self) {
        if !self.access.may_read(self.pass) {
            self.access.gate.drained.fetch_add(1, SeqCst);
            wake::wake(&self.access.gate.drained, Who::All);
        }
    }
}

impl Hold for SeatHold<'_, '_> {
    fn synchronous(&self) -> bool {
        GateWord::decode(self.access.gate.word.load(Acquire)).is_none_or(|gate| gate.mode != Mode::Open)
    }

    fn away(&self) {
        ticket::away(&self.access.ticket.state);
        self.tell();
    }

    fn writing(&self) {
        ticket::writing(&self.access.ticket.state);
        self.tell();
    }

    fn back(&self) -> bool {
        self.access.enter(self.pass)
    }

    fn waits(&self) {
        if let Some(lead) = self.lead {
            lead.let_others(self.access.index());
        }
    }

    fn errors_told(&self) -> Option<u64> {
        self.told
    }

    fn tells_errors(&self, errors: u64) {
        self.tells.set(Some(errors));
    }
}

impl Drop for GateAccess<'_> {
    fn drop(&mut self) {
        self.ticket.state.store(ticket_state::FREE, SeqCst);
        self.gate.drained.fetch_add(1, SeqCst);
        wake::wake(&self.gate.drained, Who::All);
    }
}
