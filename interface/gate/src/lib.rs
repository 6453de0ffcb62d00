//! The gate (D2): which core may execute requests now.
//!
//! Three parts, all without a clock and without system calls (no std, except for the tests):
//! - [`ticket`]: the atomics between a core's workers, which enter for each request, and the interface, which closes
//!   the gate and waits until no ticket is out. Checked by loom.
//! - [`hold`]: the right of a request that was let in, as its executor sees it on either side of the gate.
//! - [`custody`]: which core has the gate, which one gets it when that core dies, when a suspension ends by itself.
//!   Checked against a reference by proptest.
#![forbid(unsafe_code)]
#![cfg_attr(not(any(test, loom)), no_std)]

pub mod custody;
pub mod hold;
pub mod ticket;
