//! What the interface says of a volume: its gate, its cores, its front ends and the last hand-over.

use serde::{Deserialize, Serialize};

use super::{LentFile, is_zero};
use crate::{
    file_id::FileId,
    identity::Identity,
    ids::{Generation, Slot},
    nbd::NbdAddress,
};

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
    /// Connections of dead cores to NBD storage nodes on which changes are still in flight. Until there are none, nothing
    /// is written to a storage node.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub undrained: u32,
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
