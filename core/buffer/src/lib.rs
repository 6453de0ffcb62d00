//! The write buffer (D5): acknowledged data in memory that outlives the core, until the storage nodes have it.
//!
//! ```text
//!  area    the shared memory: words and data                        (the segment; in tests, memory that can die)
//!  log     one extent after another in it: reserve, publish, read   (what another core finds)
//!  index   which extent holds which byte of the volume now          (rebuilt from the log by each core)
//!  lost    ranges whose data is lost: found damaged, or written past the buffer before a flush failed
//!  noted   what was written past the buffer and is not known to be durable
//!  book    one core's view of all of it: append, look up, follow, choose what is sent next, retire
//! ```
//! Nothing here waits, locks or does I/O. There is no std, except for the tests. One core at a time appends and one
//! retires: the gate and the fence of the surrounding process ensure that.
#![forbid(unsafe_code)]
#![cfg_attr(not(any(test, loom)), no_std)]

extern crate alloc;

pub mod area;
pub mod book;
pub mod index;
pub mod log;
pub mod lost;
pub mod noted;

#[cfg(any(test, feature = "testing"))]
pub mod testing;
