//! The core's relation to the interface: joining, taking what is lent, giving it back, leaving.

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{Arc, OnceLock, atomic::Ordering::Acquire},
    thread,
    time::{Duration, Instant},
};

use everdisk_engine::{Engine, WriteBack};
use everdisk_proto::{
    frame::{FromInterface, LentConnection, LentFile, NbdListen, ToInterface},
    gate_word::GateWord,
    identity::Identity,
    ids::Slot,
    limits::{FRAME_FDS_MAX, PEER_DEADLINE},
    volume::{NodeUrl, VolumeSpec},
};
use everdisk_sys::{
    link::{Link, LinkError},
    memory::SharedSegment,
    robust::{self, Entered},
};

use crate::{Fatal, disk::VolumeDisk, gate::CoreGate, keeper::Keepers, workers::Workers};

pub(crate) type InterfaceLink = Link<ToInterface, FromInterface>;

/// When a core starts, the interface is there already, or comes within this time.
const JOIN_LIMIT: Duration = Duration::from_secs(10);
/// Interval between two attempts to connect to a new interface.
const RECONNECT: Duration = Duration::from_millis(10);
/// A core that does not have the gate and finds no interface for this long has been orphaned, and ends.
const ORPHAN_LIMIT: Duration = Duration::from_secs(600);
/// The last flush before a core ends gives up when nothing was sent for this long. The control module's limit is a
/// little longer.
const LAST_FLUSH_LIMIT: Duration = Duration::from_secs(25);
/// Poll interval for the workers' state.
const TICK: Duration = Duration::from_millis(200);

/// What the interface has lent.
struct Lent {
    slot: Slot,
    segment: Arc<SharedSegment>,
    file: Option<(LentFile, Vec<Arc<OwnedFd>>)>,
    /// The addresses and sockets on which NBD clients are accepted, by this interface or by the next one, for which
    /// this core keeps the sockets.
    nbd: Option<(Vec<NbdListen>, Vec<OwnedFd>)>,
    /// The locks of the storage nodes, in the order of the layout. They are kept for the volume through any single
    /// death.
    locks: Vec<OwnedFd>,
    /// Connections that wait for a worker, and what was lent with them.
    waiting: Vec<(LentConnection, [OwnedFd; 2])>,
    workers: Workers,
    keepers: Arc<Keepers>,
}

impl Lent {
    /// Starts workers for connections, while there are tickets for them. The remaining ones wait. A connection whose
    /// client has gone, but whose request hangs in a storage node, ends with that request.
    fn serve_waiting(&mut self) {
        while !self.waiting.is_empty() && self.workers.have_room() {
            let (connection, [socket, memory]) = self.waiting.remove(0);
            // The other connections are served nevertheless. When it is this core's turn, this connection waits for
            // another core.
            if let Err(error) = self.workers.add_connection(connection, socket, memory) {
                tracing::error!(connection = connection.number, %error, "an NBD connection cannot be served");
            }
        }
    }

    /// Kinds of front ends that were lent.
    fn fronts(&self) -> u8 {
        u8::from(self.file.is_some()) + u8::from(self.nbd.is_some())
    }

    /// Whether nothing is left to serve: the file was unmounted, and there is no other front end.
    fn has_ended(&self) -> bool {
        self.nbd.is_none() && self.workers.file_has_ended()
    }
}

enum Next {
    /// The connection ended: find a new interface.
    Reconnect,
    /// Leave.
    Quit,
}

/// Joins, and serves until the interface orders the core to leave.
pub(crate) fn serve(
    spec: &VolumeSpec,
    identity: &Identity,
    engine: &Arc<Engine>,
    socket: &Path,
    joined: &OnceLock<Arc<WriteBack>>,
) -> Result<(), Fatal> {
    let (mut link, mut lent, volume, _entered) = join(spec, identity, engine, socket)?;
    joined.set(Arc::clone(&volume)).expect("a core joins once");
    let sending = Arc::clone(&volume);
    let sender = robust::start("sender", move || sending.run_sender())?;
    let flushing = Arc::clone(&volume);
    let flusher = robust::start("flusher", move || flushing.run_flusher())?;
    loop {
        match attend(&link, &mut lent)? {
            Next::Quit => break,
            Next::Reconnect => {
                lent.keepers.interface_lost();
                match reconnect(identity, &mut lent, socket) {
                    Some(new) => link = new,
                    None => break,
                }
            }
        }
    }
    lent.workers.stop();
    // Unmounting may have written mapped pages back after the flush that preceded it. Where another process has
    // unmounted the file, there was no flush.
    if volume.serves() {
        last_flush(&volume)?;
    }
    volume.stop_tending();
    for thread in [sender, flusher] {
        thread.join().expect("a panic ends the process");
    }
    Ok(())
}

