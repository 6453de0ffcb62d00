//! Recovery: takes charge of what a dead interface left behind. A core gives the segment and the channels back.

use std::{
    os::fd::OwnedFd,
    sync::atomic::Ordering::{Acquire, Relaxed},
    time::{Duration, Instant},
};

use everdisk_gate::{
    custody::{Custody, SlotState, State},
    ticket,
};
use everdisk_proto::{
    frame::{Answer, CoreDeath, FromInterface, RESTORING, ToInterface},
    gate_word::{GateWord, Mode},
    identity::{Component, Identity},
    ids::{Generation, Slot},
    limits::PEER_DEADLINE,
    segment::Segment,
    volume::VolumeSpec,
};
use everdisk_sys::{
    link::LinkError,
    memory::SharedSegment,
    process::{pidfd, start_time},
};

use crate::{
    args::Arguments,
    cores::{self, Core, PeerLink},
    deaths::Noticed,
    fatal::Fatal,
    front::FileFront,
    fronts::Fronts,
    holder::Holder,
    locks::NodeLocks,
    nbd::NbdFront,
    nodes::KeptNodes,
    peers::{Door, Peer, hear, refuse},
};

/// The cores try to connect to a new interface every few milliseconds.
const RESTORE_LIMIT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// For a hand-over that the dead interface had begun: the successor's probe ends within this time or is revoked.
const PROBE_LIMIT: Duration = Duration::from_secs(2);

struct Returned {
    segment: SharedSegment,
    fronts: Fronts,
}

/// A core that connects again.
struct Returning {
    peer: Peer,
    identity: Identity,
    slot: Slot,
    keeps_locks: bool,
}

/// Waits for a core that gives the descriptors back, and resumes the duties of the dead interface.
pub(crate) fn restore(
    mut door: Door,
    spec: &VolumeSpec,
    arguments: &Arguments,
    identity: &Identity,
) -> Result<Holder, Fatal> {
    let deadline = Instant::now() + RESTORE_LIMIT;
    let mut peers: Vec<Peer> = Vec::new();
    let mut returning: Vec<Returning> = Vec::new();
    while Instant::now() < deadline {
        if door.wait(POLL_INTERVAL)? {
            door.take(&mut peers);
        }
        for peer in std::mem::take(&mut peers) {
            match hear(&peer.link) {
                None => peers.push(peer),
                Some(Ok((frame, _))) => match frame.body {
                    ToInterface::Hello { identity: core, slot: Some(slot), keeps_locks } => {
                        // The layout of its segment may differ: it is not even mapped.
                        if !core.abi.overlaps(identity.abi) {
                            return Err(foreign(format!("ABI {}", core.abi), identity));
                        }
                        if peer.link.send(0, FromInterface::Recall, &[]).is_ok() {
                            returning.push(Returning { peer, identity: core, slot, keeps_locks });
                        }
                    }
                    ToInterface::Request(_) => {
                        let answer = Answer::Failed { reason: RESTORING.to_owned(), busy: false };
                        let _ = peer.link.send(frame.id, FromInterface::Answer(answer), &[]);
                        peers.push(peer);
                    }
                    _ => refuse(&peer, "this volume's interface is being restored: try again"),
                },
                Some(Err(_)) => {}
            }
        }
        for index in 0..returning.len() {
            let Some(core) = returning.get(index) else { break };
            if let Some(returned) = receive(&core.peer.link, spec, identity)? {
                return reinstate(door, spec, returned, peers, returning, arguments, identity);
            }
        }
    }
    Err(Fatal::NothingToRestore)
}

fn foreign(segment: String, identity: &Identity) -> Fatal {
    Fatal::ForeignSegment { segment, identity: identity.clone() }
}

/// Why a program with this identity cannot adopt a segment: the segment's formats in words. `None` when it can.
fn obstacle(segment: &Segment, identity: &Identity) -> Option<String> {
    let (abi, buffer) = (segment.header.abi.load(Relaxed), segment.header.buffer_version.load(Relaxed));
    let known = identity.abi.contains(abi) && identity.buffer.contains(buffer);
    (!known).then(|| format!("ABI {abi}, buffer {buffer}"))
}

