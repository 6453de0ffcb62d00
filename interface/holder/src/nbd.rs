//! The NBD front ends: the sockets on which clients are accepted, and those of the clients. Nothing is read from or
//! written to a client here: the serving core does that.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use everdisk_proto::{
    connection::ended,
    frame::{LentConnection, NbdListen, NbdStatus},
    limits::{CONNECTIONS_MAX, LISTENERS_MAX},
    nbd::NbdAddress,
};
use everdisk_sys::{clock::monotonic_ns, connection::ConnectionMemory, process};
use rustix::{
    io::Errno as Os,
    net::{Shutdown, SocketFlags, sockopt},
};

use crate::listen;

/// Socket buffers: room for a full batch of requests or replies, so that neither side blocks half-way.
const SOCKET_BUFFER: usize = 1 << 20;
/// TCP keepalive: after a minute of silence, a probe every 10 s, up to six.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(10), 6);
/// Clients accepted in one turn of the loop, at most.
const ACCEPTED_AT_ONCE: usize = 16;
/// The pause after an accept that failed for lack of a resource. Clients wait in the listener's queue.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Descriptors that this process and a core need beside those of NBD connections: the segment, channels, listeners,
/// storage nodes, and peers that send requests.
const DESCRIPTORS: u64 = 192;
/// Descriptors of an NBD connection in a core: the socket, its memory, and the eventfds that wake its workers. An
/// interface has fewer.
const DESCRIPTORS_EACH: u64 = 4;
/// Poll interval for a connection whose client has gone, until a core has finished with it.
const LINGER_LOOK: Duration = Duration::from_millis(20);

/// An address at which clients are accepted.
#[derive(Debug)]
struct Listener {
    listen: NbdListen,
    socket: OwnedFd,
    accepted: u64,
    /// The total of connections that have ended.
    carried: u64,
    broken: u64,
}

/// A client's connection.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) lent: LentConnection,
    socket: OwnedFd,
    memory: ConnectionMemory,
    /// The client has gone, and no core has reported yet that it has finished with the connection: the time of the last
    /// check.
    lingers: Option<Instant>,
}

impl Held {
    /// What is lent to a core.
    pub(crate) fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.socket.as_fd(), self.memory.as_fd()]
    }

    /// Whether there is a request that no core has answered.
    fn waits(&self) -> bool {
        let unanswered = self.memory.received() > self.memory.parsed();
        unanswered || rustix::io::ioctl_fionread(&self.socket).is_ok_and(|bytes| bytes > 0)
    }
}

/// The NBD front ends of a volume.
#[derive(Debug)]
pub(crate) struct NbdFront {
    listeners: Vec<Listener>,
    connections: Vec<Held>,
    /// No client is accepted before this time, because a descriptor or memory was missing for the last one.
    paused_until: Option<Instant>,
    /// Closed for a moment to turn a client away when no other descriptor is free.
    spare: Option<OwnedFd>,
}

impl NbdFront {
    /// Begins to listen. On failure nothing is left.
    pub(crate) fn listen(places: &[NbdListen]) -> Result<Self, String> {
        if places.len() > LISTENERS_MAX {
            return Err(format!("{} places for NBD clients; at most {LISTENERS_MAX} are possible", places.len()));
        }
        let mut front = Self { listeners: Vec::new(), connections: Vec::new(), paused_until: None, spare: spare() };
        for place in places {
            match listen::listen(place) {
                Ok((listen, socket)) => {
                    front.listeners.push(Listener { listen, socket, accepted: 0, carried: 0, broken: 0 });
                }
                Err(e) => {
                    front.close();
                    return Err(format!("cannot listen at {}: {e}", place.address));
                }
            }
        }
        Ok(front)
    }

    /// Adopts the front ends whose sockets a core gave back.
    pub(crate) fn adopt(places: Vec<NbdListen>, sockets: Vec<OwnedFd>) -> Self {
        let pairs = places.into_iter().zip(sockets);
        let listeners = pairs.map(|(listen, socket)| Listener { listen, socket, accepted: 0, carried: 0, broken: 0 });
        Self { listeners: listeners.collect(), connections: Vec::new(), paused_until: None, spare: spare() }
    }

