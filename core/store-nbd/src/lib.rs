//! A storage node behind an NBD server (nbdkit, qemu-nbd, nbd-server, another Everdisk): an asynchronous client.
//!
//! ```text
//! client.rs      the handle: begin, sockets, outstanding writes
//! command.rs     commands and completions            config.rs   what can be set, what a server offers
//! address.rs     where a node is                     error.rs    why a command failed
//! state/         what has begun and what was sent, behind one lock: planning, window, flushes, ranges
//! lane.rs        sending on a connection             receive.rs  the thread of a connection, which reads its replies
//! connect/       name, socket, TLS, handshake        reconnect.rs the thread that makes connections
//! codec/         bytes
//! ```
#![forbid(unsafe_code)]

mod address;
mod client;
pub mod codec;
mod command;
mod config;
mod connect;
mod error;
mod inbox;
mod lane;
mod receive;
mod reconnect;
mod shared;
mod state;

pub use address::{Address, ClientFiles, Tls, TlsFiles};
pub use client::{Client, Socket};
pub use codec::reply::Extent;
pub use command::{Command, Completion, Done, Outcome};
pub use config::{Config, Offer};
pub use error::{Error, Kind};
pub use state::OutstandingWrite;
