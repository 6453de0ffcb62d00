//! Limits, each with the reason for its value.

use std::time::Duration;

/// Largest volume: 8 EiB − 1 page, so that every offset fits the kernel's signed `loff_t`.
pub const VOLUME_SIZE_MAX: u64 = (i64::MAX as u64) & !(BLOCK - 1);
/// Volume sizes and stripe sizes are multiples of this: the page size, so that no page spans two nodes.
pub const BLOCK: u64 = 4096;
/// Smallest stripe unit: below it, one 1 MiB request would be cut into more than 16 store operations.
pub const STRIPE_MIN: u64 = 64 * 1024;
/// Largest stripe unit: above it striping no longer spreads anything.
pub const STRIPE_MAX: u64 = 1 << 30;

/// Range of a volume's timeouts, milliseconds.
pub const TIMEOUT_MS: std::ops::RangeInclusive<u64> = 100..=3_600_000;
/// Default stripe unit, `volume create --stripe`.
pub const STRIPE_DEFAULT: u64 = 4 << 20;
/// Storage nodes of one volume; one byte in every structure that counts them.
pub const NODES_MAX: usize = 64;
/// Payload of one request: FUSE's own ceiling is 256 pages unless the administrator raises `max_pages_limit`.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Core slots of a segment: serving, standby, parked predecessor, incoming, and as many for stragglers.
pub const CORES_MAX: usize = 8;
/// Channels of one front end, each with one worker that reads from it. More readers than CPUs only contend for the queue.
pub const CHANNELS_MAX: usize = 4;
/// Workers of one core: one for each channel and each NBD connection, and the stand-ins for those that wait for a
/// storage node ([`STANDINS_MAX`]).
pub const WORKERS_MAX: usize = 96;
/// Stand-ins of one core for workers that wait for a storage node: at most this many requests wait at the same time.
pub const STANDINS_MAX: usize = 28;
/// Threads of one core that touch a channel, a connection or a storage node. 96 workers, 128 of the nodes' pools, 8 that
/// answer the control module, and the main thread, the guard, the watcher, the sender and the flusher make 237. The rest
/// is for those that are just ending.
pub const THREADS_MAX: usize = 256;
/// Addresses of one volume at which NBD clients are accepted: their sockets fit into one frame beside the channels.
pub const LISTENERS_MAX: usize = 8;
/// NBD connections of one volume at once. Each has a worker in every core.
pub const CONNECTIONS_MAX: usize = 63;
/// Connections of one core to NBD storage nodes that the interface keeps: those in use ([`node_connections`]), and those that
/// were lost a moment ago.
pub const NODE_CONNECTIONS_MAX: usize = 256;
/// A server that has lost a connection and lives on has executed what it received on it after this time.
pub const NODE_SETTLE: Duration = Duration::from_secs(5);

/// Connections to one NBD storage node of a volume with this many nodes, where its server allows several. Each has a thread, and
/// [`THREADS_MAX`] bounds these.
pub const fn node_connections(nodes: usize) -> usize {
    match nodes {
        0..=8 => 4,
        9..=16 => 2,
        _ => 1,
    }
}

/// Smallest write buffer: two of the largest requests, so that one may be filled while the other is sent.
pub const BUFFER_MIN: u64 = 2 << 20;
/// Largest write buffer: its memory is reserved for as long as the volume is attached.
pub const BUFFER_MAX: u64 = 1 << 30;
/// Default write buffer, `volume create --buffer`.
pub const BUFFER_DEFAULT: u64 = 64 << 20;
/// Bytes of a frame. The largest is `Status` with every slot filled, about 4 KiB.
pub const FRAME_BYTES_MAX: usize = 32 * 1024;
/// File descriptors in one frame (the kernel's own limit, SCM_MAX_FD, is 253).
pub const FRAME_FDS_MAX: usize = 16;

/// A suspension that is not resumed is ended by the interface after this time (D8).
pub const LEASE_DEFAULT: Duration = Duration::from_secs(5);
/// Longest lease: below the kernel's hung-task warning (120 s by default).
pub const LEASE_MAX: Duration = Duration::from_secs(100);
/// Default of `upgrade --pause-budget`: the gate returns to the old core when the drain and the probe take longer.
pub const PAUSE_BUDGET_DEFAULT: Duration = Duration::from_millis(100);
/// Default of `upgrade --flush-limit`: the time for the buffered data to reach the storage nodes before the hand-over.
pub const FLUSH_LIMIT_DEFAULT: Duration = Duration::from_secs(30);
/// A peer on a socket answers within this time, or the connection is given up.
pub const PEER_DEADLINE: Duration = Duration::from_secs(5);
/// Default of the control module's `--hang-limit`: a core that serves, does nothing and does not answer for this long while requests wait
/// is killed, and another takes over. Ten times what a core needs on a machine that is overloaded.
pub const HANG_LIMIT_DEFAULT: Duration = Duration::from_secs(10);
/// Shortest hang limit: with a lower one, cores would be killed on a machine that is merely busy.
pub const HANG_LIMIT_MIN: Duration = Duration::from_secs(1);
