//! NBD: a volume with every front end, foreign clients, and a client of our own that decides on each byte it sends.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use crate::{
    host::Host,
    programs::need,
    run::{Output, run},
    volume::Volume,
    wait::SOON,
};

/// A foreign client may take this long.
const CLIENT_LIMIT: Duration = Duration::from_secs(60);

/// Where a volume is exported.
#[derive(Clone, Debug)]
pub enum Front {
    /// By a unix socket.
    Unix(PathBuf),
    /// By TCP.
    Tcp(SocketAddr),
}

impl Front {
    /// Reads what status prints, `unix:/run/v.sock` or `tcp:127.0.0.1:10809`.
    pub fn parse(address: &str) -> Self {
        match address.split_once(':') {
            Some(("unix", path)) => Self::Unix(path.into()),
            Some(("tcp", address)) => Self::Tcp(address.parse().expect("an address and a port")),
            _ => panic!("{address} is no address of an NBD front end"),
        }
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

    /// A stream to it. Every wait on it ends after [`SOON`].
    ///
    /// # Errors
    /// It is refused.
    pub fn try_stream(&self) -> io::Result<File> {
        let fd: OwnedFd = match self {
            Self::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(SOON))?;
                stream.set_write_timeout(Some(SOON))?;
                stream.into()
            }
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(SOON))?;
                stream.set_write_timeout(Some(SOON))?;
                stream.into()
            }
        };
        Ok(File::from(fd))
    }

    /// A stream to it.
    pub fn stream(&self) -> File {
        self.try_stream().unwrap_or_else(|e| panic!("connect to {self:?}: {e}"))
    }

    /// A client that has shaken hands.
    pub fn client(&self) -> Client {
        Client::over(self.stream()).unwrap_or_else(|e| panic!("shake hands with {self:?}: {e}"))
    }

    /// Has libnbd's shell do this, connected as `h`; without `h.set_strict_mode` it refuses to send what is wrong.
    /// `fails(errno, f, …)` is there for what has to fail. Gives what it printed.
    pub fn nbdsh(&self, script: &str) -> String {
        nbdsh(&["--base-allocation", "--uri", &self.uri()], script)
    }
}

/// What every script for nbdsh may use.
const PRELUDE: &str = "
def fails(errors, f, *a, **k):
    try:
        f(*a, **k)
    except nbd.Error as e:
        assert e.errno in errors.split(), (f.__name__, a, k, e.errno, e.string)
        return
    raise AssertionError((f.__name__, a, k, 'did not fail'))

def handle(uri):
    c = nbd.NBD()
    c.connect_uri(uri)
    return c
";

/// libnbd's shell. It is Debian's and wants Debian's Python, whichever Python comes first on PATH.
pub fn nbdsh(arguments: &[&str], script: &str) -> String {
    need("/usr/bin/nbdsh");
    let mut command = Command::new("/usr/bin/nbdsh");
    command.env("PATH", "/usr/bin:/bin").args(arguments).args(["-c", PRELUDE, "-c", script]);
    run(command, CLIENT_LIMIT).ok()
}

/// Runs another client.
pub fn client(program: &str, arguments: &[&str]) -> Output {
    need(program);
    let mut command = Command::new(program);
    command.args(arguments);
    run(command, CLIENT_LIMIT)
}

/// A volume that is a file, an export on a unix socket and an export on TCP.
#[derive(Debug)]
pub struct Exported<'a> {
    /// The volume.
    pub volume: Volume<'a>,
    /// On a unix socket.
    pub unix: Front,
    /// On TCP.
    pub tcp: Front,
}

impl<'a> Exported<'a> {
    /// Makes it, on two storage nodes.
    pub fn new(host: &'a Host, name: &str, size: &str) -> Self {
        let volume = host.create(name, size, 2);
        Self::attach(volume)
    }

    /// Attaches a volume to all three front ends.
    pub fn attach(volume: Volume<'a>) -> Self {
        let unix = format!("unix:{}", volume.host.file(&format!("{}.sock", volume.name)).display());
        volume.attach(&["--nbd", &unix, "--nbd", "tcp:127.0.0.1:0"]);
        let fronts = fronts(&volume);
        let [Front::Unix(_), Front::Tcp(address)] = fronts.as_slice() else { panic!("{:?}", volume.status()) };
        assert_ne!(address.port(), 0, "the port that was chosen");
        let (unix, tcp) = (fronts[0].clone(), fronts[1].clone());
        Self { volume, unix, tcp }
    }

    /// Both NBD front ends.
    pub const fn both(&self) -> [&Front; 2] {
        [&self.unix, &self.tcp]
    }

