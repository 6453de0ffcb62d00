//! The interface keeps this core's connections to NBD storage nodes beyond its death: they are announced to it, and announced again to one
//! that was started anew.

use std::{
    collections::BTreeMap,
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::Ordering::{AcqRel, SeqCst},
    },
};

use everdisk_proto::{
    frame::{NodeConnection, ToInterface},
    ids::Slot,
    segment::CoreArea,
};
use everdisk_store::Keeper;
use everdisk_sys::memory::SharedSegment;
use parking_lot::Mutex;

use crate::membership::InterfaceLink;

/// The connections that the interface keeps for this core.
pub(crate) struct Keepers {
    segment: Arc<SharedSegment>,
    slot: Slot,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The interface; `None` while there is none.
    interface: Option<Arc<InterfaceLink>>,
    /// Socket and in-flight table of each connection, by node and number.
    kept: BTreeMap<(u8, u64), [OwnedFd; 2]>,
}

impl Keepers {
    /// None are kept yet.
    pub(crate) fn new(segment: &Arc<SharedSegment>, slot: Slot, interface: &Arc<InterfaceLink>) -> Arc<Self> {
        let state = State { interface: Some(Arc::clone(interface)), ..State::default() };
        Arc::new(Self { segment: Arc::clone(segment), slot, state: Mutex::new(state) })
    }

    /// The keeper of the connections to one node.
    pub(crate) fn of(self: &Arc<Self>, node: u8) -> Arc<dyn Keeper> {
        Arc::new(OfNode { keepers: Arc::clone(self), node })
    }

    /// The interface has died.
    pub(crate) fn interface_lost(&self) {
        self.state.lock().interface = None;
    }

    /// Announces every connection to a new interface.
    pub(crate) fn interface_found(&self, interface: &Arc<InterfaceLink>) {
        let mut state = self.state.lock();
        for ((node, number), [socket, table]) in &state.kept {
            let announced = ToInterface::KeepNode(NodeConnection { node: *node, number: *number });
            if let Err(error) = interface.send(0, announced, &[socket.as_fd(), table.as_fd()]) {
                // It has gone again; the next one is told.
                tracing::warn!(%error, "the interface was not told of a connection to a storage node");
                return;
            }
        }
        state.interface = Some(Arc::clone(interface));
    }

    fn area(&self) -> &CoreArea {
        &self.segment.cores[self.slot.index()]
    }
}

/// The connections to one node.
struct OfNode {
    keepers: Arc<Keepers>,
    node: u8,
}

impl fmt::Debug for OfNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OfNode({})", self.node)
    }
}

impl Keeper for OfNode {
    fn keep(&self, number: u64, socket: BorrowedFd<'_>, table: BorrowedFd<'_>) -> io::Result<()> {
        let mut state = self.keepers.state.lock();
        let none = || io::Error::other("this volume's interface does not run at the moment");
        let interface = Arc::clone(state.interface.as_ref().ok_or_else(none)?);
        let fds = [socket.try_clone_to_owned()?, table.try_clone_to_owned()?];
        // Before it is announced: if the interface dies and this core after it, the next interface knows that there is something to
        // wait for.
        self.keepers.area().node_connections.fetch_add(1, SeqCst);
        let announced = ToInterface::KeepNode(NodeConnection { node: self.node, number });
        if let Err(error) = interface.send(0, announced, &[socket, table]) {
            self.keepers.area().node_connections.fetch_sub(1, AcqRel);
            return Err(io::Error::other(error));
        }
        state.kept.insert((self.node, number), fds);
        Ok(())
    }

    fn drop(&self, number: u64) {
        let mut state = self.keepers.state.lock();
        if state.kept.remove(&(self.node, number)).is_none() {
            return;
        }
        if let Some(interface) = &state.interface {
            // An interface that has died keeps nothing. One that does not read now keeps the connection until this core ends, and then
            // waits for the settle time.
            let _ = interface.send(0, ToInterface::DropNode(NodeConnection { node: self.node, number }), &[]);
        }
        self.keepers.area().node_connections.fetch_sub(1, AcqRel);
    }
}
