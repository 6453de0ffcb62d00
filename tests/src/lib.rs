//! What the end-to-end tests share.
//!
//! ```text
//!  host.rs        a computing node of its own: directories, control module, clean end
//!  volume.rs      a volume on it, and what is asked of it
//!  status.rs      `status` and upgrade reports, read
//!  run.rs         foreign programs under a deadline
//!  watchdog.rs    a limit on every test
//!  wait.rs        waiting for a condition, never for a time
//!  processes.rs   who runs, who is killed, what is mounted
//!  programs.rs    where the programs are
//!  disks.rs       disks of their own for storage nodes
//!  faults.rs     storage nodes that are slow, fail or hang on command
//!  fio.rs         fio as a load that verifies
//!  nbd.rs         a volume with NBD front ends, and NBD clients
//!  guest.rs       a virtual machine
//!  load.rs        a load that knows what was acknowledged
//!  promises.rs    the promises of a disk with a write cache, and a load that holds a volume to them
//!  buffer.rs      the size of the write buffers
//!  bytes.rs       patterns, aligned buffers
//!  guards.rs      loop devices and mounts that go with their owner
//! ```
#![forbid(unsafe_code)]
#![expect(clippy::panic, reason = "a harness fails by panicking")]

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
pub mod processes;
pub mod programs;
pub mod promises;
pub mod run;
pub mod second;
pub mod status;
pub mod volume;
pub mod wait;
pub mod watchdog;
