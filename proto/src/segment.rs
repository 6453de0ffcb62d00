//! The segment: the shared memory (memfd) that outlives every core and every interface (D4).
//!
//! Every field is an atomic, because several processes see it at once and any of them may die between two stores.
//! Offsets, never pointers. A zeroed segment means nothing: the magic is stored last.
//!
//! ```text
//! 0      header   magic, layout version, the volume's identity
//! 128    gate     the gate word, the lease, what the last hand-over took
//! 512    front    the file's owner, permissions and times
//! 1024   cores    CORES_MAX × 7.5 KiB: process id, wake word, sender, THREADS_MAX thread words, WORKERS_MAX tickets of 64 bytes
//! 64 KiB buffer   the write buffer, of no bytes where the volume has none ([`crate::buffer`])
//! ```
//!
//! Since ABI 2: the buffer and what reports on it, [`CoreArea::sender`], 32 tickets instead of 8. Since ABI 3: 96
//! tickets, for NBD connections. Since ABI 4: the buffer's header also where there is no buffer, [`CoreArea::flusher`],
//! flush errors and how many of them were reported to whom, [`CoreArea::threads`]. ABI 1 to 3 were never released.

use std::sync::atomic::{AtomicU32, AtomicU64};

use zerocopy::{FromBytes, KnownLayout};

use crate::limits::{CORES_MAX, THREADS_MAX, WORKERS_MAX};

/// `"EVDSEG\0\0"` little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"EVDSEG\0\0");
/// Bytes of a segment without a write buffer, and where the write buffer begins: whole pages.
pub const SEGMENT_BYTES: usize = size_of::<Segment>().next_multiple_of(4096);

/// The segment without the write buffer behind it.
#[derive(FromBytes, KnownLayout, Debug)]
#[repr(C)]
pub struct Segment {
    /// Identity; written once by the interface that made the segment.
    pub header: Header,
    /// The gate and the times of the last hand-over.
    pub gate: GateArea,
    /// The file front end.
    pub front: FrontArea,
    /// One area for each core that has joined.
    pub cores: [CoreArea; CORES_MAX],
}

/// The volume that this segment belongs to.
#[derive(FromBytes, KnownLayout, Debug)]
#[repr(C, align(128))]
pub struct Header {
    /// [`MAGIC`], stored last.
    pub magic: AtomicU64,
    /// The ABI version, [`crate::version::ABI`].
    pub abi: AtomicU32,
    /// Version of the write buffer, [`crate::version::BUFFER`]; 0 when there is none.
    pub buffer_version: AtomicU32,
    /// Volume UUID, high and low half.
    pub volume_uuid: [AtomicU64; 2],
    /// Volume size in bytes.
    pub volume_size: AtomicU64,
    /// Length of the whole segment in bytes.
    pub bytes: AtomicU64,
    /// Data bytes of the write buffer; 0 when there is none.
    pub buffer_capacity: AtomicU64,
}

/// The gate, on cache lines of its own: workers load `word` for every request.
#[derive(FromBytes, KnownLayout, Debug)]
#[repr(C, align(128))]
pub struct GateArea {
    /// The gate word, see [`crate::gate_word`].
    pub word: AtomicU64,
    _pad0: [AtomicU64; 15],
    /// When the suspension in force ends by itself, CLOCK_MONOTONIC in ns; 0 when there is none.
    pub lease_until_ns: AtomicU64,
    /// Counts tickets given back while the gate is closed: the futex the interface sleeps on while it drains.
    pub drained: AtomicU32,
    /// The successor's verdict on its probe, [`probe_verdict`]: the futex the interface sleeps on while it waits.
    pub probe: AtomicU32,
    /// CLOCK_MONOTONIC ns at which the gate was last closed.
    pub closed_ns: AtomicU64,
    /// … at which the last ticket was in.
    pub drained_ns: AtomicU64,
    /// … at which the probe succeeded and the gate opened.
    pub opened_ns: AtomicU64,
    /// … at which the first request of the generation in force was executed; 0 when none was yet.
    pub first_request_ns: AtomicU64,
    /// Requests that were held by the last suspension (as far as the kernel reports it).
    pub held: AtomicU64,
    /// Deaths of a serving core that were survived.
    pub crashes: AtomicU64,
    /// Blocks the successor read in its last probe.
    pub probe_blocks: AtomicU32,
    _pad1: AtomicU32,
    /// CLOCK_MONOTONIC ns at which the core that has the gate had adopted the write buffer; 0 when there is none.
    pub adopted_ns: AtomicU64,
    /// Bytes that were buffered at that time.
    pub adopted_bytes: AtomicU64,
    /// Flushes of the storage nodes that failed after something new had been written. Each front end and NBD connection
    /// reports each of them once to its client (as errseq_t does for files, lib/errseq.c). Since ABI 4.
    pub flush_errors: AtomicU64,
    /// Connections of dead cores to NBD storage nodes on which changes may still be in flight. While it is not 0, no core writes
    /// to a node. The interface counts up before it frees the dead core's tickets. 0 under earlier builds of ABI 4, which have no such nodes.
    pub undrained: AtomicU32,
    _pad3: AtomicU32,
    /// Bit i: the server of node i ended a dead core's connection. What was not flushed may be lost. The core that has reported
    /// that by a failed flush clears the bit.
    pub lost_nodes: AtomicU64,
    _pad2: [AtomicU64; 18],
}

