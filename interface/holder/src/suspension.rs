//! The gate's mechanics: close and drain, give, take back, reopen. [`Custody`] decides which of them is due.
//!
//! [`Custody`]: everdisk_gate::custody::Custody

use std::{
    sync::atomic::{
        AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, SeqCst},
    },
    time::{Duration, Instant},
};

use everdisk_gate::ticket;
use everdisk_proto::{
    buffer::Fill,
    frame::{BufferStatus, Suspension},
    gate_word::{GateWord, Mode},
    ids::Slot,
    segment::{Segment, probe_verdict},
};
use everdisk_sys::{
    clock::monotonic_ns,
    memory::SharedSegment,
    signal,
    wake::{self, Who},
};

use crate::{
    cores::{Core, Cores, area, rouse},
    front::FileFront,
    fronts::Fronts,
};

/// Interval between two signals to a worker that is blocked in read(2): a signal that arrives just before the system
/// call is lost.
const EVICT_AGAIN: Duration = Duration::from_micros(150);
/// Before the kernel gives out anew, a core that should be parked already has this long to park.
const STRAGGLER_LIMIT: Duration = Duration::from_millis(20);
/// A core that takes over after a death has this long to read from its stores: no other core could serve in that time.
pub(crate) const TAKEOVER_LIMIT: Duration = Duration::from_secs(2);
/// Interval at which to check that the core that is waited for still lives.
const LIFE_LOOK: Duration = Duration::from_millis(2);

/// Why the gate could not be drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotDrained {
    /// Workers that were still executing a request.
    pub(crate) busy: usize,
    /// Workers that did not come out of read(2).
    pub(crate) reading: usize,
}

/// The failure in words, with what to do.
pub(crate) fn not_drained(why: NotDrained) -> String {
    format!(
        "the core did not finish its requests in time ({} executing, {} reading): a storage node may be slow, or the core \
         hangs (then kill it: another core takes over)",
        why.busy, why.reading
    )
}

/// The condition that a drain waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// No worker does anything that another core must not do as well.
    In,
    /// As `In`, and nothing is being written to a storage node either.
    Still,
}

/// Closes the gate and waits until no worker executes or reads (M10). On failure the gate stays closed: [`reopen`] it.
pub(crate) fn close_and_drain(
    segment: &Segment,
    cores: &Cores,
    closed: GateWord,
    until: Until,
    limit: Duration,
) -> Result<(), NotDrained> {
    let gate = &segment.gate;
    gate.closed_ns.store(monotonic_ns(), Relaxed);
    for later in [&gate.drained_ns, &gate.adopted_ns, &gate.opened_ns, &gate.first_request_ns] {
        later.store(0, Relaxed);
    }
    ticket::set(&gate.word, closed);
    if let Some(core) = cores.get(closed.slot) {
        drain(segment, closed.slot, core, until, limit)?;
    }
    gate.drained_ns.store(monotonic_ns(), Relaxed);
    Ok(())
}

/// Waits, under a closed gate, until no worker of a core executes or reads, or until the core is dead.
fn drain(segment: &Segment, slot: Slot, core: &Core, until: Until, limit: Duration) -> Result<(), NotDrained> {
    let start = Instant::now();
    let Some(area) = area(segment, slot) else { return Ok(()) };
    loop {
        let seen = segment.gate.drained.load(Acquire);
        let mut failure = NotDrained { busy: 0, reading: 0 };
        let done = |state: &AtomicU32| match until {
            Until::In => ticket::is_in(state),
            Until::Still => ticket::is_still(state),
        };
        for worker in area.tickets.iter().filter(|t| !done(&t.state)) {
            if ticket::may_be_reading(&worker.state) {
                signal::evict(core.pid, worker.tid.load(Relaxed));
                failure.reading += 1;
            } else {
                failure.busy += 1;
            }
        }
        // A background thread's write to a node is fenced. Its changes to the segment are not, so they are waited for.
        failure.busy += [&area.sender, &area.flusher].into_iter().filter(|state| !ticket::is_in(*state)).count();
        if failure.busy + failure.reading == 0 || core.is_gone() {
            return Ok(());
        }
        if start.elapsed() > limit {
            return Err(failure);
        }
        wake::sleep_while(&segment.gate.drained, seen, EVICT_AGAIN, Who::All);
    }
}

/// Makes the kernel give out anew what is unanswered. Only when no live core holds a ticket: otherwise two cores would
/// execute the same request, and the slower one would overwrite newer data. The gate must be closed; in a hand-over it
/// is drained already, and this only checks it.
fn give_out_anew(segment: &Segment, cores: &Cores, fronts: &Fronts) -> Result<(), NotDrained> {
    for (slot, core) in cores.iter() {
        drain(segment, slot, core, Until::In, STRAGGLER_LIMIT)?;
    }
    let gate = &segment.gate;
    gate.first_request_ns.store(0, Relaxed);
    gate.held.store(fronts.waiting().unwrap_or_else(|| holding(segment)), Relaxed);
    // NBD needs nothing of the kind: unanswered requests are in the connections' memory.
    fronts.file.as_ref().into_iter().for_each(FileFront::resend);
    Ok(())
}

/// The outcome of giving the gate to a core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Given {
    /// The gate is open for it.
    Opened,
    /// It did not open the gate; the gate is closed.
    Failed(&'static str),
    /// A core still executes what would have to be given out anew; the gate is closed.
    NotDrained(NotDrained),
}

