//! The file front end: FUSE, with the volume as the one regular file that is the mount's root.

pub mod abi;
pub mod handshake;
pub mod operation;
pub mod serve;

#[cfg(test)]
mod tests;
