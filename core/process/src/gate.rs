//! The gate and the fence as the engine sees them, by the words in the segment.

use std::sync::{
    Arc,
    atomic::Ordering::{Acquire, Relaxed},
};

use everdisk_engine::{Caller, Gate};
use everdisk_gate::ticket;
use everdisk_proto::{
    gate_word::GateWord,
    ids::{Generation, Slot},
};
use everdisk_sys::{clock::monotonic_ns, memory::SharedSegment};
use everdisk_transport::disk::Hold;

/// A core's place at the gate.
pub(crate) struct CoreGate {
    pub(crate) segment: Arc<SharedSegment>,
    pub(crate) slot: Slot,
}

impl CoreGate {
    fn word(&self) -> Option<GateWord> {
        GateWord::decode(self.segment.gate.word.load(Acquire)).filter(|gate| gate.slot == self.slot)
    }
}

impl Gate for CoreGate {
    fn generation(&self) -> Option<u64> {
        self.word().map(|gate| gate.generation.0)
    }

    fn begin_sending(&self, generation: u64) -> bool {
        let Some(core) = self.segment.cores.get(self.slot.index()) else { return false };
        ticket::begin_sending(&self.segment.gate.word, &core.sender, self.slot, Generation(generation))
    }

    fn end_sending(&self) {
        if let Some(core) = self.segment.cores.get(self.slot.index()) {
            ticket::park(&core.sender);
        }
    }

    fn may_write(&self) -> bool {
        let others = Slot::all().filter(|slot| *slot != self.slot);
        let others = others.filter_map(|slot| self.segment.cores.get(slot.index()));
        ticket::may_write(others.flat_map(|core| core.tickets.iter().map(|ticket| &ticket.state).chain([&core.sender])))
    }

    fn taken_over(&self, bytes: u64) {
        self.segment.gate.adopted_bytes.store(bytes, Relaxed);
        self.segment.gate.adopted_ns.store(monotonic_ns(), Relaxed);
    }
}

/// A request of a front end, as the engine sees it.
pub(crate) struct Request<'a>(pub(crate) &'a dyn Hold);

impl Caller for Request<'_> {
    fn synchronous(&self) -> bool {
        self.0.synchronous()
    }
    fn away(&self) {
        self.0.away();
    }
    fn writing(&self) {
        self.0.writing();
    }
    fn back(&self) -> bool {
        self.0.back()
    }
    fn waits(&self) {
        self.0.waits();
    }
}
