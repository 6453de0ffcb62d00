//! Between the interface, the cores and the control module: joining, lending, and the control module's requests.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Body, HandoverReport, InterfaceStatus, is_false, is_zero};
use crate::{file_id::FileId, identity::Identity, ids::Slot, nbd::NbdAddress};

/// The answer of an interface that was started anew and has not been given the descriptors back yet.
pub const RESTORING: &str = "the interface is being restored";

/// A frame to the interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToInterface {
    /// A core introduces itself; the first frame of a core on every connection.
    Hello {
        /// Its program.
        identity: Identity,
        /// The slot it already has, when it has served another interface process of this volume.
        slot: Option<Slot>,
        /// It keeps the locks of the storage nodes when they are lent to it. Cores of earlier builds do not know of them.
        #[serde(default, skip_serializing_if = "is_false")]
        keeps_locks: bool,
    },
    /// The core's stores are open, and it has workers parked behind each front end that was lent to it.
    Armed {
        /// The number of those front ends.
        fronts: u8,
    },
    /// The core gives back what it was lent: the segment, then the file front end's channels if it has one, then the
    /// sockets on which NBD clients are accepted.
    Returned {
        /// The file front end, when there is one; its channels follow the segment.
        file: Option<LentFile>,
        /// The addresses at which NBD clients are accepted.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        nbd: Vec<NbdListen>,
        /// Number of `ReturnedConnection` that follow.
        #[serde(default, skip_serializing_if = "is_zero")]
        connections: u32,
        /// Number of storage nodes' locks that follow, in `ReturnedLocks` before the connections.
        #[serde(default, skip_serializing_if = "is_zero")]
        locks: u32,
    },
    /// The core gives locks of storage nodes back, in the order of the layout.
    ReturnedLocks {
        /// Number of descriptors that come with it.
        locks: u8,
    },
    /// The core gives an NBD connection back: the socket, then its memory.
    ReturnedConnection(LentConnection),
    /// Keep a connection to an NBD storage node beyond this core's death: its socket, then its in-flight table
    /// ([`crate::in_flight`]). The core sends no change on it before this frame, and sends the frame again to an interface that was started
    /// anew.
    KeepNode(NodeConnection),
    /// Nothing is in flight any more on such a connection, and nothing will be.
    DropNode(NodeConnection),
    /// A request of the control module. An [`FromInterface::Answer`] with the same id follows.
    Request(Request),
}

impl Body for ToInterface {
    fn fds(&self) -> usize {
        match self {
            Self::Returned { file, nbd, .. } => 1 + file.as_ref().map_or(0, |f| usize::from(f.channels)) + nbd.len(),
            Self::ReturnedConnection(_) | Self::KeepNode(_) => 2,
            Self::ReturnedLocks { locks } => usize::from(*locks),
            _ => 0,
        }
    }
}

/// A request of the control module to the interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Report the status.
    Status,
    /// Open these front ends, one at least, and let the core with this process id serve them.
    Attach {
        /// Mount the volume on a file.
        file: Option<FileAttach>,
        /// Accept NBD clients at these addresses, at most [`LISTENERS_MAX`](crate::limits::LISTENERS_MAX).
        nbd: Vec<NbdListen>,
        /// Process id of an armed core.
        core: u32,
    },
    /// Suspend I/O; when it is suspended, give the gate to another core, have it probe its stores, and resume (M9, M10,
    /// M4). The four are one command, because each round trip through the control module would lengthen the suspension
    /// by more than the whole of it takes.
    Handover {
        /// Process id of the successor, an armed core.
        to: u32,
        /// Time for drain and probe together, at most [`LEASE_DEFAULT`](crate::limits::LEASE_DEFAULT). When it is over
        /// the gate returns to the predecessor.
        budget_ms: u64,
    },
    /// Close the gate until `Resume`, or until the lease ends (A).
    Suspend {
        /// The interface re-opens the gate after this time.
        lease_ms: u64,
    },
    /// Open the gate again for the core that had it.
    Resume,
    /// From now on writes go through to the storage nodes before they are acknowledged (M3), or are buffered again. The
    /// next hand-over ends the former.
    Synchronous {
        /// Whether they go through.
        on: bool,
    },
    /// Ask a core that does not have the gate to leave.
    Dismiss {
        /// Its process id.
        core: u32,
    },
    /// Unmount and give up the front ends. Refused while the file is in use or NBD clients are connected, unless forced.
    Detach {
        /// Even if the file is open or clients are connected.
        force: bool,
    },
}