/// What a core gives back, once it has connected and is of this volume.
fn receive(link: &PeerLink, spec: &VolumeSpec, identity: &Identity) -> Result<Option<Returned>, Fatal> {
    let (frame, mut fds) = match hear(link) {
        Some(Ok(received)) => received,
        None | Some(Err(LinkError::Closed)) => return Ok(None),
        Some(Err(error)) => {
            tracing::warn!(%error, "a core returned something else than descriptors");
            return Ok(None);
        }
    };
    let ToInterface::Returned { file, nbd, connections, locks } = frame.body else { return Ok(None) };
    let mut channels = fds.split_off(1);
    let sockets = channels.split_off(file.as_ref().map_or(0, |file| usize::from(file.channels)));
    let fd = fds.pop().expect("the manifest of a frame was checked: the segment comes with it");
    let segment = match SharedSegment::adopt(fd) {
        Ok(segment) => segment,
        Err(error) => {
            tracing::warn!(%error, "a core returned no segment");
            return Ok(None);
        }
    };
    let (high, low) = spec.uuid.as_u64_pair();
    let header = &segment.header;
    if [0, 1].map(|half: usize| header.volume_uuid[half].load(Relaxed)) != [high, low] {
        tracing::warn!("a core returned the segment of another volume");
        return Ok(None);
    }
    if let Some(segment) = obstacle(&segment, identity) {
        return Err(foreign(segment, identity));
    }
    let locks = receive_locks(link, usize::try_from(locks).expect("usize has 64 bits"));
    let mut front = (!nbd.is_empty()).then(|| NbdFront::adopt(nbd, sockets));
    for _ in 0..connections {
        // The core sends them right after this frame.
        let Ok((frame, fds)) = link.recv_within(PEER_DEADLINE) else {
            tracing::warn!("a core announced more connections than it returned");
            break;
        };
        if let (ToInterface::ReturnedConnection(lent), Ok([socket, memory]), Some(front)) =
            (frame.body, <[OwnedFd; 2]>::try_from(fds), &mut front)
        {
            front.adopt_connection(lent, socket, memory);
        }
    }
    let file = file.map(|file| FileFront::adopt(file, channels));
    Ok(Some(Returned { segment, fronts: Fronts { file, nbd: front, locks } }))
}

/// The locks of the storage nodes, which the core sends right after this frame.
fn receive_locks(link: &PeerLink, announced: usize) -> NodeLocks {
    let mut locks = Vec::new();
    while locks.len() < announced {
        match link.recv_within(PEER_DEADLINE) {
            Ok((frame, fds)) if matches!(frame.body, ToInterface::ReturnedLocks { locks } if locks > 0) => {
                locks.extend(fds);
            }
            _ => {
                tracing::error!(announced, came = locks.len(), "a core announced more locks than it returned");
                break;
            }
        }
    }
    NodeLocks::adopt(locks)
}

/// Cores of a build without locks gave none back: then the locks are taken now. If another process has them it goes on,
/// and so does the volume, which already serves.
fn complete_locks(holder: &mut Holder) {
    if holder.fronts.kinds() == 0 || holder.fronts.locks.len() > 0 {
        return;
    }
    match NodeLocks::take(&holder.nodes) {
        Ok(locks) => holder.fronts.locks = locks,
        Err(error) => tracing::error!(error, "the storage nodes are not locked: another may serve them too"),
    }
}

