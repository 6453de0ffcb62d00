//! Frames on the interface's and the core's sockets (AF_UNIX, SOCK_SEQPACKET: one frame, one packet).
//!
//! A frame is a JSON object `{"abi":1,"id":7,"body":{…}}` of at most [`FRAME_BYTES_MAX`] bytes. File descriptors travel
//! beside it by SCM_RIGHTS, and the body is their manifest: how many, and which. A frame whose manifest and descriptors
//! differ is refused, and the descriptors are closed. Unknown fields are ignored, unknown kinds of body are refused.
//!
//! ```text
//!  interface.sock      control ─ Request ─► interface ─ Answer ─► control
//!                      core ─ Hello ─► interface ─ Welcome + segment, Lend… + fds ─► core ─ Armed ─► interface
//!                      interface (restarted) ─ Recall ─► core ─ Returned + segment + fds, ReturnedLocks…,
//!                                                        ReturnedConnection… ─► interface
//!  core-PID.sock       control ─ CoreRequest ─► core ─ CoreAnswer ─► control
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    file_id::FileId,
    identity::Identity,
    ids::{Generation, Slot},
    limits::{FRAME_BYTES_MAX, FRAME_FDS_MAX},
    nbd::NbdAddress,
    node::NodeState,
    version::ABI,
};

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_zero(n: &u32) -> bool {
    *n == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_false(flag: &bool) -> bool {
    !*flag
}

/// The answer of an interface that was started anew and has not been given the descriptors back yet.
pub const RESTORING: &str = "the interface is being restored";

/// The envelope of every frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame<B> {
    /// ABI version of the sender.
    pub abi: u32,
    /// Chosen by the peer that sends the request; the answer bears the same.
    pub id: u64,
    /// The message.
    pub body: B,
}

impl<B> Frame<B> {
    /// A frame of this build's ABI.
    pub const fn new(id: u64, body: B) -> Self {
        Self { abi: ABI, id, body }
    }
}

/// Bodies that know how many descriptors travel with them.
pub trait Body: Serialize + DeserializeOwned {
    /// Number of file descriptors that must accompany the frame.
    fn fds(&self) -> usize;
}

/// A packet that is not a valid frame.
#[derive(Debug, thiserror::Error)]
pub enum BadFrame {
    /// Too long for a frame.
    #[error("a frame of {0} bytes; the limit is {FRAME_BYTES_MAX}")]
    TooLong(usize),
    /// Not the JSON of a known body.
    #[error("not a frame: {0}")]
    Syntax(#[from] serde_json::Error),
    /// The manifest and the received descriptors differ.
    #[error("the frame announces {announced} file descriptors and {came} came")]
    Fds {
        /// In the manifest.
        announced: usize,
        /// In the packet.
        came: usize,
    },
}

/// The bytes of a frame.
///
/// # Errors
/// [`BadFrame::TooLong`] when the body does not fit.
pub fn encode<B: Body>(frame: &Frame<B>) -> Result<Vec<u8>, BadFrame> {
    let bytes = serde_json::to_vec(frame)?;
    if bytes.len() > FRAME_BYTES_MAX {
        return Err(BadFrame::TooLong(bytes.len()));
    }
    Ok(bytes)
}

/// Reads a frame that came with `fds` descriptors.
///
/// # Errors
/// [`BadFrame`]; the caller drops (closes) the descriptors.
pub fn decode<B: Body>(bytes: &[u8], fds: usize) -> Result<Frame<B>, BadFrame> {
    if bytes.len() > FRAME_BYTES_MAX {
        return Err(BadFrame::TooLong(bytes.len()));
    }
    let frame: Frame<B> = serde_json::from_slice(bytes)?;
    let announced = frame.body.fds();
    if announced != fds || fds > FRAME_FDS_MAX {
        return Err(BadFrame::Fds { announced, came: fds });
    }
    Ok(frame)
}

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
    /// A request of the control module. An [`FromInterface::Answer`] with the same id follows.
    Request(Request),
}

impl Body for ToInterface {
    fn fds(&self) -> usize {
        match self {
            Self::Returned { file, nbd, .. } => 1 + file.as_ref().map_or(0, |f| usize::from(f.channels)) + nbd.len(),
            Self::ReturnedConnection(_) => 2,
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

/// The status of an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    /// Version of the interface program.
    pub version: String,
    /// Its program. None: it has ABI 3 or before, and its ABI is that of its segment. Since ABI 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
    /// ABI of the segment, which a core must be able to serve. Since ABI 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segment_abi: Option<u32>,
    /// Its process id.
    pub pid: u32,
    /// The state of the gate.
    pub gate: GateState,
    /// Generation in force.
    pub generation: Generation,
    /// Process id of the core that has the gate, if it lives.
    pub serving: Option<u32>,
    /// Cores that have joined.
    pub cores: Vec<CoreStatus>,
    /// The file front end.
    pub file: Option<LentFile>,
    /// The NBD front ends.
    #[serde(default)]
    pub nbd: Vec<NbdStatus>,
    /// Requests being executed.
    pub in_flight: u32,
    /// Requests that the kernel has and no core has answered (executing, queued or suspended), where the kernel reports
    /// it.
    pub waiting: Option<u64>,
    /// Milliseconds until the suspension in force ends by itself.
    pub lease_ms: Option<u64>,
    /// Deaths of a serving core that were survived.
    pub crashes_survived: u64,
    /// When the gate was last closed, CLOCK_MONOTONIC ns, and the time until the first request afterwards; see
    /// [`HandoverReport`].
    pub last_suspension: Suspension,
    /// The write buffer, where the volume has one.
    #[serde(default)]
    pub buffer: Option<BufferStatus>,
    /// The last deaths of cores, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deaths: Vec<CoreDeath>,
}

/// The status of an address at which NBD clients are accepted. The counts are since the attach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdStatus {
    /// Its address; for a TCP port that the system chose, the one it chose.
    pub address: NbdAddress,
    /// The UNIX socket that was made there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<FileId>,
    /// Clients that are connected.
    pub connections: u32,
    /// Connections that were accepted.
    pub accepted: u64,
    /// Times that an established connection was continued by another core.
    pub carried: u64,
    /// Connections that were closed because a core could not find out where in their streams its predecessor had ended.
    pub broken: u64,
}

/// The status of the write buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BufferStatus {
    /// Its version, which a core must be able to adopt.
    pub version: u32,
    /// Bytes it holds at most.
    pub capacity: u64,
    /// Acknowledged bytes in it that are not on the storage nodes yet.
    pub buffered_bytes: u64,
    /// Ranges of the volume whose buffered data was found damaged and is lost until it is written anew.
    pub damaged_ranges: u32,
    /// Writes go through to the storage nodes now.
    pub synchronous: bool,
}

