//! Addresses of storage nodes.
//!
//! | address | node |
//! |---|---|
//! | `dir:/absolute/path` | a local directory |
//! | `nbd://host[:port]/export` | an export of an NBD server, over TCP |
//! | `nbd+unix:///export?socket=/absolute/path` | the same over a UNIX socket |
//!
//! Those of NBD servers follow the NBD project's doc/uri.md. What it knows and this build does not is refused, never ignored.

use std::{fmt, path::PathBuf, str::FromStr};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde::{Deserialize, Serialize};

use crate::nbd::NbdAddress;

/// The port of an NBD server that names none (IANA: nbd).
const NBD_PORT: u16 = 10809;
/// Bytes of an export's name (doc/proto.md of the NBD project, "Values": strings have at most 4096 bytes).
const EXPORT_MAX: usize = 4096;
/// What stands for itself in the path and the query of an address (RFC 3986, 3.3 and 3.4), without what separates parts.
const ENCODED: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/').remove(b':').remove(b',');

/// Address of a storage node.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NodeUrl {
    /// A local directory.
    Dir(PathBuf),
    /// An export of an NBD server.
    Nbd(NbdExport),
}

/// An export of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdExport {
    /// Where the server listens.
    pub server: NbdAddress,
    /// The export's name; empty: the server's default export.
    pub name: String,
}

impl NodeUrl {
    /// The directory, if it is one.
    pub const fn as_directory(&self) -> Option<&PathBuf> {
        match self {
            Self::Dir(path) => Some(path),
            Self::Nbd(_) => None,
        }
    }
}

/// The text is no address of a storage node.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadUrl {
    /// A directory needs an absolute path.
    #[error("{0}: a directory is given by its absolute path, dir:/path")]
    Relative(String),
    /// The address of an export is not well formed.
    #[error("{url}: {why}. Give nbd://host[:port]/export, or nbd+unix:///export?socket=/path")]
    Nbd {
        /// The text.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// Known, but not supported in this version.
    #[error(
        "storage nodes of kind {0} are not in this version; use dir:/path, nbd://host/export or nbd+unix:///export?socket=/path"
    )]
    NotYet(String),
    /// Unknown.
    #[error("{0:?} is no storage node: use dir:/path, nbd://host/export or nbd+unix:///export?socket=/path")]
    Scheme(String),
}

impl FromStr for NodeUrl {
    type Err = BadUrl;

    fn from_str(text: &str) -> Result<Self, BadUrl> {
        let shown = || text.chars().take(200).collect::<String>();
        let bad = |why: String| BadUrl::Nbd { url: shown(), why };
        match text.split_once(':') {
            Some(("dir", path)) if path.starts_with('/') && !path.contains('\0') => Ok(Self::Dir(PathBuf::from(path))),
            Some(("dir", _)) => Err(BadUrl::Relative(shown())),
            Some(("nbd", rest)) => over_tcp(rest).map(Self::Nbd).map_err(bad),
            Some(("nbd+unix", rest)) => over_unix(rest).map(Self::Nbd).map_err(bad),
            Some((scheme @ ("rbd" | "s3" | "nbds" | "nbds+unix"), _)) => Err(BadUrl::NotYet(scheme.to_owned())),
            _ => Err(BadUrl::Scheme(text.chars().take(80).collect())),
        }
    }
}

/// Authority, path without its first slash, and query.
fn parts(rest: &str) -> Result<(&str, &str, Option<&str>), String> {
    let rest = rest.strip_prefix("//").ok_or("// is missing behind the scheme")?;
    if rest.contains('#') {
        return Err("an address has no fragment: write # as %23".to_owned());
    }
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if authority.contains('@') {
        return Err("it names a user, which this client does not send".to_owned());
    }
    Ok((authority, path, query))
}

fn decoded(text: &str) -> Result<String, String> {
    let decoded = percent_decode_str(text).decode_utf8().map_err(|_| "it is not valid UTF-8".to_owned())?;
    if decoded.contains('\0') { Err("it contains a zero byte".to_owned()) } else { Ok(decoded.into_owned()) }
}

fn export(path: &str) -> Result<String, String> {
    let name = decoded(path)?;
    if name.len() > EXPORT_MAX {
        return Err(format!("an export's name has at most {EXPORT_MAX} bytes"));
    }
    Ok(name)
}

fn over_tcp(rest: &str) -> Result<NbdExport, String> {
    let (authority, path, query) = parts(rest)?;
    if let Some(query) = query {
        return Err(format!("it says {query:?}, which means nothing for a server on TCP"));
    }
    if authority.is_empty() {
        return Err("the host is missing".to_owned());
    }
    let has_port = authority.rsplit_once(':').is_some_and(|(host, _)| !host.starts_with('[') || host.ends_with(']'));
    let text = if has_port { format!("tcp:{authority}") } else { format!("tcp:{authority}:{NBD_PORT}") };
    let server: NbdAddress = text.parse().map_err(|bad: crate::nbd::BadNbdAddress| bad.why().to_owned())?;
    if matches!(server, NbdAddress::Tcp { port: 0, .. }) {
        return Err("port 0 is no port of a server".to_owned());
    }
    Ok(NbdExport { server, name: export(path)? })
}

