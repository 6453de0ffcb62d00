//! Where a node is, and how the connection to it is secured.

use std::{fmt, path::PathBuf};

use everdisk_proto::nbd::NbdAddress;

/// An export of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Where the server listens.
    pub server: NbdAddress,
    /// The name of its export. Empty: the server's default export.
    pub export: String,
    /// Whether the connection is encrypted.
    pub tls: Tls,
}

/// Whether the connection is encrypted. There is no "if the server offers it": an attacker between the two could take
/// the offer out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    /// Never.
    Off,
    /// Always: a server that offers none is refused.
    Required(TlsFiles),
}

/// PEM files for TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authorities that may have signed the server's.
    pub authorities: PathBuf,
    /// For servers that ask the client who it is.
    pub client: Option<ClientFiles>,
    /// The name in the server's certificate. `None`: the host of its address; a UNIX socket has none, so there it has
    /// to be given.
    pub server_name: Option<String>,
}

/// PEM files by which the client proves who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFiles {
    /// Its certificate, and those between it and the authority.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls == Tls::Off { "nbd" } else { "nbds" };
        write!(f, "{scheme} node {}", self.server)?;
        if self.export.is_empty() { Ok(()) } else { write!(f, ", export {:?}", self.export) }
    }
}
