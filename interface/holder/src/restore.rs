//! Taking up what a dead interface left behind: a core gives the segment and the channels back.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::atomic::Ordering::{Acquire, Relaxed},
    time::{Duration, Instant},
};

use everdisk_gate::{
    custody::{Custody, Seat, State},
    ticket,
};
use everdisk_proto::{
    frame::{Answer, CoreDeath, FromInterface, RESTORING, ToInterface},
    gate_word::{GateWord, Mode},
    ids::{Generation, Slot},
    limits::PEER_DEADLINE,
    segment::Segment,
    version::ABI,
    volume::VolumeSpec,
};
use everdisk_sys::{
    link::{LinkError, wait_readable},
    memory::SharedSegment,
    process::{pidfd, start_time},
};

use crate::{
    args::Arguments,
    cores::{self, Core, PeerLink},
    front::FileFront,
    fronts::Fronts,
    holder::{Fatal, Holder, Peer, accept_peer, hear, make_room, refuse},
    nbd::NbdFront,
};

/// The cores look for a new interface every few milliseconds.
const RESTORE_LIMIT: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(2);
/// A hand-over that the dead interface had begun: the successor's probe ends within this time or is revoked.
const PROBE_LIMIT: Duration = Duration::from_secs(2);

struct Returned {
    segment: SharedSegment,
    fronts: Fronts,
}

/// Whether the core in `slot` has this process id by the segment.
pub(crate) fn is_of(segment: &Segment, slot: Slot, pid: u32) -> bool {
    cores::area(segment, slot).is_some_and(|area| area.pid.load(Acquire) == pid)
}

