//! The client against real servers, servers that die, and servers that lie.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
#![expect(clippy::disallowed_methods, reason = "a test is no core: its threads need no word")]

mod blocks;
mod certificates;
mod conformance;
mod failures;
mod fence;
mod honest;
mod hostile;
mod hostile_handshake;
mod kit;
mod outages;
mod servers;
mod several;
mod tls;