/// What a core needs to know of the file front end.
#[derive(FromBytes, KnownLayout, Debug)]
#[repr(C, align(128))]
pub struct FrontArea {
    /// Permission bits of the file.
    pub mode: AtomicU32,
    /// Owner of the file.
    pub uid: AtomicU32,
    /// Group of the file.
    pub gid: AtomicU32,
    _pad0: AtomicU32,
    /// Time of the attach, Unix seconds: the file's times.
    pub attached_at: AtomicU64,
    /// The value of [`GateArea::flush_errors`] that was reported to the file's users. Since ABI 4.
    pub flush_errors_told: AtomicU64,
    _pad: [AtomicU64; 60],
}

/// One core's area.
#[derive(FromBytes, KnownLayout, Debug)]
#[repr(C, align(128))]
pub struct CoreArea {
    /// Process id; 0 when the slot is free.
    pub pid: AtomicU32,
    /// The futex the core's parked workers sleep on; incremented before every wake.
    pub wake: AtomicU32,
    /// When the process was started, field 22 of /proc/PID/stat: distinguishes it from a later one with the same id.
    pub started: AtomicU64,
    /// Connections to NBD storage nodes on which this core may have changes in flight. An interface that was started anew, and
    /// finds the core dead, has no duplicates of their sockets.
    pub node_connections: AtomicU32,
    _pad4: AtomicU32,
    _pad1: [AtomicU64; 5],
    /// As the state of a ticket, for the thread that sends buffered data to the storage nodes: `WRITING`, `BUSY` or `PARKED`.
    pub sender: AtomicU32,
    /// The same for the thread that flushes the storage nodes: `BUSY` or `PARKED`. Since ABI 4.
    pub flusher: AtomicU32,
    _pad3: [AtomicU64; 55],
    /// One for each thread that touches a channel, a connection or a storage node: [`thread_word`]. Since ABI 4.
    pub threads: [AtomicU32; THREADS_MAX],
    /// One for each worker.
    pub tickets: [Ticket; WORKERS_MAX],
}

/// A worker's cache line, which only that worker writes.
#[derive(FromBytes, KnownLayout, Debug)]
#[repr(C, align(64))]
pub struct Ticket {
    /// [`ticket_state`].
    pub state: AtomicU32,
    /// Thread id, to evict it from a blocking read.
    pub tid: AtomicU32,
    /// 1 while the worker keeps a request that it read under a closed gate and did not answer.
    pub holding: AtomicU32,
    /// Requests that ended with EIO: the health window checks them.
    pub io_errors: AtomicU32,
    /// Requests executed.
    pub requests: AtomicU64,
    /// Requests that were read under a closed gate.
    pub suspended: AtomicU64,
    /// Payload bytes read from the volume.
    pub read_bytes: AtomicU64,
    /// Payload bytes written to the volume.
    pub written_bytes: AtomicU64,
    _pad: [AtomicU64; 2],
}