fn reinstate(
    door: Door,
    spec: &VolumeSpec,
    returned: Returned,
    peers: Vec<Peer>,
    returning: Vec<Returning>,
    arguments: &Arguments,
    identity: &Identity,
) -> Result<Holder, Fatal> {
    let segment = returned.segment;
    let custody = custody_of(&segment, returned.fronts.kinds() > 0);
    let mut holder = Holder::new(door, spec, segment, custody, arguments, identity)?;
    holder.fronts = returned.fronts;
    holder.is_restored = true;
    holder.peers = peers;
    let had_gate = match holder.custody.state() {
        State::Serving { slot } | State::Suspended { slot: Some(slot), .. } => Some(slot),
        _ => None,
    };
    let mut enrolled = Vec::new();
    for slot in Slot::all() {
        let pid = cores::area(&holder.segment, slot).map_or(0, |area| area.pid.load(Acquire));
        if pid != 0 {
            enrolled.push((slot, pid, living(&holder.segment, slot, pid)?));
        }
    }
    // Before the tickets of the dead ones are free.
    let dead = enrolled.iter().filter(|(.., handle)| handle.is_none());
    let lost = dead.map(|(slot, ..)| cores::node_connections(&holder.segment, *slot));
    KeptNodes::restore(lost.fold(0, u32::saturating_add), &holder.segment);
    let mut dead = None;
    // Live cores that have not connected again yet keep their slots; dead ones lose theirs.
    for (slot, pid, handle) in enrolled {
        let came = returning.iter().find(|core| core.slot == slot && core.peer.pid == pid);
        let identity = came.map_or_else(|| Identity::current(Component::Core), |core| core.identity.clone());
        let keeps_locks = came.is_some_and(|core| core.keeps_locks);
        match handle {
            Some(handle) => {
                holder.enter(slot, Core::new(pid, handle, identity, None, keeps_locks));
                if holder.custody.slot_state(slot) == SlotState::Vacant {
                    holder.custody.joined(slot);
                }
            }
            None => {
                dead = dead.or(Some(pid).filter(|_| had_gate == Some(slot)));
                cores::strike(&holder.segment, slot);
            }
        }
    }
    for Returning { peer, slot, .. } in returning {
        if let Some(core) = holder.cores.get_mut(slot).filter(|core| core.pid == peer.pid) {
            core.link = Some(peer.link);
        }
    }
    complete_locks(&mut holder);
    for core in holder.cores.all_mut().filter(|core| core.keeps_locks && core.link.is_some()) {
        // A core that does not read its socket loses its connection, and is lent them when it connects again.
        let _ = holder.fronts.locks.lend(core);
    }
    if let Some(slot) = had_gate.filter(|slot| holder.cores.get(*slot).is_none()) {
        let (noticed, generation) = (Instant::now(), holder.custody.generation());
        let act = holder.custody.died(slot);
        // For the next interface.
        holder.segment.gate.crashes.store(holder.custody.crashes(), Relaxed);
        holder.perform(act, PROBE_LIMIT, None);
        let successor = holder.custody.serving().and_then(|slot| holder.cores.get(slot)).map(|core| core.pid);
        holder.note_death(
            CoreDeath {
                pid: dead.unwrap_or(0),
                generation,
                served: true,
                killed: None,
                successor,
                recovered_us: successor.and_then(|_| u64::try_from(noticed.elapsed().as_micros()).ok()),
            },
            Noticed::Process,
        );
    }
    Ok(holder)
}

/// A handle of the core that the segment names, if it still lives. A process with another start time only has the same
/// id.
fn living(segment: &Segment, slot: Slot, pid: u32) -> std::io::Result<Option<OwnedFd>> {
    let handle = match pidfd(pid) {
        Ok(handle) => handle,
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => return Ok(None),
        // If a live core were taken for dead, two cores would execute the same requests.
        Err(e) => return Err(e),
    };
    let recorded = cores::area(segment, slot).map_or(0, |area| area.started.load(Relaxed));
    Ok(start_time(pid).is_ok_and(|started| started == recorded).then_some(handle))
}

