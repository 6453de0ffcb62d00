//! NBD: where a server awaits clients, and the bytes that go over the wire.
//!
//! ```text
//! greeting  NBDMAGIC IHAVEOPT flags:16                    ◀─ server
//!           flags:32                                      ─▶ server
//! option    IHAVEOPT option:32 length:32 data             ─▶ server
//! reply     magic:64 option:32 kind:32 length:32 data     ◀─ server, to every option but NBD_OPT_EXPORT_NAME
//! request   magic:32 flags:16 command:16 cookie:64 offset:64 length:32 [data]  ─▶
//! reply     magic:32 error:32 cookie:64 [data]                                 ◀─
//! ```

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    time::Duration,
};

use crate::{Error, Result, wait::SOON};

mod client;

pub use client::Client;

/// Where a server awaits clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A UNIX socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

impl Address {
    /// Reads what status prints, `unix:/run/v.sock` or `tcp:127.0.0.1:10809`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(':')? {
            ("unix", path) => Some(Self::Unix(path.into())),
            ("tcp", address) => Some(Self::Tcp(address.parse().ok()?)),
            _ => None,
        }
    }

    /// A port of the loopback interface that is free now.
    ///
    /// # Errors
    /// There is none.
    pub fn free_port() -> Result<Self> {
        let bound = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
        bound.map(Self::Tcp).map_err(Error::io("find a free port"))
    }

    /// The URI of the export with this name.
    pub fn uri_of(&self, export: &str) -> String {
        match self {
            Self::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            Self::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }

    /// The URI of the export without a name.
    pub fn uri(&self) -> String {
        self.uri_of("")
    }

    /// A stream to it. Every wait on it ends after `limit`.
    ///
    /// # Errors
    /// It is refused.
    pub fn connect(&self, limit: Duration) -> io::Result<File> {
        let fd: OwnedFd = match self {
            Self::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(limit))?;
                stream.set_write_timeout(Some(limit))?;
                stream.into()
            }
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(limit))?;
                stream.set_write_timeout(Some(limit))?;
                stream.into()
            }
        };
        Ok(File::from(fd))
    }

    /// Whether a server is there: greets it and takes leave.
    pub fn answers(&self) -> bool {
        let leave =
            |mut stream: File| try_greet(&mut stream).and_then(|()| stream.write_all(&option(wire::ABORT, &[])));
        self.connect(SOON).and_then(leave).is_ok()
    }
}

/// A command's number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the protocol's own names")]
pub enum Kind {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    Cache = 5,
    WriteZeroes = 6,
    BlockStatus = 7,
}

/// Magic numbers and bounds of the protocol.
pub mod wire {
    /// "NBDMAGIC"
    pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
    /// Fixed newstyle, no zeros.
    pub const FLAGS: u16 = 3;
    /// "IHAVEOPT"
    pub const OPTION: u64 = 0x4948_4156_454f_5054;
    /// Begins the reply to an option.
    pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
    /// Begins a request.
    pub const REQUEST: u32 = 0x2560_9513;
    /// Begins a simple reply.
    pub const REPLY: u32 = 0x6744_6698;
    /// NBD_OPT_EXPORT_NAME
    pub const EXPORT_NAME: u32 = 1;
    /// NBD_OPT_ABORT
    pub const ABORT: u32 = 2;
    /// NBD_OPT_LIST
    pub const LIST: u32 = 3;
    /// NBD_OPT_INFO
    pub const INFO: u32 = 6;
    /// NBD_OPT_GO
    pub const GO: u32 = 7;
    /// NBD_REP_ACK
    pub const ACK: u32 = 1;
    /// NBD_REP_ERR_UNSUP
    pub const UNSUPPORTED: u32 = 0x8000_0001;
    /// NBD_REP_ERR_UNKNOWN
    pub const UNKNOWN: u32 = 0x8000_0006;
    /// Most bytes that a request may carry.
    pub const PAYLOAD_MAX: u32 = 32 << 20;
}

/// A request, as 28 bytes.
pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[0..4].copy_from_slice(&wire::REQUEST.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..28].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// A write with its bytes, as it goes over the wire.
pub fn write_request(cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).expect("a short write");
    [&request(Kind::Write as u16, 0, cookie, offset, len)[..], data].concat()
}

/// An option of the handshake.
pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION.to_be_bytes().to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).expect("a short option").to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// The data of NBD_OPT_GO and NBD_OPT_INFO for this export, with no information asked for.
pub fn go(export: &str) -> Vec<u8> {
    let mut data = u32::try_from(export.len()).expect("a short name").to_be_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&[0, 0]);
    data
}

/// Reads exactly `N` bytes.
///
/// # Errors
/// The stream ends, or waits too long.
pub fn bytes<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Reads the greeting and answers with the flags of a modern client: no zeros at the end.
///
/// # Errors
/// The stream ends, or this is no NBD server (`InvalidData`).
pub fn try_greet(stream: &mut File) -> io::Result<()> {
    let greeting: [u8; 18] = bytes(stream)?;
    let wanted = [&wire::MAGIC.to_be_bytes()[..], &wire::OPTION.to_be_bytes(), &wire::FLAGS.to_be_bytes()].concat();
    if greeting[..] != wanted {
        return Err(wrong("no greeting of NBD's fixed newstyle handshake"));
    }
    stream.write_all(&u32::from(wire::FLAGS).to_be_bytes())
}

/// [`try_greet`], and fails when this is no NBD server.
///
/// # Errors
/// The stream ends.
pub fn greet(stream: &mut File) -> io::Result<()> {
    sound(try_greet(stream))
}

/// Fails when the server said what is wrong; that it said nothing is for the caller to judge.
fn sound<T: std::fmt::Debug>(said: io::Result<T>) -> io::Result<T> {
    assert!(!said.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::InvalidData), "{said:?}");
    said
}

/// Reads one reply to an option: its kind and its data.
///
/// # Errors
/// The stream ends, or waits too long.
pub fn option_reply(stream: &mut File, option: u32) -> io::Result<(u32, Vec<u8>)> {
    let head: [u8; 20] = bytes(stream)?;
    assert_eq!(head[..8], wire::OPTION_REPLY.to_be_bytes());
    assert_eq!(head[8..12], option.to_be_bytes());
    let number = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let mut data = vec![0; number(16) as usize];
    stream.read_exact(&mut data)?;
    Ok((number(12), data))
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
