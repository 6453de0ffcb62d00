//! NBD: where a server awaits clients, the servers that ours is measured against, and a client that is never clever.

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
};

use crate::{Error, Result, fio::Target, host::VOLUME};

pub mod client;
pub mod disk;
pub mod peer;

/// Where a server awaits clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A UNIX socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

impl Address {
    /// A port of the loopback interface that is free now.
    ///
    /// # Errors
    /// There is none.
    pub fn free_port() -> Result<Self> {
        let bound = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
        bound.map(Self::Tcp).map_err(Error::io("find a free port"))
    }

    /// What fio does its I/O to.
    pub fn target(&self) -> Target {
        let uri = match self {
            Self::Unix(path) => format!("nbd+unix:///{VOLUME}?socket={}", path.display()),
            Self::Tcp(address) => format!("nbd://{address}/{VOLUME}"),
        };
        Target::Nbd { uri }
    }
}
