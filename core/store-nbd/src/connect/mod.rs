//! A connection to a server, from the name of its host to the end of the handshake. One deadline for all of it.
//!
//! ```text
//! resolve ─▶ connect ─▶ greeting ─▶ [STARTTLS ─▶ TLS] ─▶ STRUCTURED_REPLY ─▶ SET_META_CONTEXT ─▶ GO [─▶ EXPORT_NAME]
//! ```

mod negotiate;
mod resolve;
mod socket;
mod stream;
mod tls;

use std::{io, os::fd::OwnedFd, time::Instant};

use rustls::ClientConnection;

use crate::{
    address::Address,
    codec::handshake::{HandshakeError, STRING_MAX},
    config::Offer,
};
pub(crate) use resolve::Resolver;
pub(crate) use stream::Raw;
use stream::Stream;

/// An established connection.
#[derive(Debug)]
pub(crate) struct Connected {
    /// Non-blocking.
    pub(crate) socket: OwnedFd,
    pub(crate) tls: Option<Box<ClientConnection>>,
    pub(crate) offer: Offer,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("cannot {doing}: {source}")]
    Io { doing: &'static str, source: io::Error },
    #[error("{0}")]
    Handshake(#[from] HandshakeError),
    #[error("cannot use {file} for TLS: {why}")]
    TlsFile { file: String, why: String },
    #[error("TLS fails: {0}")]
    Tls(#[from] rustls::Error),
    #[error("a UNIX socket has no host name; configure the name in the server's certificate")]
    ServerName,
    #[error("{0}")]
    Changed(String),
}

impl ConnectError {
    fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}

/// Connects.
pub(crate) fn open(address: &Address, resolver: &Resolver, deadline: Instant) -> Result<Connected, ConnectError> {
    if address.export.len() > STRING_MAX {
        return Err(HandshakeError::LongName(address.export.len()).into());
    }
    let socket = socket::connect(&address.server, resolver, deadline)?;
    let mut stream = Stream::new(socket, deadline);
    let offer = negotiate::run(&mut stream, address)?;
    let (socket, tls) = stream.into_parts();
    Ok(Connected { socket, tls, offer })
}
