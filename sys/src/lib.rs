//! What the kernel offers and std does not: shared memory, locked buffers, futexes, sockets that pass file
//! descriptors, process handles, /dev/fuse. All hand-written `unsafe` of the project stands here; the interfaces are safe.
#![expect(unsafe_code, reason = "the one room of unsafe code: system calls and shared memory behind safe functions")]

pub mod cache;
pub mod clock;
pub mod connection;
mod cursor;
pub mod file;
pub mod fuse;
pub mod in_flight;
pub mod link;
pub mod lock;
pub mod loop_device;
pub mod memory;
pub mod mounts;
pub mod packet;
pub mod privileges;
pub mod process;
pub mod robust;
pub mod schedule;
pub mod signal;
pub mod wake;