    /// Adopts a connection that a core gave back, unless it is known. Returns whether it was new.
    pub(crate) fn adopt_connection(&mut self, lent: LentConnection, socket: OwnedFd, memory: OwnedFd) -> bool {
        if self.connections.iter().any(|held| held.lent.number == lent.number) {
            return false;
        }
        match ConnectionMemory::adopt(memory) {
            Ok(memory) => {
                self.connections.push(Held { lent, socket, memory, lingers: None });
                true
            }
            Err(error) => {
                tracing::error!(connection = lent.number, %error, "a connection that was given back is closed");
                let _ = rustix::net::shutdown(&socket, Shutdown::Both);
                false
            }
        }
    }

    /// The addresses at which clients are accepted.
    pub(crate) fn places(&self) -> Vec<NbdListen> {
        self.listeners.iter().map(|listener| listener.listen.clone()).collect()
    }

    /// Their sockets.
    pub(crate) fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        self.listeners.iter().map(|listener| listener.socket.as_fd()).collect()
    }

    /// The connections.
    pub(crate) fn connections(&self) -> &[Held] {
        &self.connections
    }

    /// Number of connections with a request that no core has answered.
    pub(crate) fn waiting(&self) -> u64 {
        self.connections.iter().filter(|held| held.waits()).count() as u64
    }

    /// The descriptors of events for [`NbdFront::look_after`] and [`NbdFront::accept`]: sockets that become readable,
    /// and sockets of which only the hang-up matters.
    pub(crate) fn watched(&self) -> (Vec<BorrowedFd<'_>>, Vec<BorrowedFd<'_>>) {
        // A client that comes when there is no place waits in the listener's queue.
        let takes = self.connections.len() < CONNECTIONS_MAX && self.paused_until.is_none();
        let listening = if takes { self.sockets() } else { Vec::new() };
        let clients = self.connections.iter().filter(|held| held.lingers.is_none());
        (listening, clients.map(|held| held.socket.as_fd()).collect())
    }

    /// The longest time that the loop may wait.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let waits = self.paused_until.is_some() || self.connections.iter().any(|held| held.lingers.is_some());
        waits.then_some(LINGER_LOOK)
    }

    /// Closes connections that have ended.
    pub(crate) fn look_after(&mut self) {
        for held in &mut self.connections {
            let due = held.lingers.is_none_or(|since| since.elapsed() >= LINGER_LOOK);
            if due && !held.memory.has_ended() {
                held.lingers = has_hung_up(held.socket.as_fd()).then(Instant::now);
            }
        }
        let Self { listeners, connections, .. } = self;
        connections.retain(|held| {
            let ended = held.memory.has_ended();
            if let Some(listener) = listeners.get_mut(usize::from(held.lent.listener)).filter(|_| ended) {
                // A core writes this word, so the sum wraps.
                listener.carried = listener.carried.wrapping_add(held.memory.carried.load(Relaxed));
                listener.broken += u64::from(held.memory.ended.load(Relaxed) == ended::BROKEN);
            }
            !ended
        });
    }

    /// Accepts waiting clients. Returns the index of the first new connection.
    pub(crate) fn accept(&mut self) -> usize {
        let first = self.connections.len();
        if self.paused_until.is_some_and(|until| Instant::now() < until) {
            return first;
        }
        self.paused_until = None;
        let room = connections_room(process::descriptors());
        for (index, listener) in self.listeners.iter_mut().enumerate() {
            for _ in 0..ACCEPTED_AT_ONCE {
                if self.connections.len() >= CONNECTIONS_MAX {
                    return first;
                }
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let socket = match rustix::net::accept_with(&listener.socket, flags) {
                    Ok(socket) => socket,
                    Err(Os::AGAIN) => break,
                    Err(Os::INTR | Os::CONNABORTED) => continue,
                    Err(error) => {
                        // A client that waited in the queue would not know why. And the listener would go on reporting
                        // it.
                        let turned_away = matches!(error, Os::MFILE | Os::NFILE)
                            && self.spare.take().is_some()
                            && rustix::net::accept_with(&listener.socket, flags).is_ok();
                        self.spare = spare();
                        tracing::error!(
                            %error,
                            turned_away,
                            "no NBD client can be taken for the moment: raise the limit that the error names"
                        );
                        self.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
                        return first;
                    }
                };
                if self.connections.len() >= room {
                    tracing::error!(
                        connected = self.connections.len(),
                        "an NBD client is turned away: RLIMIT_NOFILE has no room for another one (LimitNOFILE=, ulimit -n)"
                    );
                    continue;
                }
                listener.accepted += 1;
                tune(socket.as_fd(), &listener.listen.address);
                match ConnectionMemory::create() {
                    // The clock's nanoseconds: the numbers of an earlier interface process are smaller.
                    Ok(memory) => {
                        let number = monotonic_ns();
                        let lent = LentConnection { number, listener: u8::try_from(index).unwrap_or(u8::MAX) };
                        self.connections.push(Held { lent, socket, memory, lingers: None });
                    }
                    Err(error) => tracing::error!(%error, "no memory for an NBD connection: it is closed"),
                }
            }
        }
        first
    }

    /// The part of `status` about NBD.
    pub(crate) fn status(&self) -> Vec<NbdStatus> {
        let of = |index: usize| self.connections.iter().filter(move |held| usize::from(held.lent.listener) == index);
        let status = |(index, listener): (usize, &Listener)| NbdStatus {
            address: listener.listen.address.clone(),
            bound: listener.listen.bound,
            connections: u32::try_from(of(index).count()).expect("at most CONNECTIONS_MAX"),
            accepted: listener.accepted,
            carried: of(index).map(|held| held.memory.carried.load(Relaxed)).fold(listener.carried, u64::wrapping_add),
            broken: listener.broken,
        };
        self.listeners.iter().enumerate().map(status).collect()
    }

    /// Ends every connection and stops listening.
    pub(crate) fn close(&mut self) {
        for held in self.connections.drain(..) {
            held.memory.ended.store(ended::IN_ORDER, Relaxed);
            let _ = rustix::net::shutdown(&held.socket, Shutdown::Both);
        }
        for listener in self.listeners.drain(..) {
            // Cores may keep the socket a little longer: no client is to be left in its queue.
            let _ = rustix::net::shutdown(&listener.socket, Shutdown::Both);
            listen::remove(&listener.listen);
        }
    }
}