/// Gives the gate to a core. Makes the kernel give out anew what is unanswered and wakes the core's first worker, which
/// probes the stores and opens the gate; waits for that (M4). The gate must be closed.
pub(crate) fn give(segment: &Segment, cores: &Cores, fronts: &Fronts, probe: GateWord, limit: Duration) -> Given {
    let Some(core) = cores.get(probe.slot) else { return Given::Failed("there is no such core") };
    if let Err(why) = give_out_anew(segment, cores, fronts) {
        return Given::NotDrained(why);
    }
    let gate = &segment.gate;
    let deadline = Instant::now() + limit;
    gate.probe.store(probe_verdict::PENDING, SeqCst);
    ticket::set(&gate.word, probe);
    // Its first worker probes. Where that one waits for a storage node, the first worker that checks the gate does.
    let first_waits = area(segment, probe.slot).is_some_and(|area| !ticket::is_parked(&area.tickets[0].state));
    rouse(segment, probe.slot, if first_waits { Who::All } else { Who::First });
    loop {
        match gate.probe.load(SeqCst) {
            probe_verdict::PASSED => return Given::Opened,
            probe_verdict::FAILED => match gate.word.load(SeqCst) {
                word if word == probe.with(Mode::Open).encode() => return Given::Opened,
                // Nobody has taken the gate from this core: the verdict is that of an earlier probe, and came late.
                word if word == probe.encode() => gate.probe.store(probe_verdict::PENDING, SeqCst),
                _ => return Given::Failed("the new core could not read its storage nodes"),
            },
            _ => {}
        }
        let died = core.is_gone();
        if died || Instant::now() >= deadline {
            let why = if died { "the new core died" } else { "the new core did not open the gate in time" };
            return if ticket::revoke_probe(&gate.word, probe) { Given::Failed(why) } else { verdict(segment) };
        }
        wake::sleep_while(&gate.probe, probe_verdict::PENDING, LIFE_LOOK, Who::All);
    }
}

/// Opens the gate for a core without a probe, after the kernel has given out anew what is unanswered.
pub(crate) fn grant(segment: &Segment, cores: &Cores, fronts: &Fronts, open: GateWord) -> Given {
    match give_out_anew(segment, cores, fronts) {
        Err(why) => Given::NotDrained(why),
        Ok(()) => {
            reopen(segment, open);
            Given::Opened
        }
    }
}

/// Whether a core could adopt the content of the write buffer: it knows the buffer's version, or the buffer is empty.
pub(crate) fn can_adopt(segment: &SharedSegment, cores: &Cores, slot: Slot) -> bool {
    let version = segment.header.buffer_version.load(Relaxed);
    fill(segment).is_empty || cores.get(slot).is_some_and(|core| core.identity.buffer.contains(version))
}

fn fill(segment: &SharedSegment) -> Fill {
    Fill::read(|index| segment.buffer_word(index).expect("every segment has a buffer's header").load(Acquire))
}

/// The state of the write buffer, if there is one or something of the volume is lost.
pub(crate) fn buffer_status(segment: &SharedSegment, synchronous: bool) -> Option<BufferStatus> {
    let capacity = segment.geometry().capacity;
    let Fill { bytes, lost_ranges, .. } = fill(segment);
    (capacity > 0 || lost_ranges > 0).then(|| BufferStatus {
        version: segment.header.buffer_version.load(Relaxed),
        capacity,
        buffered_bytes: bytes,
        damaged_ranges: lost_ranges,
        synchronous,
    })
}

/// The core changed the gate itself just before it was taken back.
fn verdict(segment: &Segment) -> Given {
    let open = GateWord::decode(segment.gate.word.load(Acquire)).is_some_and(GateWord::serves);
    if open { Given::Opened } else { Given::Failed("the new core could not read its storage nodes") }
}

/// Opens the gate. Under the generation that was closed, a core's workers execute what they keep unanswered.
pub(crate) fn reopen(segment: &Segment, open: GateWord) {
    segment.gate.opened_ns.store(monotonic_ns(), Relaxed);
    ticket::set(&segment.gate.word, open);
    rouse(segment, open.slot, Who::All);
}

/// Requests that workers keep unanswered.
pub(crate) fn holding(segment: &Segment) -> u64 {
    segment.cores.iter().flat_map(|core| &core.tickets).map(|t| u64::from(t.holding.load(Relaxed))).sum()
}

/// Waits, for a short while, until the first request after a suspension was executed. Only the report depends on it.
pub(crate) fn await_first_request(segment: &Segment, limit: Duration) {
    let deadline = Instant::now() + limit;
    while segment.gate.first_request_ns.load(Acquire) == 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// µs from the closing of the gate until the core that has it now had adopted the write buffer.
pub(crate) fn adopted_us(segment: &Segment) -> Option<u64> {
    let (closed, adopted) = (segment.gate.closed_ns.load(Relaxed), segment.gate.adopted_ns.load(Relaxed));
    (adopted > 0).then(|| adopted.saturating_sub(closed) / 1000)
}

/// The times of the last suspension.
pub(crate) fn times(segment: &Segment) -> Suspension {
    let gate = &segment.gate;
    let closed_ns = gate.closed_ns.load(Relaxed);
    let after = |time: &AtomicU64| match time.load(Relaxed) {
        0 => None,
        at => Some(at.saturating_sub(closed_ns) / 1000),
    };
    Suspension {
        closed_ns,
        drained_us: after(&gate.drained_ns),
        opened_us: after(&gate.opened_ns),
        first_request_us: after(&gate.first_request_ns),
        held: gate.held.load(Relaxed),
    }
}
