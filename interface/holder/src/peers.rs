//! Connections on the interface's socket that have not introduced themselves yet, or belong to the control module.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use everdisk_proto::frame::{FromInterface, ToInterface};
use everdisk_sys::{
    link::{LinkError, Received, wait_readable},
    packet,
};

use crate::cores::PeerLink;

/// Connections at once: a few cores, and the control module's.
const PEERS_MAX: usize = 64;

static NEXT_PEER: AtomicU64 = AtomicU64::new(1);

/// For this long nobody is taken after a connection that could not be: the listener goes on reporting it.
const PAUSE: Duration = Duration::from_millis(20);

/// Where peers connect.
#[derive(Debug)]
pub(crate) struct Door {
    listener: OwnedFd,
    paused_until: Option<Instant>,
    /// It was logged that connections cannot be taken.
    is_told: bool,
}

impl Door {
    /// With a socket that listens.
    pub(crate) fn new(listener: OwnedFd) -> Self {
        Self { listener, paused_until: None, is_told: false }
    }

    fn pause(&self) -> Option<Duration> {
        self.paused_until.map(|until| until.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
    }

    /// What becomes readable when a peer connects, and the longest time to wait for it.
    pub(crate) fn watched(&self) -> (Option<BorrowedFd<'_>>, Option<Duration>) {
        let pause = self.pause();
        (pause.is_none().then(|| self.listener.as_fd()), pause)
    }

    /// Waits for a peer. False when none has come within `limit`.
    pub(crate) fn wait(&self, limit: Duration) -> io::Result<bool> {
        match self.pause() {
            None => wait_readable(self.listener.as_fd(), limit),
            Some(left) => {
                std::thread::sleep(left.min(limit));
                Ok(false)
            }
        }
    }

    /// Takes a peer that waits.
    pub(crate) fn take(&mut self, peers: &mut Vec<Peer>) {
        make_room(peers);
        match accept_peer(self.listener.as_fd(), peers.len()) {
            Ok(peer) => {
                peers.extend(peer);
                (self.paused_until, self.is_told) = (None, false);
            }
            Err(error) => {
                if !self.is_told {
                    tracing::warn!(%error, "a connection could not be taken, which is tried again");
                }
                (self.paused_until, self.is_told) = (Some(Instant::now() + PAUSE), true);
            }
        }
    }
}

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
fn make_room(peers: &mut Vec<Peer>) {
    if peers.len() >= PEERS_MAX
        && let Some(silent) = peers.iter().position(|peer| !peer.is_control)
    {
        refuse(&peers.remove(silent), "too many connections");
    }
}

/// Accepts a waiting connection; `None` when its owner may not send us requests.
fn accept_peer(listener: BorrowedFd<'_>, connected: usize) -> io::Result<Option<Peer>> {
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

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;

    /// A listener that goes on reporting a connection which cannot be taken, as without a descriptor, keeps no loop turning.
    #[test]
    fn a_connection_that_cannot_be_taken_makes_a_pause() {
        // It is readable, and nothing can be accepted from it.
        let (listener, mut peer) = UnixStream::pair().unwrap();
        peer.write_all(b"x").unwrap();
        let mut door = Door::new(listener.into());
        let mut peers = Vec::new();
        assert!(door.wait(Duration::ZERO).unwrap() && door.watched().0.is_some());
        for _ in 0..2 {
            door.take(&mut peers);
            assert!(peers.is_empty() && door.is_told);
            let (listener, pause) = door.watched();
            assert!(listener.is_none() && pause.is_some_and(|pause| pause <= PAUSE));
            let began = Instant::now();
            assert!(!door.wait(PAUSE).unwrap());
            assert!(began.elapsed() >= PAUSE / 2);
        }
        std::thread::sleep(PAUSE);
        assert!(door.wait(Duration::ZERO).unwrap() && door.watched().0.is_some(), "then it is tried again");
    }
}