fn spare() -> Option<OwnedFd> {
    rustix::fs::open("/dev/null", rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())
        .ok()
}

/// The number of NBD connections for which a core with this many descriptors has room.
fn connections_room(descriptors: Option<u64>) -> usize {
    let room = descriptors.map_or(u64::MAX, |limit| limit.saturating_sub(DESCRIPTORS) / DESCRIPTORS_EACH);
    usize::try_from(room).unwrap_or(usize::MAX)
}

/// Sets the socket options that matter. Where the system refuses one, the socket goes without.
fn tune(socket: BorrowedFd<'_>, address: &NbdAddress) {
    if sockopt::set_socket_send_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER);
    }
    if sockopt::set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER);
    }
    if matches!(address, NbdAddress::Tcp { .. }) {
        let (idle, interval, count) = KEEPALIVE;
        let _ = sockopt::set_tcp_nodelay(socket, true);
        let _ = sockopt::set_socket_keepalive(socket, true);
        let _ = sockopt::set_tcp_keepidle(socket, idle);
        let _ = sockopt::set_tcp_keepintvl(socket, interval);
        let _ = sockopt::set_tcp_keepcnt(socket, count);
    }
}

/// Whether nothing more can come or go at a socket.
fn has_hung_up(socket: BorrowedFd<'_>) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut poll = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
    rustix::event::poll(&mut poll, Some(&now)).is_ok_and(|n| n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usual_limit_has_room_for_every_connection_and_a_small_one_for_few() {
        assert!(connections_room(None) >= CONNECTIONS_MAX && connections_room(Some(1024)) >= CONNECTIONS_MAX);
        assert_eq!((connections_room(Some(200)), connections_room(Some(64))), (2, 0));
    }
}