/// What is still buffered is lost when the last core ends, so this goes on for as long as something is sent.
fn last_flush(volume: &WriteBack) -> Result<(), Fatal> {
    loop {
        let before = volume.buffered_bytes();
        match volume.flush_within(LAST_FLUSH_LIMIT) {
            Ok(true) => return Ok(()),
            Ok(false) if volume.buffered_bytes() < before => {}
            Ok(false) => return Err(Fatal::LastFlush(format!("it took longer than {LAST_FLUSH_LIMIT:?}"))),
            Err(error) => return Err(Fatal::LastFlush(error.to_string())),
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it ends a map_err")]
fn refused(error: LinkError) -> Fatal {
    Fatal::Interface(error.to_string())
}

fn join(
    spec: &VolumeSpec,
    identity: &Identity,
    engine: &Arc<Engine>,
    socket: &Path,
) -> Result<(Arc<InterfaceLink>, Lent, Arc<WriteBack>, Entered), Fatal> {
    let deadline = Instant::now() + JOIN_LIMIT;
    let link = loop {
        match InterfaceLink::connect(socket) {
            Ok(link) => break Arc::new(link),
            Err(error) if Instant::now() > deadline => return Err(refused(error)),
            Err(_) => thread::sleep(RECONNECT),
        }
    };
    link.send(1, ToInterface::Hello { identity: identity.clone(), slot: None, keeps_locks: true }, &[])
        .map_err(refused)?;
    let (frame, mut fds) = link.recv_within(PEER_DEADLINE).map_err(refused)?;
    let (slot, fronts, keeps_nodes) = match frame.body {
        FromInterface::Welcome { slot, fronts, keeps_nodes } => (slot, fronts, keeps_nodes),
        FromInterface::Refused { reason } => return Err(Fatal::Interface(reason)),
        other => return Err(Fatal::Interface(format!("answered the introduction with {other:?}"))),
    };
    let fd = fds.pop().ok_or_else(|| Fatal::Interface("lent no segment".to_owned()))?;
    let segment = Arc::new(SharedSegment::adopt(fd)?);
    let (high, low) = spec.uuid.as_u64_pair();
    let uuid = [0, 1].map(|half: usize| segment.header.volume_uuid[half].load(Acquire));
    if uuid != [high, low] {
        return Err(Fatal::Interface("keeps another volume than this core's".to_owned()));
    }
    robust::join(&segment, slot);
    // Before a channel is lent to it.
    let entered = robust::enter();
    if !keeps_nodes && spec.nodes.iter().any(|node| matches!(node.url, NodeUrl::Nbd(_))) {
        return Err(Fatal::Interface(
            "is of a build that does not know of NBD storage nodes: detach the volume, and attach it again".to_owned(),
        ));
    }
    let keepers = Keepers::new(&segment, slot, &link);
    // Only now: the threads of their connections have words.
    engine.serve(|node| Some(keepers.of(node)))?;
    let gate = Box::new(CoreGate { segment: Arc::clone(&segment), slot });
    let volume = WriteBack::new(Arc::clone(engine), &segment, gate, spec.bypass, spec.timeouts)
        .ok_or_else(|| Fatal::Interface("keeps a write buffer of a version that this core does not know".to_owned()))?;
    let volume = Arc::new(volume);
    let disk =
        VolumeDisk { volume: Arc::clone(&volume), name: spec.name.to_string(), version: identity.version.clone() };
    let workers = Workers::new(&segment, slot, &Arc::new(disk))?;
    let mut lent =
        Lent { slot, segment, file: None, nbd: None, locks: Vec::new(), waiting: Vec::new(), workers, keepers };
    for _ in 0..fronts {
        let (frame, fds) = link.recv_within(PEER_DEADLINE).map_err(refused)?;
        if let Some(other) = take(&mut lent, frame.body, fds)? {
            return Err(Fatal::Interface(format!("lent {other:?} instead of a front end")));
        }
    }
    link.send(2, armed(&lent), &[]).map_err(refused)?;
    Ok((link, lent, volume, entered))
}

/// Takes what is lent. Returns any other frame.
fn take(lent: &mut Lent, frame: FromInterface, fds: Vec<OwnedFd>) -> Result<Option<FromInterface>, Fatal> {
    match frame {
        FromInterface::LendFile(file) => take_file(lent, file, fds)?,
        FromInterface::LendNbd { nbd } => {
            if lent.nbd.is_none() {
                lent.workers.add_guard()?;
            }
            lent.nbd = Some((nbd, fds));
        }
        FromInterface::LendConnection(connection) => {
            let Ok([socket, memory]) = <[OwnedFd; 2]>::try_from(fds) else {
                return Err(Fatal::Interface("lent a connection without its memory".to_owned()));
            };
            if lent.waiting.iter().all(|(other, _)| other.number != connection.number) {
                lent.waiting.push((connection, [socket, memory]));
            }
            lent.serve_waiting();
        }
        // Locks are lent once more to a core that comes back; they are the same.
        FromInterface::LendLocks { from, .. } => {
            lent.locks.truncate(usize::from(from));
            lent.locks.extend(fds);
        }
        other => return Ok(Some(other)),
    }
    Ok(None)
}

fn take_file(lent: &mut Lent, file: LentFile, fds: Vec<OwnedFd>) -> Result<(), Fatal> {
    for fd in &fds {
        if !is_fuse_device(fd.as_fd()) {
            return Err(Fatal::Interface("lent something else than /dev/fuse".to_owned()));
        }
    }
    if lent.file.is_some() && !lent.workers.file_has_ended() {
        // Lent twice: this core's message that it is armed crossed with the loan.
        return Ok(());
    }
    let channels: Vec<_> = fds.into_iter().map(Arc::new).collect();
    lent.workers.add_file(&channels)?;
    lent.file = Some((file, channels));
    Ok(())
}

/// /dev/fuse is the misc device (major 10) with minor number 229, Documentation/admin-guide/devices.txt.
fn is_fuse_device(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|s| (rustix::fs::major(s.st_rdev), rustix::fs::minor(s.st_rdev)) == (10, 229))
}

/// Executes the interface's frames until the connection or the core ends.
fn attend(link: &Arc<InterfaceLink>, lent: &mut Lent) -> Result<Next, Fatal> {
    loop {
        let (frame, fds) = match link.recv_within(TICK) {
            Ok(received) => received,
            Err(LinkError::Deadline(_)) => {
                lent.workers.sweep();
                lent.serve_waiting();
                if lent.has_ended() {
                    tracing::info!("the file was unmounted");
                    return Ok(Next::Quit);
                }
                continue;
            }
            Err(error) => {
                tracing::warn!(%error, "lost the interface");
                return Ok(Next::Reconnect);
            }
        };
        let is_front = matches!(frame.body, FromInterface::LendFile(_) | FromInterface::LendNbd { .. });
        let Some(body) = take(lent, frame.body, fds)? else {
            if is_front && link.send(frame.id, armed(lent), &[]).is_err() {
                return Ok(Next::Reconnect);
            }
            continue;
        };
        match body {
            FromInterface::Recall => {
                if give_back(link, lent).is_err() {
                    return Ok(Next::Reconnect);
                }
                // Once more: an interface that was being restored has not heard it before.
                lent.keepers.interface_found(link);
            }
            FromInterface::Quit => return Ok(Next::Quit),
            FromInterface::Refused { reason } => {
                tracing::warn!(reason, "the interface refuses this core");
                return Ok(Next::Reconnect);
            }
            _ => {
                tracing::warn!("the interface said what it may not say now");
            }
        }
    }
}

fn armed(lent: &Lent) -> ToInterface {
    ToInterface::Armed { fronts: lent.fronts() }
}

fn give_back(link: &InterfaceLink, lent: &Lent) -> Result<(), LinkError> {
    let mut fds = vec![lent.segment.as_fd()];
    let file = lent.file.as_ref().map(|(file, channels)| {
        fds.extend(channels.iter().map(|channel| channel.as_fd()));
        file.clone()
    });
    let nbd = lent.nbd.as_ref().map_or_else(Vec::new, |(nbd, sockets)| {
        fds.extend(sockets.iter().map(AsFd::as_fd));
        nbd.clone()
    });
    let connections = lent.workers.connections();
    let count = u32::try_from(connections.len() + lent.waiting.len()).expect("a connection takes a descriptor");
    let locks = u32::try_from(lent.locks.len()).expect("a volume has at most 64 nodes");
    link.send(3, ToInterface::Returned { file, nbd, connections: count, locks }, &fds)?;
    for some in lent.locks.chunks(FRAME_FDS_MAX) {
        let fds: Vec<_> = some.iter().map(AsFd::as_fd).collect();
        let locks = u8::try_from(fds.len()).expect("a frame has at most 16 descriptors");
        link.send(3, ToInterface::ReturnedLocks { locks }, &fds)?;
    }
    for connection in connections.iter().filter_map(|served| served.connection()) {
        let fds = [connection.socket(), connection.memory().as_fd()];
        link.send(3, ToInterface::ReturnedConnection(connection.lent), &fds)?;
    }
    for (connection, fds) in &lent.waiting {
        link.send(3, ToInterface::ReturnedConnection(*connection), &fds.each_ref().map(AsFd::as_fd))?;
    }
    link.send(4, armed(lent), &[])
}

/// Finds the interface that replaces the dead one, while the workers go on. `None`: the core is to end.
fn reconnect(identity: &Identity, lent: &mut Lent, socket: &Path) -> Option<Arc<InterfaceLink>> {
    let since = Instant::now();
    loop {
        thread::sleep(RECONNECT);
        if lent.has_ended() {
            return None;
        }
        lent.workers.sweep();
        lent.serve_waiting();
        let has_gate =
            GateWord::decode(lent.segment.gate.word.load(Acquire)).is_some_and(|gate| gate.slot == lent.slot);
        let removed = !has_gate && fs::symlink_metadata(socket).is_err() && lent.fronts() == 0;
        if removed || (!has_gate && since.elapsed() > ORPHAN_LIMIT) {
            return None;
        }
        let Ok(link) = InterfaceLink::connect(socket) else { continue };
        let hello = ToInterface::Hello { identity: identity.clone(), slot: Some(lent.slot), keeps_locks: true };
        if link.send(1, hello, &[]).is_ok() && link.send(2, armed(lent), &[]).is_ok() {
            let link = Arc::new(link);
            lent.keepers.interface_found(&link);
            return Some(link);
        }
    }
}
