//! The NBD front end: beside other servers, on slow storage nodes, during upgrades and crashes, and at rest.

pub mod idle;
pub mod kill;
pub mod pause;
pub mod slow_nodes;
pub mod throughput;
