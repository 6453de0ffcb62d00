//! What the end-to-end tests share, beside what they share with demo and bench (`harness/`).
//!
//! ```text
//!  host.rs        a computing node of its own, under a watchdog; nothing may be left over at its end
//!  second.rs      a second control module on it
//!  volume.rs      a volume on it, and what is asked of it
//!  status.rs      `status` and upgrade reports, read
//!  programs.rs    cores that misbehave
//!  disks.rs       disks of their own for storage nodes
//!  servers.rs     NBD servers of others for storage nodes
//!  faults.rs      storage nodes that lose what they have not flushed
//!  fio.rs         fio as a load that verifies
//!  nbd.rs         a volume with NBD front ends, and foreign NBD clients
//!  guest.rs       a virtual machine
//!  load.rs        a load that knows what was acknowledged
//!  promises.rs    the promises of a disk with a write cache, and a load that holds a volume to them
//!  buffer.rs      the size of the write buffers
//!  bytes.rs       patterns, aligned buffers
//!  guards.rs      loop devices and mounts that go with their owner
//! ```
#![forbid(unsafe_code)]
#![expect(clippy::panic, reason = "a harness fails by panicking")]

pub use everdisk_harness::{processes, run, wait, watchdog};

pub mod buffer;
pub mod bytes;
pub mod disks;
pub mod faults;
pub mod fio;
pub mod guards;
pub mod guest;
pub mod host;
pub mod load;
pub mod nbd;
pub mod programs;
pub mod promises;
pub mod second;
pub mod servers;
pub mod status;
pub mod volume;
