//! A client that has one request under way at a time, and wants nothing of a server but simple replies.
//!
//! ```text
//! greeting  NBDMAGIC IHAVEOPT flags:16              ◀─ server
//!           flags:32                                ─▶ server
//! option    IHAVEOPT option:32 length:32 name       ─▶ server
//! export    size:64 flags:16                        ◀─ server
//! request   magic:32 flags:16 command:16 cookie:64 offset:64 length:32 [data]  ─▶
//! reply     magic:32 error:32 cookie:64 [data]                                 ◀─
//! ```

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    time::Duration,
};

use super::Address;
use crate::host::VOLUME;

const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// The server knows the fixed newstyle handshake and need not send padding.
const FIXED_NEWSTYLE_NO_ZEROES: u16 = 0b11;
const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
/// A server that is silent for so long hangs.
const SILENT_FOR: Duration = Duration::from_secs(30);

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A connected client.
pub struct Client {
    stream: Box<dyn Stream>,
    cookie: u64,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("cookie", &self.cookie).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects and chooses the volume.
    ///
    /// # Errors
    /// The operating system's; `InvalidData` when it is not NBD that the server speaks.
    pub fn connect(address: &Address) -> io::Result<Self> {
        let mut stream = greet(address)?;
        option(&mut stream, OPT_EXPORT_NAME, VOLUME.as_bytes())?;
        let _size_and_flags: [u8; 10] = take(&mut stream)?;
        Ok(Self { stream, cookie: 0 })
    }

    /// Reads all of `bytes`.
    ///
    /// # Errors
    /// The server's, by number, or the connection's.
    pub fn read(&mut self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.request(CMD_READ, offset, bytes.len(), &[])?;
        self.reply()?;
        self.stream.read_exact(bytes)
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.request(CMD_WRITE, offset, bytes.len(), bytes)?;
        self.reply()
    }

    fn request(&mut self, command: u16, offset: u64, length: usize, data: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        let length = u32::try_from(length).map_err(|_| wrong("a request that is too long"))?;
        let mut bytes = Vec::with_capacity(28 + data.len());
        bytes.extend(REQUEST_MAGIC.to_be_bytes());
        bytes.extend([0; 2]);
        bytes.extend(command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(data);
        self.stream.write_all(&bytes)
    }

    fn reply(&mut self) -> io::Result<()> {
        let magic = u32::from_be_bytes(take(&mut self.stream)?);
        let error = u32::from_be_bytes(take(&mut self.stream)?);
        let cookie = u64::from_be_bytes(take(&mut self.stream)?);
        if magic != REPLY_MAGIC || cookie != self.cookie {
            return Err(wrong("not the reply to the only request"));
        }
        // The protocol's errors have Linux's numbers.
        if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error.cast_signed())) }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.request(CMD_DISC, 0, 0, &[]);
    }
}

/// Whether a server is there: greets it and takes leave.
pub fn answers(address: &Address) -> bool {
    greet(address).is_ok_and(|mut stream| option(&mut stream, OPT_ABORT, &[]).is_ok())
}

fn greet(address: &Address) -> io::Result<Box<dyn Stream>> {
    let mut stream: Box<dyn Stream> = match address {
        Address::Unix(path) => {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(SILENT_FOR))?;
            Box::new(stream)
        }
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address)?;
            stream.set_read_timeout(Some(SILENT_FOR))?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
    };
    let (magic, option) = (u64::from_be_bytes(take(&mut stream)?), u64::from_be_bytes(take(&mut stream)?));
    let flags = u16::from_be_bytes(take(&mut stream)?);
    if magic != GREETING_MAGIC || option != OPTION_MAGIC || flags & FIXED_NEWSTYLE_NO_ZEROES != FIXED_NEWSTYLE_NO_ZEROES
    {
        return Err(wrong("no greeting of NBD's fixed newstyle handshake"));
    }
    stream.write_all(&u32::from(FIXED_NEWSTYLE_NO_ZEROES).to_be_bytes())?;
    Ok(stream)
}

fn option(stream: &mut impl Write, option: u32, data: &[u8]) -> io::Result<()> {
    let length = u32::try_from(data.len()).map_err(|_| wrong("an option that is too long"))?;
    let head = [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes(), data].concat();
    stream.write_all(&head)
}

fn take<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).map(|()| bytes)
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