    /// Clients that are connected, as status tells.
    pub fn connections(&self) -> u64 {
        let status = self.volume.status();
        let fronts = status.0["frontends"].as_array().expect("front ends");
        fronts.iter().filter_map(|front| front["connections"].as_u64()).sum()
    }

    /// Waits until the last client has gone and detaches the volume in order.
    pub fn detach(&self) {
        crate::wait::until_true("every client has gone", || self.connections() == 0);
        self.volume.detach();
    }
}

/// The NBD front ends of a volume, those on unix sockets first.
pub fn fronts(volume: &Volume<'_>) -> Vec<Front> {
    let status = volume.status();
    let fronts = status.0["frontends"].as_array().expect("front ends");
    let fronts = fronts.iter().filter(|front| front["kind"] == "nbd");
    let mut fronts: Vec<Front> = fronts.map(|f| Front::parse(f["address"].as_str().expect("an address"))).collect();
    fronts.sort_by_key(|front| matches!(front, Front::Tcp(_)));
    fronts
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
/// The stream ends, or this is no NBD server.
pub fn greet(stream: &mut File) -> io::Result<()> {
    let greeting: [u8; 18] = bytes(stream)?;
    assert_eq!(greeting[..8], wire::MAGIC.to_be_bytes());
    assert_eq!(greeting[8..16], wire::OPTION.to_be_bytes());
    assert_eq!(greeting[16..], [0, 3], "fixed newstyle, no zeros");
    stream.write_all(&3u32.to_be_bytes())
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

/// A client that has shaken hands, without structured replies: what comes back is a header, and the bytes of a read.
#[derive(Debug)]
pub struct Client {
    /// The stream, for whoever wants to send less than a request.
    pub stream: File,
    /// The export's size.
    pub size: u64,
    /// The export's flags.
    pub flags: u16,
}

impl Client {
    /// Shakes hands for the export without a name.
    ///
    /// # Errors
    /// The stream ends, or waits too long.
    pub fn over(mut stream: File) -> io::Result<Self> {
        greet(&mut stream)?;
        stream.write_all(&option(wire::GO, &go("")))?;
        let (mut size, mut flags) = (0, 0);
        loop {
            let (kind, data) = option_reply(&mut stream, wire::GO)?;
            if kind == wire::ACK {
                return Ok(Self { stream, size, flags });
            }
            assert_eq!(kind, 3, "NBD_REP_INFO, or an end");
            if data[..2] == [0, 0] {
                size = u64::from_be_bytes(data[2..10].try_into().expect("eight bytes"));
                flags = u16::from_be_bytes([data[10], data[11]]);
            }
        }
    }

    /// Sends a request.
    ///
    /// # Errors
    /// The stream has ended.
    pub fn send(&mut self, kind: Kind, cookie: u64, offset: u64, len: u32, payload: &[u8]) -> io::Result<()> {
        let mut bytes = request(kind as u16, 0, cookie, offset, len).to_vec();
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes)
    }

    /// Reads the head of a reply: cookie and error.
    ///
    /// # Errors
    /// The stream ends, or waits too long.
    pub fn reply(&mut self) -> io::Result<(u64, u32)> {
        let head: [u8; 16] = bytes(&mut self.stream)?;
        assert_eq!(head[..4], wire::REPLY.to_be_bytes(), "a simple reply");
        let error = u32::from_be_bytes(head[4..8].try_into().expect("four bytes"));
        Ok((u64::from_be_bytes(head[8..].try_into().expect("eight bytes")), error))
    }

    /// Reads the head of a reply, and fails unless it is a good one to this request.
    pub fn good(&mut self, cookie: u64) {
        assert_eq!(self.reply().expect("a reply"), (cookie, 0));
    }

    /// Writes, and waits for the reply.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let len = u32::try_from(data.len()).expect("a short write");
        self.send(Kind::Write, offset, offset, len, data).expect("send a write");
        self.good(offset);
    }

    /// Reads.
    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.send(Kind::Read, offset, offset, len, &[]).expect("send a read");
        self.good(offset);
        self.payload(len)
    }

    /// The bytes that follow the head of a read's reply.
    pub fn payload(&mut self, len: u32) -> Vec<u8> {
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data).expect("the bytes of a read");
        data
    }

    /// Flushes.
    pub fn flush(&mut self) {
        self.send(Kind::Flush, 1, 0, 0, &[]).expect("send a flush");
        self.good(1);
    }

    /// Says good-bye.
    pub fn end(mut self) {
        self.send(Kind::Disconnect, 0, 0, 0, &[]).expect("say good-bye");
        let mut rest = Vec::new();
        assert_eq!(self.stream.read_to_end(&mut rest).expect("the end"), 0, "nothing comes after a good-bye");
    }
}