fn over_unix(rest: &str) -> Result<NbdExport, String> {
    let (authority, path, query) = parts(rest)?;
    if !authority.is_empty() {
        return Err(format!(
            "a UNIX socket has no host, and {authority:?} stands in its place: three slashes follow the colon"
        ));
    }
    let socket = match query.and_then(|query| query.split_once('=')) {
        Some(("socket", socket)) if !socket.contains('&') => decoded(socket)?,
        _ => return Err("?socket=/path is missing, or something else is asked for".to_owned()),
    };
    let server = format!("unix:{socket}").parse().map_err(|bad: crate::nbd::BadNbdAddress| bad.why().to_owned())?;
    Ok(NbdExport { server, name: export(path)? })
}

impl TryFrom<String> for NodeUrl {
    type Error = BadUrl;
    fn try_from(text: String) -> Result<Self, BadUrl> {
        text.parse()
    }
}

impl From<NodeUrl> for String {
    fn from(url: NodeUrl) -> Self {
        url.to_string()
    }
}

impl fmt::Display for NodeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dir(path) => write!(f, "dir:{}", path.display()),
            Self::Nbd(export) => export.fmt(f),
        }
    }
}

impl fmt::Display for NbdExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let encoded = |text| utf8_percent_encode(text, ENCODED);
        match &self.server {
            NbdAddress::Tcp { host, port } => {
                let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
                let port = if *port == NBD_PORT { String::new() } else { format!(":{port}") };
                write!(f, "nbd://{host}{port}/{}", encoded(&self.name))
            }
            NbdAddress::Unix(path) => {
                let path = path.to_str().expect("it was parsed from text");
                write!(f, "nbd+unix:///{}?socket={}", encoded(&self.name), encoded(path))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn g_addresses_of_exports_are_those_of_the_nbd_project() {
        let tcp = |host: &str, port, name: &str| {
            NodeUrl::Nbd(NbdExport { server: NbdAddress::Tcp { host: host.to_owned(), port }, name: name.to_owned() })
        };
        let unix = |path: &str, name: &str| {
            NodeUrl::Nbd(NbdExport { server: NbdAddress::Unix(path.into()), name: name.to_owned() })
        };
        for (text, url, shown) in [
            ("nbd://host", tcp("host", 10809, ""), "nbd://host/"),
            ("nbd://host/", tcp("host", 10809, ""), "nbd://host/"),
            ("nbd://host:10809/disk", tcp("host", 10809, "disk"), "nbd://host/disk"),
            ("nbd://10.0.0.1:99/a/b", tcp("10.0.0.1", 99, "a/b"), "nbd://10.0.0.1:99/a/b"),
            ("nbd://[fe80::1]/x", tcp("fe80::1", 10809, "x"), "nbd://[fe80::1]/x"),
            ("nbd://[::1]:7/x%20y%3F", tcp("::1", 7, "x y?"), "nbd://[::1]:7/x%20y%3F"),
            ("nbd+unix:///?socket=/run/a.sock", unix("/run/a.sock", ""), "nbd+unix:///?socket=/run/a.sock"),
            ("nbd+unix:///d%C3%BC?socket=/run/a%20b", unix("/run/a b", "dü"), "nbd+unix:///d%C3%BC?socket=/run/a%20b"),
        ] {
            assert_eq!(text.parse::<NodeUrl>().as_ref(), Ok(&url), "{text}");
            assert_eq!(url.to_string(), shown);
            assert_eq!(shown.parse::<NodeUrl>(), Ok(url));
        }
    }

    #[test]
    fn what_is_no_address_says_why() {
        for (text, why) in [
            ("nbd:host", "// is missing"),
            ("nbd:///export", "host is missing"),
            ("nbd://host:0/x", "port 0"),
            ("nbd://host:70000/x", "port"),
            ("nbd://::1/x", "brackets"),
            ("nbd://[::1/x", "not closed"),
            ("nbd://me@host/x", "user"),
            ("nbd://host/x#y", "fragment"),
            ("nbd://host/x?tls=1", "means nothing"),
            ("nbd://host/%ff", "UTF-8"),
            ("nbd://host/a%00", "zero byte"),
            ("nbd+unix:///x", "?socket="),
            ("nbd+unix://host/x?socket=/s", "three slashes"),
            ("nbd+unix:///x?socket=s", "not absolute"),
            ("nbd+unix:///x?socket=/s&a=b", "something else"),
            ("nbds://host/x", "not in this version"),
            ("rbd:pool/image", "not in this version"),
            ("dir:a", "absolute path"),
            ("http://host/", "no storage node"),
            ("", "no storage node"),
        ] {
            let said = text.parse::<NodeUrl>().unwrap_err().to_string();
            assert!(said.contains(why), "{text}: {said}");
        }
        let long = format!("nbd://host/{}", "x".repeat(EXPORT_MAX + 1));
        assert!(long.parse::<NodeUrl>().unwrap_err().to_string().contains("4096 bytes"));
    }

    proptest! {
        #[test]
        fn every_address_is_read_as_it_is_written(name in "[^\0]{0,40}", path in "/[^\0]{0,40}[^\0/]", port in 1_u16..) {
            for server in [NbdAddress::Unix(path.into()), NbdAddress::Tcp { host: "h".to_owned(), port }] {
                let bytes = if let NbdAddress::Unix(path) = &server { path.as_os_str().len() } else { 0 };
                prop_assume!(bytes <= 107);
                let url = NodeUrl::Nbd(NbdExport { server, name: name.clone() });
                prop_assert_eq!(url.to_string().parse::<NodeUrl>(), Ok(url));
            }
        }

        #[test]
        fn no_text_panics(text in ".{0,60}") {
            let _ = text.parse::<NodeUrl>();
            let _ = format!("nbd:{text}").parse::<NodeUrl>();
            let _ = format!("nbd+unix://{text}").parse::<NodeUrl>();
        }
    }
}
