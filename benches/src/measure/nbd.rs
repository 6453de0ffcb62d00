//! The NBD front end: beside other servers, during upgrades and crashes, and at rest.

pub mod idle;
pub mod kill;
pub mod pause;
pub mod throughput;
