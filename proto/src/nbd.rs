//! Addresses at which NBD clients are served, and the bytes of the protocol ([`wire`]).

pub mod wire;

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

/// Where an NBD server listens: `unix:/absolute/path` or `tcp:HOST:PORT` (`tcp:[::1]:10809` for an IPv6 host).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NbdAddress {
    /// A UNIX stream socket at this absolute path.
    Unix(PathBuf),
    /// A TCP port. Port 0 lets the system choose one.
    Tcp {
        /// Name or address of the host's interface, without brackets.
        host: String,
        /// The port.
        port: u16,
    },
}

/// Not an address of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no address for NBD clients: {why}; give unix:/absolute/path or tcp:HOST:PORT")]
pub struct BadNbdAddress {
    text: String,
    why: &'static str,
}

impl BadNbdAddress {
    /// What is wrong with it.
    pub const fn why(&self) -> &'static str {
        self.why
    }
}

/// `sun_path` holds 108 bytes, the last of which is a zero (unix(7)).
const UNIX_PATH_MAX: usize = 107;

impl FromStr for NbdAddress {
    type Err = BadNbdAddress;

    fn from_str(text: &str) -> Result<Self, BadNbdAddress> {
        let bad = |why| BadNbdAddress { text: text.chars().take(200).collect(), why };
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                _ if !path.starts_with('/') => Err(bad("the path is not absolute")),
                _ if path.len() > UNIX_PATH_MAX => Err(bad("a socket's path has at most 107 bytes")),
                _ if path.contains('\0') || path.ends_with('/') => Err(bad("that path names no socket")),
                _ => Ok(Self::Unix(path.into())),
            };
        }
        let rest = text.strip_prefix("tcp:").ok_or_else(|| bad("it begins with neither unix: nor tcp:"))?;
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| bad("the port is missing"))?;
        let port = port.parse().map_err(|_| bad("the port is no number from 0 to 65535"))?;
        let host = match host.strip_prefix('[') {
            Some(inner) => inner.strip_suffix(']').ok_or_else(|| bad("the bracket is not closed"))?,
            None if host.contains(':') => return Err(bad("an IPv6 address stands in brackets")),
            None => host,
        };
        if host.is_empty() || host.len() > 253 || host.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(bad("the host is missing or no name"));
        }
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

impl TryFrom<String> for NbdAddress {
    type Error = BadNbdAddress;
    fn try_from(text: String) -> Result<Self, BadNbdAddress> {
        text.parse()
    }
}

impl From<NbdAddress> for String {
    fn from(address: NbdAddress) -> Self {
        address.to_string()
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip_and_what_is_none_says_why() {
        for text in ["unix:/run/v.sock", "tcp:127.0.0.1:10809", "tcp:localhost:0", "tcp:[::1]:10809"] {
            assert_eq!(text.parse::<NbdAddress>().unwrap().to_string(), text);
        }
        let long = format!("unix:/{}", "x".repeat(107));
        for (text, why) in [
            ("unix:v.sock", "not absolute"),
            (long.as_str(), "107 bytes"),
            ("unix:/run/", "names no socket"),
            ("tcp:localhost", "port is missing"),
            ("tcp:localhost:65536", "no number"),
            ("tcp:::1:10809", "brackets"),
            ("tcp:[::1:10809", "not closed"),
            ("tcp::10809", "host is missing"),
            ("/run/v.sock", "neither unix: nor tcp:"),
        ] {
            let said = text.parse::<NbdAddress>().unwrap_err().to_string();
            assert!(said.contains(why), "{text}: {said}");
        }
    }
}
