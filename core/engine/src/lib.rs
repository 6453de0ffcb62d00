//! Executes a volume's I/O on its storage nodes (M7): [`layout`] says where each byte lies, [`Engine`] does the
//! operations on the caller's thread.
#![forbid(unsafe_code)]

mod engine;
mod error;
mod health;
pub mod layout;
mod lifecycle;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

pub use everdisk_store::Sought;

pub use crate::{
    engine::Engine,
    error::{IoError, OpenError},
};