/// Waits for a core that returns the descriptors and takes up its duties.
pub(crate) fn restore(listener: OwnedFd, spec: &VolumeSpec, arguments: &Arguments) -> Result<Holder, Fatal> {
    let deadline = Instant::now() + RESTORE_LIMIT;
    let mut peers: Vec<Peer> = Vec::new();
    let mut returning: Vec<(Peer, everdisk_proto::version::CoreIdentity, Slot)> = Vec::new();
    while Instant::now() < deadline {
        if wait_readable(listener.as_fd(), LOOK)? {
            make_room(&mut peers);
            peers.extend(accept_peer(listener.as_fd(), peers.len()).ok().flatten());
        }
        for peer in std::mem::take(&mut peers) {
            match hear(&peer.link) {
                None => peers.push(peer),
                Some(Ok((frame, _))) => match frame.body {
                    ToInterface::Hello { identity, slot: Some(slot) } => {
                        if peer.link.send(0, FromInterface::Recall, &[]).is_ok() {
                            returning.push((peer, identity, slot));
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
            let Some((peer, _, _)) = returning.get(index) else { break };
            if let Some(returned) = receive(&peer.link, spec) {
                return take_up(listener, returned, peers, returning, arguments);
            }
        }
    }
    Err(Fatal::NothingToRestore)
}

/// What a core returns, when it has come and is this volume's.
fn receive(link: &PeerLink, spec: &VolumeSpec) -> Option<Returned> {
    let (frame, mut fds) = match hear(link)? {
        Ok(received) => received,
        Err(LinkError::Closed) => return None,
        Err(error) => {
            tracing::warn!(%error, "a core returned something else than descriptors");
            return None;
        }
    };
    let ToInterface::Returned { file, nbd, connections } = frame.body else { return None };
    let mut channels = fds.split_off(1);
    let sockets = channels.split_off(file.as_ref().map_or(0, |file| usize::from(file.channels)));
    let segment = SharedSegment::adopt(fds.pop()?).inspect_err(|e| tracing::warn!("a core returned {e}")).ok()?;
    let (high, low) = spec.uuid.as_u64_pair();
    let header = &segment.header;
    let ours = header.abi.load(Relaxed) == ABI
        && header.volume_uuid[0].load(Relaxed) == high
        && header.volume_uuid[1].load(Relaxed) == low;
    if !ours {
        tracing::warn!("a core returned the segment of another volume or ABI");
        return None;
    }
    let mut front = (!nbd.is_empty()).then(|| NbdFront::adopt(nbd, sockets));
    for _ in 0..connections {
        // The core sends them right behind.
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
    let file = file.map(|file| FileFront::adopt(file.path, channels));
    Some(Returned { segment, fronts: Fronts { file, nbd: front } })
}

fn take_up(
    listener: OwnedFd,
    returned: Returned,
    peers: Vec<Peer>,
    returning: Vec<(Peer, everdisk_proto::version::CoreIdentity, Slot)>,
    arguments: &Arguments,
) -> Result<Holder, Fatal> {
    let segment = returned.segment;
    let custody = custody_of(&segment, returned.fronts.kinds() > 0);
    let mut holder = Holder::new(listener, segment, custody, arguments);
    holder.fronts = returned.fronts;
    holder.peers = peers;
    let had_gate = match holder.custody.state() {
        State::Serving { slot } | State::Suspended { slot: Some(slot), .. } => Some(slot),
        _ => None,
    };
    let mut dead = None;
    // Cores that live and have not come back yet keep their slots; the dead lose theirs.
    for slot in Slot::all() {
        let pid = cores::area(&holder.segment, slot).map_or(0, |area| area.pid.load(Acquire));
        if pid == 0 {
            continue;
        }
        let came =
            returning.iter().find(|(peer, _, at)| *at == slot && peer.pid == pid).map(|(_, identity, _)| identity);
        let identity = came.cloned().unwrap_or_else(everdisk_proto::version::CoreIdentity::current);
        match living(&holder.segment, slot, pid)? {
            Some(handle) => {
                holder.cores.seat(slot, Core::new(pid, handle, identity, None));
                if holder.custody.seat(slot) == Seat::Vacant {
                    holder.custody.joined(slot);
                }
            }
            None => {
                dead = dead.or(Some(pid).filter(|_| had_gate == Some(slot)));
                cores::strike(&holder.segment, slot);
            }
        }
    }
    for (peer, _, slot) in returning {
        if let Some(core) = holder.cores.get_mut(slot).filter(|core| core.pid == peer.pid) {
            core.link = Some(peer.link);
        }
    }
    if let Some(slot) = had_gate.filter(|slot| holder.cores.get(*slot).is_none()) {
        let (noticed, generation) = (Instant::now(), holder.custody.generation());
        let act = holder.custody.died(slot);
        // For the next interface as well.
        holder.segment.gate.crashes.store(holder.custody.crashes(), Relaxed);
        holder.perform(act, PROBE_LIMIT, None);
        let successor = holder.custody.serving().and_then(|slot| holder.cores.get(slot)).map(|core| core.pid);
        holder.note_death(CoreDeath {
            pid: dead.unwrap_or(0),
            generation,
            served: true,
            killed: None,
            successor,
            recovered_us: successor.and_then(|_| u64::try_from(noticed.elapsed().as_micros()).ok()),
        });
    }
    Ok(holder)
}

/// A handle of the core that the segment names, if it still lives. A process that was started at another time only
/// bears its number.
fn living(segment: &Segment, slot: Slot, pid: u32) -> std::io::Result<Option<OwnedFd>> {
    let handle = match pidfd(pid) {
        Ok(handle) => handle,
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => return Ok(None),
        // To take a core for dead that lives would have two execute the same requests.
        Err(e) => return Err(e),
    };
    let recorded = cores::area(segment, slot).map_or(0, |area| area.started.load(Relaxed));
    Ok(start_time(pid).is_ok_and(|started| started == recorded).then_some(handle))
}

/// Custody by the gate word. A gate that is neither open nor closed by the operator belongs to an interrupted
/// hand-over: nobody has it, and the first core that reports itself armed gets it.
fn custody_of(segment: &Segment, attached: bool) -> Custody {
    let gate = &segment.gate;
    let crashes = gate.crashes.load(Relaxed);
    let mut word = GateWord::decode(gate.word.load(Acquire));
    let deadline = Instant::now() + PROBE_LIMIT;
    while let Some(probe) = word.filter(|w| w.mode == Mode::Probe) {
        if Instant::now() > deadline && ticket::revoke_probe(&gate.word, probe) {
            break;
        }
        std::thread::sleep(LOOK);
        word = GateWord::decode(gate.word.load(Acquire));
    }
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
