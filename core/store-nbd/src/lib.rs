//! A storage node behind an NBD server (nbdkit, qemu-nbd, nbd-server, another Everdisk): an asynchronous client.
//!
//! ```text
//! client.rs      the handle: begin, sockets, outstanding writes
//! command.rs     commands and completions            config.rs   what can be set, what a server offers
//! address.rs     where a node is                     error.rs    why a command failed
//! state/         what has begun and what was sent, behind one lock: planning, window, flushes, ranges
//! lane.rs        sending on a connection             receive.rs  the thread of a connection, which reads its replies
//! connect/       name, socket, TLS, handshake        reconnect.rs the thread that makes connections
//! keeper.rs      the fence                           codec/         bytes
//! ```
//!
//! # Threads
//! One thread per connection reads replies and completes commands (`receive.rs`). One thread makes connections
//! that are missing. A command is sent by the thread that begins it, so a command that waits for the server occupies
//! no thread. With TLS the thread of the connection does all reading and writing: it alone has the state of the
//! encryption, and a command that is begun wakes it through an eventfd.
//!
//! # The fence
//! [`Keeper`] says why it is needed. For each connection there is an in-flight table in shared memory
//! (`everdisk_proto::in_flight`):
//! * A change has an entry from before its first byte is sent until its reply has been read.
//! * The kernel records how far the socket was written, within the system call. So it is known exactly which requests the
//!   server has as a whole. One that it has in part is never executed, because nobody sends the rest.
//! * What is received lies in the inbox of the table, and cookies are unpredictable: a reply is recognised in the inbox, in the
//!   socket, or across the two, wherever it begins.
//!
//! TLS ends in the process, so an encrypted connection cannot be kept.
#![forbid(unsafe_code)]

mod address;
mod client;
pub mod codec;
mod command;
mod config;
mod connect;
mod error;
mod inbox;
mod keeper;
mod lane;
mod receive;
mod reconnect;
mod shared;
mod state;

pub use address::{Address, ClientFiles, Tls, TlsFiles};
pub use client::Client;
pub use codec::reply::Extent;
pub use command::{Command, Completion, Done, Outcome};
pub use config::{Config, Offer};
pub use error::{Error, Kind};
pub use keeper::Keeper;
pub use state::OutstandingWrite;
