//! What the demo and the bench share: a host with a volume of its own, verified load, the peer, tables and pictures.
//!
//! Nothing of it outlives the program: processes, mounts and files all belong to a [`host::Host`], which clears them
//! away when it is dropped, whatever happened.
#![forbid(unsafe_code)]

pub mod block;
pub mod chart;
pub mod demo;
pub mod fio;
pub mod host;
pub mod interface;
pub mod load;
pub mod machine;
pub mod measure;
pub mod nbd;
pub mod peer;
pub mod stats;
pub mod table;

use std::io::{self, Write};

pub use everdisk_harness::{Error, Result};

/// Prints a line. A reader that has gone is no reason to end without clearing up, so errors are ignored.
pub fn say(text: impl std::fmt::Display) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}
