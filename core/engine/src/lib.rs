//! Executes a volume's I/O.
//!
//! ```text
//!  WriteBack   serves the front ends: acknowledges writes once they are buffered (D5)
//!    │  buffer   in the segment, see everdisk-buffer
//!    │  sender   sends it to the storage nodes, in large parts
//!    ▼
//!  Engine      the operations on the storage nodes, on the caller's thread (M7)
//!    layout    where each byte lies
//!    health    state of the nodes
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(test, expect(clippy::disallowed_methods, reason = "a test is no core: its threads need no word"))]

mod area;
mod bypasses;
mod engine;
mod error;
#[cfg(test)]
mod exports;
mod gate;
mod health;
pub mod layout;
mod lifecycle;
mod node;
mod pace;
mod policy;
mod progress;
#[cfg(test)]
mod reference;
mod sender;
#[cfg(test)]
mod tests;
mod write_back;

pub use everdisk_store::{Creation, Sought};

pub use crate::{
    engine::{Engine, NotFlushed},
    error::{IoError, OpenError},
    gate::{Gate, Hold, Stopped, Work},
    write_back::WriteBack,
};