/// Derives custody from the gate word. A gate that is neither open nor closed by the operator belongs to an interrupted
/// hand-over: no core has it, and the first core that reports itself armed gets it.
fn custody_of(segment: &Segment, attached: bool) -> Custody {
    let gate = &segment.gate;
    let crashes = gate.crashes.load(Relaxed);
    let mut word = GateWord::decode(gate.word.load(Acquire));
    let deadline = Instant::now() + PROBE_LIMIT;
    while let Some(probe) = word.filter(|w| w.mode == Mode::Probe) {
        if Instant::now() > deadline && ticket::revoke_probe(&gate.word, probe) {
            break;
        }
        std::thread::sleep(POLL_INTERVAL);
        word = GateWord::decode(gate.word.load(Acquire));
    }
    let word = word.filter(|word| word.generation.can_have_come());
    let until_ns = gate.lease_until_ns.load(Relaxed);
    let synchronous = word.is_some_and(|word| word.mode == Mode::Synchronous);
    let (state, generation) = match word {
        None => (State::Detached, Generation(0)),
        Some(word) if !attached => (State::Detached, word.generation),
        Some(word) if word.serves() => (State::Serving { slot: word.slot }, word.generation),
        Some(word) if until_ns > 0 => (State::Suspended { slot: Some(word.slot), until_ns }, word.generation),
        Some(word) => (State::Recovering, word.generation),
    };
    Custody::restore(state, generation, synchronous, crashes)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Release;

    use super::*;

    /// D13: a segment of N−1 is adopted. One of N−2 is not, nor one with a buffer that this program does not know.
    #[test]
    fn d13_a_segment_is_adopted_if_its_versions_are_in_range() {
        let segment = SharedSegment::create(0).unwrap();
        let range = |min, max| everdisk_proto::version::VersionRange { min, max };
        let named = |abi, buffer| {
            segment.header.abi.store(abi, Relaxed);
            segment.header.buffer_version.store(buffer, Relaxed);
            obstacle(
                &segment,
                &Identity { abi: range(5, 6), buffer: range(2, 3), ..Identity::current(Component::Interface) },
            )
        };
        assert_eq!((named(6, 3), named(5, 2)), (None, None));
        assert_eq!(named(4, 2).as_deref(), Some("ABI 4, buffer 2"));
        assert!(named(7, 2).is_some() && named(6, 1).is_some() && named(6, 4).is_some());
    }

    /// D15: cores write the gate word. One that is damaged is taken for none, also where only its generation is: the next
    /// generation has to fit into a word.
    #[test]
    fn d15_a_gate_word_whose_generation_cannot_be_is_taken_for_none() {
        let segment = SharedSegment::create(0).unwrap();
        let found = |generation| {
            let word = GateWord { mode: Mode::Open, slot: Slot::FIRST, generation };
            segment.gate.word.store(word.encode(), Release);
            let custody = custody_of(&segment, true);
            (custody.state(), custody.generation())
        };
        for generation in [Generation::MAX, Generation(Generation::MAX.0 - 1)] {
            assert_eq!(found(generation), (State::Detached, Generation(0)), "{generation}");
        }
        // A generation after which many more fit is kept: a core may be executing under it.
        for generation in [Generation(7), Generation(1 << 47)] {
            assert_eq!(found(generation), (State::Serving { slot: Slot::FIRST }, generation));
        }
    }

    /// A process that got the id of a dead core is not taken for that core: it is not waited for, nothing is lent to
    /// it, and the slot is free.
    #[test]
    fn d3_a_process_that_was_given_the_number_of_a_dead_core_is_not_that_core() {
        let segment = SharedSegment::create(0).unwrap();
        let (slot, pid) = (Slot::FIRST, std::process::id());
        cores::enrol(&segment, slot, pid);
        assert!(living(&segment, slot, pid).unwrap().is_some() && cores::is_of(&segment, slot, pid));
        let area = cores::area(&segment, slot).unwrap();
        area.started.store(start_time(pid).unwrap() - 1, Release);
        assert!(living(&segment, slot, pid).unwrap().is_none(), "a living process of another start is no core");
        assert!(!cores::is_of(&segment, slot, pid), "it may not come back as that core");
        assert!(living(&segment, slot, u32::MAX >> 1).unwrap().is_none(), "no process has that number");
        cores::enrol(&segment, slot, pid);
        assert!(!cores::is_of(&segment, slot, pid + 1));
    }
}
