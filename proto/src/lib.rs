//! The bytes the three modules agree on: ids, limits, versions, the segment's layout, the frames on the
//! interface's and the core's sockets, the superblock of a storage node and the journal of upgrades.
//!
//! Nothing here does I/O, reads a clock or decides anything. A change that alters bytes takes a new version number, a
//! new golden file under `proto/golden/` and a decoder for the version before.
#![forbid(unsafe_code)]
#![deny(clippy::indexing_slicing)]

pub mod buffer;
pub mod connection;
pub mod file_id;
pub mod frame;
pub mod gate_word;
pub mod identity;
pub mod ids;
pub mod in_flight;
pub mod journal;
pub mod limits;
pub mod nbd;
pub mod node;
mod node_url;
pub mod segment;
pub mod superblock;
pub mod version;
pub mod volume;

#[cfg(test)]
mod golden;