/// The file front end as the operator requests it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileAttach {
    /// Absolute path of an existing regular file to mount on.
    pub path: PathBuf,
    /// Permission bits of the file.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Let users other than the owner in, as far as `mode` permits.
    pub allow_other: bool,
    /// The mount's name in the kernel's table of mounts. No other mount has ever had it or will have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The file that the control module found there or made: nothing is mounted on any other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<FileId>,
}

/// An address at which NBD clients are accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdListen {
    /// The address; for a TCP port that the system chose, the one it chose.
    pub address: NbdAddress,
    /// Permission bits of a UNIX socket.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// The UNIX socket that was made there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<FileId>,
}

/// An NBD connection: the socket and the memory of [`crate::connection`] travel with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LentConnection {
    /// Its number, which no other connection of the volume has ever had or will have.
    pub number: u64,
    /// The index, among the addresses of the attach, of the one at which it was accepted.
    pub listener: u8,
}

/// A connection of a core to an NBD storage node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeConnection {
    /// The index of the storage node in the layout.
    pub node: u8,
    /// The number of the connection among those of the core to this node.
    pub number: u64,
}

/// The file front end as a core gives it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LentFile {
    /// Where it is mounted.
    pub path: PathBuf,
    /// Number of channels (clones of the /dev/fuse fd, the first one the mount's own).
    pub channels: u8,
    /// [`FileAttach::source`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

/// A frame of the interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromInterface {
    /// To a core: it has this slot; the segment comes with it.
    Welcome {
        /// The slot.
        slot: Slot,
        /// Number of front ends that will be lent next; the core is armed when it has them all.
        fronts: u8,
        /// The interface keeps connections to NBD storage nodes. Interfaces of earlier builds do not know of them.
        #[serde(default, skip_serializing_if = "is_false")]
        keeps_nodes: bool,
    },
    /// To a core: serve this front end when the gate admits it; one fd for each channel comes with it.
    LendFile(LentFile),
    /// To a core: keep the sockets on which NBD clients are accepted, for an interface that is started anew.
    LendNbd {
        /// Their addresses, in the order of the descriptors.
        nbd: Vec<NbdListen>,
    },
    /// To a core: serve this connection when the gate admits it; the socket and its memory come with it.
    LendConnection(LentConnection),
    /// To a core that keeps them: the locks of the storage nodes. As long as it lives no other process may serve the
    /// nodes.
    LendLocks {
        /// The index in the layout of the first.
        from: u8,
        /// Number of descriptors that come with it.
        locks: u8,
    },
    /// To a core, from an interface that was started anew: return the segment, the channels, sockets and connections.
    Recall,
    /// To a core: end.
    Quit,
    /// To either: the peer is refused, with the reason. The connection is closed.
    Refused {
        /// What is wrong and what to do.
        reason: String,
    },
    /// To the control module.
    Answer(Answer),
}

impl Body for FromInterface {
    fn fds(&self) -> usize {
        match self {
            Self::Welcome { .. } => 1,
            Self::LendFile(file) => usize::from(file.channels),
            Self::LendNbd { nbd } => nbd.len(),
            Self::LendConnection(_) => 2,
            Self::LendLocks { locks, .. } => usize::from(*locks),
            _ => 0,
        }
    }
}

/// The interface's answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Done.
    Done,
    /// To `Status`.
    Status(Box<InterfaceStatus>),
    /// To `Handover`: its outcome. In any case, the gate is open on a core that serves.
    Handover(HandoverReport),
    /// Not done; nothing was changed.
    Failed {
        /// What is wrong and what to do.
        reason: String,
        /// A front end is in use (`Detach`).
        busy: bool,
    },
}
