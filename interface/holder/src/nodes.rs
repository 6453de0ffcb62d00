//! The cores' connections to NBD storage nodes. The interface keeps duplicates, so that it can read on when a core has died: no
//! other core writes to a node before every change of the dead one is answered ([`everdisk_drain`]).
//!
//! ```text
//!  a core connects ─► KeepNode: socket, in-flight table ─► kept ─┬─ the core says that nothing is in flight ─► closed
//!                                                               └─ the core dies ─► undrained += 1 ─► a thread drains it ─► undrained -= 1
//! ```

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::Ordering::{AcqRel, Acquire, SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use everdisk_drain::{Drain, Drained};
use everdisk_proto::{
    frame::NodeConnection,
    ids::Slot,
    limits::{NODE_CONNECTIONS_MAX, NODE_SETTLE, NODES_MAX},
};
use everdisk_sys::{in_flight::InFlight, memory::SharedSegment};

/// After this time nothing of a connection whose socket nobody has any more is expected to land.
const LOST_SETTLE: Duration = Duration::from_secs(30);

/// A connection that a core uses.
#[derive(Debug)]
struct Kept {
    socket: OwnedFd,
    table: OwnedFd,
}

/// The connections of all cores.
#[derive(Debug, Default)]
pub(crate) struct KeptNodes(HashMap<(Slot, u8, u64), Kept>);

impl KeptNodes {
    /// Takes a connection of the core in this slot. An interface that was started anew is told of the same ones again.
    pub(crate) fn keep(&mut self, slot: Slot, connection: NodeConnection, fds: Vec<OwnedFd>) {
        let [socket, table] =
            <[OwnedFd; 2]>::try_from(fds).expect("the manifest of a frame was checked: two come with it");
        if usize::from(connection.node) >= NODES_MAX {
            tracing::error!(%slot, node = connection.node, "a core names a storage node that no volume has: its connection is not kept");
            return;
        }
        if self.0.keys().filter(|(of, ..)| *of == slot).count() >= NODE_CONNECTIONS_MAX {
            tracing::error!(%slot, "a core has too many connections to storage nodes: the newest is not kept");
            return;
        }
        self.0.insert((slot, connection.node, connection.number), Kept { socket, table });
    }

    /// Nothing is in flight on it any more.
    pub(crate) fn drop(&mut self, slot: Slot, connection: NodeConnection) {
        self.0.remove(&(slot, connection.node, connection.number));
    }

    /// All threads of a core have ended: its connections are drained. Called before its tickets are freed. Returns how many there
    /// are.
    pub(crate) fn drain(&mut self, slot: Slot, segment: &Arc<SharedSegment>) -> u32 {
        let mut count = 0;
        for ((.., node, number), kept) in self.0.extract_if(|(of, ..), _| *of == slot) {
            count += 1;
            segment.gate.undrained.fetch_add(1, SeqCst);
            let shared = Arc::clone(segment);
            let body = move || {
                let is_broken = read_on(&kept, node, number);
                end(&shared, is_broken.then_some(node));
            };
            if let Err(error) = thread::Builder::new().name("drain".to_owned()).spawn(body) {
                tracing::error!(%error, node, "no thread can be started to drain a storage node: nothing is written to it until this volume's interface is started anew");
            }
        }
        count
    }

    /// An interface that was started anew: what its predecessor was draining is lost, and so are the connections of the cores
    /// that it finds dead.
    pub(crate) fn restore(connections: u32, segment: &Arc<SharedSegment>) {
        let before = segment.gate.undrained.load(SeqCst);
        Self::wait_for_lost(connections.saturating_add(before), segment);
        // Only now: it is not 0 in between.
        segment.gate.undrained.fetch_sub(before, SeqCst);
    }

    /// Connections of dead cores whose sockets nobody has any more: time is all there is to wait for.
    pub(crate) fn wait_for_lost(connections: u32, segment: &Arc<SharedSegment>) {
        if connections == 0 {
            return;
        }
        segment.gate.undrained.fetch_add(1, SeqCst);
        tracing::warn!(
            event = "fence_lost",
            connections,
            seconds = LOST_SETTLE.as_secs(),
            "a core and the interface have died: what the core had in flight at storage nodes is waited for by time"
        );
        let shared = Arc::clone(segment);
        let body = move || {
            thread::sleep(LOST_SETTLE);
            shared.gate.lost_nodes.fetch_or(u64::MAX, AcqRel);
            shared.gate.undrained.fetch_sub(1, SeqCst);
        };
        if let Err(error) = thread::Builder::new().name("drain".to_owned()).spawn(body) {
            tracing::error!(%error, "no thread can be started to wait for storage nodes: nothing is written to them until this volume's interface is started anew");
        }
    }

    /// Connections of dead cores that are not drained.
    pub(crate) fn undrained(segment: &SharedSegment) -> u32 {
        segment.gate.undrained.load(Acquire)
    }
}

/// A drain is over. `broken`: the node whose server may have lost what was not flushed.
fn end(segment: &SharedSegment, broken: Option<u8>) {
    if let Some(node) = broken {
        segment.gate.lost_nodes.fetch_or(1 << node, AcqRel);
    }
    segment.gate.undrained.fetch_sub(1, SeqCst);
}

/// Reads on until every change is answered. Returns whether the server has ended the connection.
fn read_on(kept: &Kept, node: u8, number: u64) -> bool {
    let begun = Instant::now();
    let adopted = kept.table.try_clone().and_then(InFlight::adopt).and_then(|table| Drain::new(&table));
    let mut drain = match adopted {
        Ok(drain) => drain,
        Err(error) => {
            tracing::error!(%error, node, connection = number, "what a dead core had in flight at a storage node cannot be read, and is waited for by time");
            thread::sleep(LOST_SETTLE);
            return true;
        }
    };
    let changes = drain.left();
    let ended = loop {
        match drain.step(kept.socket.as_fd()) {
            Ok(None) => {}
            Ok(Some(ended)) => break ended,
            Err(error) => {
                tracing::error!(%error, node, connection = number, "a connection to a storage node cannot be read");
                break Drained::Broken(drain.left());
            }
        }
    };
    let unanswered = match ended {
        Drained::Answered => 0,
        Drained::Broken(left) => left,
    };
    if unanswered > 0 {
        thread::sleep(NODE_SETTLE);
    }
    let lasted_ms = begun.elapsed().as_millis();
    if changes > 0 {
        tracing::info!(
            event = "fence_done",
            node,
            connection = number,
            changes,
            unanswered,
            lasted_ms,
            "what a dead core had in flight at a storage node has ended"
        );
    }
    ended != Drained::Answered
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const CONNECTION: NodeConnection = NodeConnection { node: 3, number: 1 };

    fn until(what: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !what() {
            assert!(Instant::now() < end, "it does not come about");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn connection() -> (UnixStream, InFlight, Vec<OwnedFd>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (table, _inbox) = InFlight::create().unwrap();
        let fds = vec![ours.into(), table.as_fd().try_clone_to_owned().unwrap()];
        (theirs, table, fds)
    }

    #[test]
    fn g_a_dead_cores_connection_holds_the_fence_up_until_its_change_is_answered() {
        let segment = Arc::new(SharedSegment::create(0).unwrap());
        let mut nodes = KeptNodes::default();
        let (mut server, table, fds) = connection();
        table.entries[5].end.store(0, SeqCst);
        table.entries[5].cookie.store(77, SeqCst);
        nodes.keep(Slot::FIRST, CONNECTION, fds);
        nodes.drain(Slot::FIRST, &segment);
        thread::sleep(Duration::from_millis(50));
        assert_eq!(KeptNodes::undrained(&segment), 1, "the change is not answered");
        let reply = [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &77_u64.to_be_bytes()].concat();
        std::io::Write::write_all(&mut server, &reply).unwrap();
        until(|| KeptNodes::undrained(&segment) == 0);
        assert_eq!(segment.gate.lost_nodes.load(SeqCst), 0);
    }

    #[test]
    fn g_a_server_that_has_gone_may_have_lost_what_was_not_flushed() {
        let segment = Arc::new(SharedSegment::create(0).unwrap());
        let mut nodes = KeptNodes::default();
        let (server, _table, fds) = connection();
        drop(server);
        nodes.keep(Slot::FIRST, CONNECTION, fds);
        nodes.drain(Slot::FIRST, &segment);
        until(|| KeptNodes::undrained(&segment) == 0);
        assert_eq!(segment.gate.lost_nodes.load(SeqCst), 1 << 3);
    }

    /// A core chooses the index. One that no volume has would be a bit that no node has.
    #[test]
    fn d15_a_connection_to_a_node_that_no_volume_has_is_not_kept() {
        let segment = Arc::new(SharedSegment::create(0).unwrap());
        let mut nodes = KeptNodes::default();
        let (_server, _table, fds) = connection();
        nodes.keep(Slot::FIRST, NodeConnection { node: 64, number: 1 }, fds);
        assert_eq!(nodes.drain(Slot::FIRST, &segment), 0);
    }

    #[test]
    fn g_a_connection_that_its_core_has_dropped_is_not_drained() {
        let segment = Arc::new(SharedSegment::create(0).unwrap());
        let mut nodes = KeptNodes::default();
        let (_server, table, fds) = connection();
        table.entries[0].cookie.store(1, SeqCst);
        nodes.keep(Slot::FIRST, CONNECTION, fds);
        nodes.drop(Slot::FIRST, CONNECTION);
        nodes.drain(Slot::FIRST, &segment);
        assert_eq!(KeptNodes::undrained(&segment), 0);
    }
}
