//! Connections on the interface's socket that have not introduced themselves yet, or belong to the control module.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use everdisk_proto::frame::{FromInterface, ToInterface};
use everdisk_sys::{
    link::{LinkError, Received},
    packet,
};

use crate::cores::PeerLink;

/// Connections at once: a few cores, and the control module's.
const PEERS_MAX: usize = 64;

static NEXT_PEER: AtomicU64 = AtomicU64::new(1);

/// A connection that is not (yet) a core's.
pub(crate) struct Peer {
    pub(crate) link: PeerLink,
    /// Distinguishes connections of one process.
    pub(crate) number: u64,
    pub(crate) pid: u32,
    pub(crate) since: Instant,
    pub(crate) is_control: bool,
}

/// The peer that has been silent for longest gives up its place to a newcomer: silent peers keep no newcomer out.
pub(crate) fn make_room(peers: &mut Vec<Peer>) {
    if peers.len() >= PEERS_MAX
        && let Some(silent) = peers.iter().position(|peer| !peer.is_control)
    {
        refuse(&peers.remove(silent), "too many connections");
    }
}

/// Accepts a waiting connection; `None` when its owner may not send us requests.
pub(crate) fn accept_peer(listener: BorrowedFd<'_>, connected: usize) -> io::Result<Option<Peer>> {
    let socket = packet::accept(listener)?;
    let who = packet::peer(socket.as_fd())?;
    let number = NEXT_PEER.fetch_add(1, Relaxed);
    let peer = Peer { link: PeerLink::new(socket), number, pid: who.pid, since: Instant::now(), is_control: false };
    let ours = rustix::process::geteuid().as_raw();
    if who.uid != 0 && who.uid != ours {
        tracing::warn!(uid = who.uid, pid = who.pid, "a stranger is turned away");
        refuse(&peer, "this volume belongs to another user");
        return Ok(None);
    }
    if connected >= PEERS_MAX {
        refuse(&peer, "too many connections");
        return Ok(None);
    }
    Ok(Some(peer))
}

pub(crate) fn refuse(peer: &Peer, reason: &str) {
    let _ = peer.link.send(0, FromInterface::Refused { reason: reason.to_owned() }, &[]);
}

/// The next frame of a link, if one is there.
pub(crate) fn hear(link: &PeerLink) -> Option<Result<Received<ToInterface>, LinkError>> {
    match link.recv_within(Duration::ZERO) {
        Err(LinkError::Deadline(_)) => None,
        other => Some(other),
    }
}
