//! Frames on the interface's and the core's sockets (AF_UNIX, SOCK_SEQPACKET: one frame, one packet).
//!
//! A frame is a JSON object `{"abi":1,"id":7,"body":{…}}` of at most [`FRAME_BYTES_MAX`] bytes. File descriptors travel
//! beside it by SCM_RIGHTS and the body says how many and which; a frame whose manifest and descriptors differ is
//! refused and the descriptors are closed. Unknown fields are ignored, unknown kinds of body are refused.
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

/// What an interface answers that was started anew and has not been given the descriptors back yet.
pub const RESTORING: &str = "the interface is being restored";

/// The envelope of every frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame<B> {
    /// ABI version of the sender.
    pub abi: u32,
    /// Chosen by whoever asks; the answer bears the same.
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

/// Bodies: how many descriptors travel with each.
pub trait Body: Serialize + DeserializeOwned {
    /// Number of file descriptors that must accompany the frame.
    fn fds(&self) -> usize;
}

/// A packet that is no frame.
#[derive(Debug, thiserror::Error)]
pub enum BadFrame {
    /// Too long to be one.
    #[error("a frame of {0} bytes; the limit is {FRAME_BYTES_MAX}")]
    TooLong(usize),
    /// Not the JSON of a known body.
    #[error("not a frame: {0}")]
    Syntax(#[from] serde_json::Error),
    /// The manifest and the descriptors that came differ.
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

/// What a peer sends to the interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToInterface {
    /// A core introduces itself; the first frame of a core on every connection.
    Hello {
        /// Its program.
        identity: Identity,
        /// The slot it already has, when it served another interface process of this volume.
        slot: Option<Slot>,
        /// It keeps the locks of the storage nodes when they are lent to it. Cores of earlier builds do not know of them.
        #[serde(default, skip_serializing_if = "is_false")]
        keeps_locks: bool,
    },
    /// The core's stores are open, and it has workers parked behind each front end that was lent to it.
    Armed {
        /// How many front ends that are.
        fronts: u8,
    },
    /// The core gives back what it was lent: the segment, then the file front end's channels if it has one, then the
    /// sockets at which NBD clients are awaited.
    Returned {
        /// The file front end, when there is one; its channels follow the segment.
        file: Option<LentFile>,
        /// Where NBD clients are awaited.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        nbd: Vec<NbdListen>,
        /// So many `ReturnedConnection` follow.
        #[serde(default, skip_serializing_if = "is_zero")]
        connections: u32,
        /// So many locks of storage nodes follow, in `ReturnedLocks` before the connections.
        #[serde(default, skip_serializing_if = "is_zero")]
        locks: u32,
    },
    /// The core gives locks of storage nodes back, in the order of the layout.
    ReturnedLocks {
        /// So many descriptors come with it.
        locks: u8,
    },
    /// The core gives an NBD connection back: the socket, then its memory.
    ReturnedConnection(LentConnection),
    /// The control module asks; an [`FromInterface::Answer`] with the same id follows.
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

/// What the control module asks of the interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// How things stand.
    Status,
    /// Open these front ends, one at least, and let the core with this process id serve them.
    Attach {
        /// Mount the volume on a file.
        file: Option<FileAttach>,
        /// Await NBD clients there, at most [`LISTENERS_MAX`](crate::limits::LISTENERS_MAX).
        nbd: Vec<NbdListen>,
        /// Process id of an armed core.
        core: u32,
    },
    /// Suspend I/O, and when it is suspended give the gate to another core, have it probe its stores, and resume (M9,
    /// M10, M4). The four are one command because each round trip through the control module would lengthen the
    /// suspension by more than the whole of it takes.
    Handover {
        /// Process id of the successor, an armed core.
        to: u32,
        /// Time for drain and probe together, at most [`LEASE_DEFAULT`](crate::limits::LEASE_DEFAULT); when it is over the gate
        /// returns to the predecessor.
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
    /// next hand-over ends it.
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
        /// Although somebody has the file open or is connected.
        force: bool,
    },
}

/// The file front end as the operator wants it.
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
    /// Let users other than the one who attached it in, as far as `mode` permits.
    pub allow_other: bool,
    /// What the mount is to be called in the kernel's table of mounts: a name that no other mount has had or will have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The file that the control module found there or made: nothing else is mounted on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<FileId>,
}

/// A place at which NBD clients are awaited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdListen {
    /// The address; of a TCP port that the system chose, the one it chose.
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
    /// Its number, which no other connection of the volume has had or will have.
    pub number: u64,
    /// The index, among the places of the attach, of the one it came in at.
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