/// States of a [`Ticket`].
///
/// ```text
///            gate admits                 request read, gate admits            waits for a storage node
///  PARKED ───────────────► READING ──────────────────────────────► BUSY ◄─────────────────────────────► AWAY, WRITING
///    ▲                      │    ▲                                  │          back, if the gate admits      │
///    ├──────────────────────┘    └──────────────────────────────────┘                                       │
///    │  gate closed (evicted, or a request read too late)   replied                                         │
///    └──────────────────────────────────────────────────────────────────────────────────────────────────────┘
///                                             the gate no longer admits: the request stays unanswered
/// ```
/// Another core may repeat what a worker does in AWAY and WRITING, so no hand-over waits for it. A write of a worker in
/// WRITING may still reach a storage node, so the next core sends none before that is over.
pub mod ticket_state {
    /// No worker has this ticket.
    pub const FREE: u32 = 0;
    /// Executes nothing and reads nothing before it has checked the gate again.
    pub const PARKED: u32 = 1;
    /// May be blocked in read(2).
    pub const READING: u32 = 2;
    /// Executes a request.
    pub const BUSY: u32 = 3;
    /// Waits, or reads from a storage node. Checks the gate again before it changes or answers anything.
    pub const AWAY: u32 = 4;
    /// As AWAY, and writes to a storage node.
    pub const WRITING: u32 = 5;
}

/// Values of a word of [`CoreArea::threads`], a robust futex (linux/futex.h, Documentation/locking/robust-futexes.rst).
///
/// ```text
///        a thread that has a word     the new thread itself          it ends by itself
///  FREE ─────────────────────────► STARTING ───────► WAITERS + its id ───────────────────► FREE
///                                                        │ it ends in any other way: the kernel
///                                                        └─────────────────────────────────────► WAITERS + DIED
/// ```
/// The first mark of a core shows that the core ends as a whole: only a fatal signal or exit_group(2) ends a thread
/// that has not freed its word. From then on no thread of it is started (copy_process in the kernel refuses while a
/// fatal signal is pending). And every live thread has a word that [`is_running`](thread_word::is_running), because its
/// word was taken before it was started; one that takes a word later parks when it finds a mark. So if no word is running, in a scan that began after the first mark was seen,
/// none of these threads runs.
pub mod thread_word {
    /// No thread has this word.
    pub const FREE: u32 = 0;
    /// A thread may sleep on the word (FUTEX_WAITERS): the kernel wakes one sleeper when it marks the word.
    pub const WAITERS: u32 = 0x8000_0000;
    /// The kernel's mark (FUTEX_OWNER_DIED).
    pub const DIED: u32 = 0x4000_0000;
    /// Taken for a thread that is about to be started. The kernel does not mark it: if the core dies now, its pidfd
    /// reports the death.
    pub const STARTING: u32 = WAITERS;

    /// The word of a thread that runs, by its id as that thread sees it (gettid(2)).
    pub const fn running(tid: u32) -> u32 {
        WAITERS | tid
    }

    /// Whether a thread has the word and may still run.
    pub const fn is_running(word: u32) -> bool {
        word != FREE && word & DIED == 0
    }

    /// Whether the thread that had the word ended without freeing it.
    pub const fn has_died(word: u32) -> bool {
        word & DIED != 0
    }
}

/// Values of [`GateArea::probe`].
pub mod probe_verdict {
    /// Not ended.
    pub const PENDING: u32 = 1;
    /// The successor read its stores and opened the gate.
    pub const PASSED: u32 = 2;
    /// It could not read them.
    pub const FAILED: u32 = 3;
}

const _: () = {
    assert!(size_of::<Header>() == 128);
    assert!(size_of::<GateArea>() == 384);
    assert!(size_of::<FrontArea>() == 512);
    assert!(size_of::<Ticket>() == 64);
    assert!(size_of::<CoreArea>() == 7680);
    assert!(SEGMENT_BYTES == 64 << 10);
    assert!(core::mem::offset_of!(Segment, gate) == 128);
    assert!(core::mem::offset_of!(Segment, front) == 512);
    assert!(core::mem::offset_of!(Segment, cores) == 1024);
    assert!(core::mem::offset_of!(CoreArea, sender) == 64);
    assert!(core::mem::offset_of!(CoreArea, threads) == 512);
    assert!(core::mem::offset_of!(CoreArea, tickets) == 1536);
};
