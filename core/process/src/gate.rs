//! The engine's gate and fence, implemented on the words in the segment.

use std::sync::{
    Arc,
    atomic::{
        AtomicU32,
        Ordering::{AcqRel, Acquire, Relaxed, SeqCst},
    },
};

use everdisk_engine::{Gate, Work};
use everdisk_gate::ticket::{self, Pass};
use everdisk_proto::{
    gate_word::GateWord,
    ids::{Generation, Slot},
    segment::CoreArea,
};
use everdisk_sys::{
    clock::monotonic_ns,
    memory::SharedSegment,
    wake::{self, Who},
};

/// A core's place at the gate.
pub(crate) struct CoreGate {
    pub(crate) segment: Arc<SharedSegment>,
    pub(crate) slot: Slot,
}

impl CoreGate {
    fn word(&self) -> Option<GateWord> {
        GateWord::decode(self.segment.gate.word.load(Acquire)).filter(|gate| gate.slot == self.slot)
    }

    fn area(&self) -> &CoreArea {
        &self.segment.cores[self.slot.index()]
    }

    fn ticket(&self, work: Work) -> &AtomicU32 {
        match work {
            Work::Sending => &self.area().sender,
            Work::Flushing => &self.area().flusher,
        }
    }
}

impl Gate for CoreGate {
    fn generation(&self) -> Option<u64> {
        self.word().map(|gate| gate.generation.0)
    }

    fn begin_sending(&self, generation: u64) -> bool {
        ticket::begin_sending(&self.segment.gate.word, &self.area().sender, self.slot, Generation(generation))
    }

    fn end_sending(&self) {
        ticket::park(&self.area().sender);
    }

    fn enter(&self, work: Work, generation: u64) -> bool {
        let gate = &self.segment.gate;
        let seen = gate.word.load(Acquire);
        let ours = GateWord::decode(seen)
            .is_some_and(|word| word.slot == self.slot && word.generation.0 == generation && word.serves());
        if !ours {
            return false;
        }
        let entered = ticket::enter(&gate.word, self.ticket(work), Pass::of(seen));
        if !entered {
            self.leave(work);
        }
        entered
    }

    fn leave(&self, work: Work) {
        ticket::park(self.ticket(work));
        // An interface that drains may wait for this.
        self.segment.gate.drained.fetch_add(1, SeqCst);
        if self.word().is_none_or(|word| !word.serves()) {
            wake::wake(&self.segment.gate.drained, Who::All);
        }
    }

    fn may_write(&self) -> bool {
        let others = Slot::all().filter(|slot| *slot != self.slot);
        let others = others.map(|slot| &self.segment.cores[slot.index()]);
        let tickets = others.flat_map(|core| core.tickets.iter().map(|ticket| &ticket.state).chain([&core.sender]));
        // In this order: the interface counts up before it frees a dead core's tickets.
        ticket::may_write(tickets) && self.segment.gate.undrained.load(SeqCst) == 0
    }

    fn lost_nodes(&self) -> u64 {
        self.segment.gate.lost_nodes.load(Acquire)
    }

    fn lost_nodes_reported(&self, nodes: u64) {
        self.segment.gate.lost_nodes.fetch_and(!nodes, AcqRel);
    }

    fn taken_over(&self, bytes: u64) {
        self.segment.gate.adopted_bytes.store(bytes, Relaxed);
        self.segment.gate.adopted_ns.store(monotonic_ns(), Relaxed);
    }
}