/// The state of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateState {
    /// No front end, or no core yet.
    Detached,
    /// Open.
    Serving,
    /// Closed by the operator.
    Suspended,
    /// Closed because the core died and no other has been able to take over.
    Recovering,
}

/// A core as the interface sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreStatus {
    /// Process id.
    pub pid: u32,
    /// Its slot.
    pub slot: Slot,
    /// Its program.
    pub identity: Identity,
    /// Parked workers, open stores: it could take the gate.
    pub armed: bool,
    /// Requests it has executed.
    pub requests: u64,
    /// Requests it ended with EIO.
    pub io_errors: u64,
    /// Workers and senders of it whose write to a storage node has not ended.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub writing: u32,
}

/// The death of a core that had not been asked to leave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreDeath {
    /// Its process id.
    pub pid: u32,
    /// The generation in force until then.
    pub generation: Generation,
    /// It had the gate.
    pub served: bool,
    /// Why the interface killed it, when it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub killed: Option<String>,
    /// Process id of the core that got the gate after it; none when no core did at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub successor: Option<u32>,
    /// µs from noticing the death until the gate opened for the successor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovered_us: Option<u64>,
}

/// Times of a suspension, in µs after the gate was closed. None: not (yet) reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspension {
    /// CLOCK_MONOTONIC ns at which the gate was closed.
    pub closed_ns: u64,
    /// The last ticket was in.
    pub drained_us: Option<u64>,
    /// The gate opened.
    pub opened_us: Option<u64>,
    /// The first request was executed by the core that then had the gate. None while there was no request.
    pub first_request_us: Option<u64>,
    /// Requests that were held.
    pub held: u64,
}

/// The outcome of a hand-over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverReport {
    /// None: the successor serves. Else the predecessor serves, and this is the reason.
    pub failure: Option<HandoverFailure>,
    /// Generation in force now.
    pub generation: Generation,
    /// The times.
    pub suspension: Suspension,
    /// Blocks the successor read in its probe.
    pub probe_blocks: u32,
    /// Bytes that were in the write buffer when the successor adopted it.
    #[serde(default)]
    pub carried_bytes: u64,
    /// µs from the closing of the gate until the successor had adopted the write buffer.
    #[serde(default)]
    pub adopted_us: Option<u64>,
}

/// Why the gate went back to the predecessor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverFailure {
    /// Whether the switch had happened (then it was undone) or not (then nothing had changed).
    pub switched: bool,
    /// What went wrong.
    pub reason: String,
}

/// A request of the control module to a core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CoreRequest {
    /// Make everything acknowledged durable on every storage node (M8), or do as much of it as this time allows.
    Flush {
        /// The request times out after this, unless a storage node hangs.
        limit_ms: u64,
    },
    /// To a core that does not have the gate: follow the write buffer as far as it goes, checksums included, and stay
    /// close behind, because a hand-over is near.
    Follow,
    /// Read this many blocks spread over the volume, and every node's superblock, and report whether all could be read.
    Verify {
        /// Number of blocks.
        blocks: u32,
    },
    /// Report the state of the stores.
    Status,
}

impl Body for CoreRequest {
    fn fds(&self) -> usize {
        0
    }
}

/// A core's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CoreAnswer {
    /// Durable.
    Flushed,
    /// Not yet; ask again.
    Flushing {
        /// Bytes that are still buffered.
        buffered_bytes: u64,
    },
    /// To `Follow`.
    Following {
        /// Bytes of the write buffer that are known now.
        buffered_bytes: u64,
    },
    /// All could be read.
    Verified {
        /// Blocks read.
        blocks: u32,
    },
    /// The stores.
    Status {
        /// One for each node, in the order of the layout.
        nodes: Vec<NodeStatus>,
    },
    /// Not done.
    Failed {
        /// What is wrong.
        reason: String,
    },
}

impl Body for CoreAnswer {
    fn fds(&self) -> usize {
        0
    }
}

/// A storage node as the core sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its address.
    pub url: String,
    /// Its identity.
    pub uuid: uuid::Uuid,
    /// Its state.
    pub state: NodeState,
    /// The last error, in words.
    pub error: Option<String>,
    /// Whether a write to the node has succeeded since this core was started.
    #[serde(default, skip_serializing_if = "is_false")]
    pub written: bool,
}

#[cfg(test)]
pub(crate) mod tests;
