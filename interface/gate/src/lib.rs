//! The gate (D2): who may execute requests now.
//!
//! Three parts, all without a clock and without system calls (no std, but for the tests):
//! - [`ticket`]: the atomics between a core's workers, who enter for each request, and the interface, which closes the
//!   gate and waits until no ticket is out. Checked by loom.
//! - [`hold`]: what a request that was let in is to the code that executes it, on both sides of it.
//! - [`custody`]: which core has the gate, whom it goes to when that core dies, when a suspension ends by itself.
//!   Checked against a reference by proptest.
#![forbid(unsafe_code)]
#![cfg_attr(not(any(test, loom)), no_std)]

pub mod custody;
pub mod hold;
pub mod ticket;
