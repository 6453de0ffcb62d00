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
//!
//! # Threads
//! One thread per connection reads replies and completes commands (`receive.rs`). One thread makes connections
//! that are missing. A command is sent by the thread that begins it, so a command that waits for the server occupies
//! no thread. With TLS the thread of the connection does all reading and writing: it alone has the state of the
//! encryption, and a command that is begun wakes it through an eventfd.
//!
//! # Notes on the fence: how a successor drains the writes of a client that was killed
//! Not built yet. What it needs is here: [`Client::sockets`], [`Client::outstanding_writes`], [`Config::epoch`].
//!
//! *Why.* A server goes on executing what it has received when its client dies, and a new connection is no barrier for
//! that. The only statement that a write has ended is its reply. So somebody keeps the socket open, and the successor reads on until
//! every write of its predecessor has been answered. Until then it writes nothing.
//!
//! *How.*
//! 1. The interface process holds a duplicate of every socket from the moment the connection is established, and the predecessor
//!    notes in shared memory: the connection, what was agreed upon ([`Offer`]), and for each outstanding change its
//!    cookie. A cookie is noted before the first byte of its request is sent, and taken out when its reply has been
//!    read. Cookies carry the process's epoch, so the successor's own are never mistaken for them.
//! 2. The successor takes the socket, finds the position in the stream of replies (below), and reads replies as
//!    [`codec::reply`] does. Data of reads are thrown away. It needs the lengths of outstanding *reads* as well: a simple reply does not tell
//!    whether data follow, so reads are noted too, with their lengths. With structured replies every chunk tells its length.
//! 3. Every noted change has been answered: the fence is down. Then the successor may go on using the connection, if the predecessor
//!    did not die within a send. Otherwise see 4.
//! 4. Whether it died within a send: requests are sent in the order of the queue, so at most one is incomplete, the
//!    last one noted; the sender notes its bytes sent after each system call. The rest of that request must not be
//!    sent by anybody (its data may have changed since). Servers answer the earlier requests while they wait for the
//!    rest. When these are answered, the socket is shut down, which drops the incomplete request, and a new one is opened. If the note
//!    of the bytes is missing because the death fell between the system call and the note, the successor treats the
//!    last request as incomplete: it waits for its reply only for a stated time, then shuts down.
//! 5. The server hangs: the drain has no end, the writes stay in the write buffer, and the status says so. The connection
//!    breaks: the writes are as lost to sight as with any server that closes; what remains is [`Config::settle`].
//!
//! *The position in the stream of replies.* recv(2) takes bytes out of the socket before the caller can note anything. A client
//! that is killed within it leaves a stream that begins at an unknown byte. A system call that has begun ends before the
//! thread dies, so the bytes are in the caller's memory, but nobody knows how many. Three ways, none of them built:
//! * TCP: the kernel knows. Position = `tcpi_bytes_received` of TCP_INFO − FIONREAD (one less after the peer's FIN, which
//!   is counted). With the first value read again afterwards and equal, 6000 of 6000 random reads on loopback were told
//!   exactly, also after FIN (Linux 6.18). If the inbox lies in shared memory, is written in a ring, and the position of
//!   its end is noted after each recv, the successor has every byte between the noted position and the kernel's: it was received into
//!   the ring behind the noted end. No cost at all for the quick path, and large reads stay possible. Data
//!   that are read straight into a caller's memory need a note of that range before the recv; the successor throws them away.
//! * UNIX sockets have no such counter. Peek, note, consume: recv with MSG_PEEK into the ring, note "these bytes from here on", then recv the
//!   same bytes. Killed in between, the successor peeks itself and compares the first head with the noted one: cookies
//!   are unique within an outstanding set, and a chunk's head is followed by an offset that differs from chunk to chunk, so equal
//!   means not consumed. Uncertain: a stream that was noted but cut within a payload can repeat itself in content. It
//!   is certain only if each consuming recv ends at a head; so consume up to the last head that is complete.
//! * TLS ends in the process: neither way helps. The encryption has to end in the interface, with a socketpair to
//!   the core, which is then the second case.
//!
//! *Cost*, per reply, 16 replies waiting, best of 2000 rounds on a busy machine with 2 CPUs, system calls only:
//!
//! | | 16 bytes, unix | 4112 bytes, unix | 16 bytes, TCP | 4112 bytes, TCP |
//! |---|---|---|---|---|
//! | one recv for all 16 (as now) | 240 ns | 614 ns | 216 ns | 429 ns |
//! | one recv for each | 400 | 760 | 495 | 640 |
//! | peek each head, then recv each | 928 | 1286 | 739 | 866 |
//! | peek all, then consume all | 334 | 905 | 304 | 464 |
//!
//! So head by head costs 370 to 690 ns for each reply. Peeking everything costs 35 to 290 ns, the most where payloads are copied twice.
//! On a UNIX socket MSG_TRUNC discards nothing, so consuming copies again.
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
