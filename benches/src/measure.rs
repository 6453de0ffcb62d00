//! The measurements. Each prints its table and returns its part of the JSON, every raw round in it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use everdisk_proto::frame::Suspension;
use serde_json::{Value, json};

use everdisk_harness::interrupt::Interrupt;

use crate::{Error, Result};

pub mod buffer;
pub mod kill;
pub mod memory;
pub mod nbd;
pub mod pause;
pub mod throughput;
pub mod windows;

/// Bytes of the measured volume.
pub const VOLUME_BYTES: u64 = 1 << 30;
/// The same as an operator writes it.
pub const VOLUME_SIZE: &str = "1G";
/// Threads of the verified load.
pub const LOAD_THREADS: u64 = 8;
/// Bytes it works on.
pub const LOAD_BYTES: u64 = 256 << 20;

/// Room for segments, buffers in them, and logs, beside the images.
const ROOM_BYTES: u64 = VOLUME_BYTES * 3 / 2;

/// How thorough to be.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Alternating rounds of the throughput measurement.
    pub rounds: usize,
    /// The same of NBD servers.
    pub nbd_rounds: usize,
    /// Whether a volume without a write buffer is measured beside NBD servers, too.
    pub unbuffered: bool,
    /// Seconds of each of its jobs.
    pub seconds: u64,
    /// Upgrades of the pause measurement.
    pub upgrades: usize,
    /// Kills of the kill measurement.
    pub kills: usize,
    /// Seconds of a load that outlasts the write buffer.
    pub sustained: u64,
    /// Repetitions of each case of the write buffer's other measurements.
    pub repetitions: usize,
    /// Ends everything early.
    pub interrupt: Interrupt,
}

/// Where the storage nodes of a measurement are: memory, if there is room for several images, so that no disk is measured.
///
/// # Errors
/// The operating system's.
pub fn memory_directory() -> Result<PathBuf> {
    memory_directory_for(2)
}

/// As [`memory_directory`], with room for the given number of images.
///
/// # Errors
/// As [`memory_directory`].
pub fn memory_directory_for(images: u64) -> Result<PathBuf> {
    let shm = Path::new("/dev/shm");
    let needed = VOLUME_BYTES * images + ROOM_BYTES;
    let room = rustix::fs::statvfs(shm).map(|s| s.f_bavail * s.f_frsize).unwrap_or(0);
    if room > needed {
        return Ok(shm.to_owned());
    }
    Err(Error::Failed(format!("/dev/shm has {} MiB of room, {} are needed", room >> 20, needed >> 20)))
}

/// A suspension as the JSON has it.
pub fn suspension_json(times: &Suspension) -> Value {
    json!({
        "closed_monotonic_ns": times.closed_ns, "drained_us": times.drained_us, "opened_us": times.opened_us,
        "first_request_us": times.first_request_us, "held": times.held,
    })
}

/// Asked for and used in a loop: not longer than needed for the core to be warm.
pub const SETTLE: Duration = Duration::from_millis(500);