/// What the interface sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromInterface {
    /// To a core: you have this slot; the segment comes with it.
    Welcome {
        /// The slot.
        slot: Slot,
        /// Number of front ends that will be lent next; the core is armed when it has them all.
        fronts: u8,
    },
    /// To a core: serve this front end when the gate admits you; one fd for each channel comes with it.
    LendFile(LentFile),
    /// To a core: keep the sockets at which NBD clients are awaited, for an interface that is started anew.
    LendNbd {
        /// Where they listen, in the order of the descriptors.
        nbd: Vec<NbdListen>,
    },
    /// To a core: serve this connection when the gate admits you; the socket and its memory come with it.
    LendConnection(LentConnection),
    /// To a core that keeps them: the locks of the storage nodes, as long as which live nobody else may open them.
    LendLocks {
        /// The place in the layout of the first.
        from: u8,
        /// So many descriptors come with it.
        locks: u8,
    },
    /// To a core, by an interface that was started anew: give me the segment, the channels, sockets and connections back.
    Recall,
    /// To a core: end.
    Quit,
    /// To either: not you, and why. The connection is closed.
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
    /// To `Handover`: how it ended. Whatever the outcome, the gate is open on a core that serves.
    Handover(HandoverReport),
    /// Not done; nothing was changed.
    Failed {
        /// What is wrong and what to do.
        reason: String,
        /// A front end is in use (`Detach`).
        busy: bool,
    },
}

/// How an interface stands.
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
    /// What the gate does.
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
    /// Requests that the kernel has and nobody has answered, where it tells (executing, queued or suspended).
    pub waiting: Option<u64>,
    /// Milliseconds until the suspension in force ends by itself.
    pub lease_ms: Option<u64>,
    /// Deaths of a serving core that were survived.
    pub crashes_survived: u64,
    /// When the gate was last closed, CLOCK_MONOTONIC ns, and how long it took to the first request after; see
    /// [`HandoverReport`].
    pub last_suspension: Suspension,
    /// The write buffer, where the volume has one.
    #[serde(default)]
    pub buffer: Option<BufferStatus>,
    /// The last deaths of cores, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deaths: Vec<CoreDeath>,
}

/// How a place at which NBD clients are awaited stands. The counts are since the attach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdStatus {
    /// Where it is; of a TCP port that the system chose, the one it chose.
    pub address: NbdAddress,
    /// The UNIX socket that was made there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<FileId>,
    /// Clients that are connected.
    pub connections: u32,
    /// Connections that were taken.
    pub accepted: u64,
    /// Times that an established connection went on in another core.
    pub carried: u64,
    /// Connections that were closed because a core could not know where in their streams its predecessor had ended.
    pub broken: u64,
}

/// How the write buffer stands.
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

/// What the gate does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateState {
    /// No front end, or no core yet.
    Detached,
    /// Open.
    Serving,
    /// Closed by the operator.
    Suspended,
    /// Closed because the core died and no other could take over yet.
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

/// The end of a core that nobody had asked to leave.
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
    /// Process id of the core that got the gate after it; none when nobody did at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub successor: Option<u32>,
    /// µs from the notice of the death to the gate's opening for the successor.
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

/// How a hand-over ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverReport {
    /// None: the successor serves. Else the predecessor serves, and this is why.
    pub failure: Option<HandoverFailure>,
    /// Generation in force now.
    pub generation: Generation,
    /// The times.
    pub suspension: Suspension,
    /// Blocks the successor read in its probe.
    pub probe_blocks: u32,
    /// Bytes that were in the write buffer when the successor took it over.
    #[serde(default)]
    pub carried_bytes: u64,
    /// µs from the closing of the gate to the moment at which the successor had taken the write buffer over.
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

/// What the control module asks of a core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CoreRequest {
    /// Make everything acknowledged durable on every storage node (M8), or do as much of it as this time allows.
    Flush {
        /// An answer comes after this time at the latest, unless a storage node hangs.
        limit_ms: u64,
    },
    /// To a core that does not have the gate: take the write buffer in as far as it goes, checksums included, and stay close
    /// behind, for a hand-over is near.
    Follow,
    /// Read this many blocks spread over the volume, and every node's superblock, and say whether all could be read.
    Verify {
        /// Number of blocks.
        blocks: u32,
    },
    /// How the stores are.
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
    /// Whether a write to the node has ended well since this core was started.
    #[serde(default, skip_serializing_if = "is_false")]
    pub written: bool,
}

#[cfg(test)]
pub(crate) mod tests;
