//! A small server in the test, whose replies a test can spoil.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread::{self, JoinHandle},
    time::Duration,
};

use everdisk_proto::nbd::{
    NbdAddress,
    wire::{
        ChunkHead, Greeting, InfoExport, MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHead, OptionReplyHead,
        REQUEST_MAGIC, RequestHead, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, SimpleReply, chunk, cmd, opt, rep,
        transmission_flag as flag,
    },
};
use everdisk_store_nbd::{Address, Client, Config, Tls};
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes, network_endian::U64};

pub(crate) const SIZE: u64 = 1 << 20;

/// The bytes of the export from an offset on. Neighbours differ, and so do ranges that are shifted against each other.
pub(crate) fn content(offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(|at| u8::try_from((at.wrapping_mul(2_654_435_761) >> 16) & 0xff).unwrap()).collect()
}

/// A request as the server sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

/// What a server does with its connections, by their number.
pub(crate) type Serve = Box<dyn FnMut(usize, UnixStream) + Send>;

/// A server that runs a script.
pub(crate) struct Fake {
    address: Address,
    _directory: TempDir,
    _thread: JoinHandle<()>,
}

impl Fake {
    pub(crate) fn new(mut serve: Serve) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let serve_all = move || {
            for (number, stream) in listener.incoming().enumerate() {
                let stream = stream.unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
                serve(number, stream);
            }
        };
        // It sleeps in accept(2) when the test ends, and goes with the process.
        let thread = thread::spawn(serve_all);
        Self { address: at(&path), _directory: directory, _thread: thread }
    }

    pub(crate) fn address(&self) -> Address {
        self.address.clone()
    }

    pub(crate) fn client(&self, config: Config) -> Client {
        Client::connect(self.address.clone(), config).unwrap()
    }
}

pub(crate) fn at(path: &Path) -> Address {
    Address { server: NbdAddress::Unix(path.to_owned()), export: String::new(), tls: Tls::Off }
}

/// Sends; the client may have hung up, which is its right.
pub(crate) fn send(stream: &mut UnixStream, bytes: &[u8]) -> bool {
    stream.write_all(bytes).is_ok()
}

pub(crate) fn greeting(flags: u16) -> Vec<u8> {
    let greeting = Greeting { magic: MAGIC.into(), option_magic: OPTION_MAGIC.into(), flags: flags.into() };
    greeting.as_bytes().to_vec()
}

pub(crate) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let (magic, option, kind, len) = (OPTION_REPLY_MAGIC.into(), option.into(), kind.into(), len.into());
    [OptionReplyHead { magic, option, kind, len }.as_bytes(), data].concat()
}

/// The export, with one connection.
pub(crate) fn export() -> Vec<u8> {
    export_with(0)
}

fn export_with(flags: u16) -> Vec<u8> {
    let flags = flags | flag::HAS_FLAGS | flag::SEND_FLUSH;
    InfoExport { kind: 0.into(), size: SIZE.into(), flags: flags.into() }.as_bytes().to_vec()
}

/// Reads an option.
pub(crate) fn read_option(stream: &mut UnixStream) -> Option<u32> {
    let mut head = [0; 16];
    stream.read_exact(&mut head).ok()?;
    let head = OptionHead::read_from_bytes(&head).unwrap();
    let mut data = vec![0; usize::try_from(head.len.get()).unwrap()];
    stream.read_exact(&mut data).ok()?;
    Some(head.option.get())
}

/// A handshake as it should be; whether the client went through with it.
pub(crate) fn handshake(stream: &mut UnixStream, structured: bool) -> bool {
    handshake_with(stream, structured, 0)
}

/// As [`handshake`], with further flags of the export.
pub(crate) fn handshake_with(stream: &mut UnixStream, structured: bool, flags: u16) -> bool {
    if !send(stream, &greeting(3)) || stream.read_exact(&mut [0; 4]).is_err() {
        return false;
    }
    while let Some(option) = read_option(stream) {
        let reply = match option {
            opt::STRUCTURED_REPLY if structured => option_reply(option, rep::ACK, &[]),
            opt::GO => {
                [option_reply(option, rep::INFO, &export_with(flags)), option_reply(option, rep::ACK, &[])].concat()
            }
            _ => option_reply(option, rep::ERR_UNSUP, &[]),
        };
        if !send(stream, &reply) {
            return false;
        }
        if option == opt::GO {
            return true;
        }
    }
    false
}

/// Reads a request, with the data of a write. `None`: the client has gone.
pub(crate) fn read_request(stream: &mut UnixStream) -> Option<Request> {
    let mut head = [0; 28];
    stream.read_exact(&mut head).ok()?;
    let head = RequestHead::read_from_bytes(&head).unwrap();
    assert_eq!(head.magic.get(), REQUEST_MAGIC, "the client is out of step");
    let (command, len) = (head.command.get(), head.len.get());
    if command == cmd::WRITE {
        let mut data = vec![0; usize::try_from(len).unwrap()];
        stream.read_exact(&mut data).ok()?;
    }
    (command != cmd::DISC).then(|| Request { command, cookie: head.cookie.get(), offset: head.offset.get(), len })
}

pub(crate) fn simple(cookie: u64, error: u32) -> Vec<u8> {
    SimpleReply { magic: SIMPLE_REPLY_MAGIC.into(), error: error.into(), cookie: cookie.into() }.as_bytes().to_vec()
}

pub(crate) fn part(cookie: u64, kind: u16, last: bool, body: &[u8]) -> Vec<u8> {
    head(cookie, kind, last, u32::try_from(body.len()).unwrap(), body)
}

/// A chunk whose head may lie about the length of its body.
pub(crate) fn head(cookie: u64, kind: u16, last: bool, len: u32, body: &[u8]) -> Vec<u8> {
    let flags = if last { chunk::FLAG_DONE } else { 0 };
    let (magic, flags, kind) = (STRUCTURED_REPLY_MAGIC.into(), flags.into(), kind.into());
    [ChunkHead { magic, flags, kind, cookie: cookie.into(), len: len.into() }.as_bytes(), body].concat()
}

pub(crate) fn data(cookie: u64, last: bool, offset: u64, bytes: &[u8]) -> Vec<u8> {
    part(cookie, chunk::OFFSET_DATA, last, &[U64::new(offset).as_bytes(), bytes].concat())
}

/// The right reply.
pub(crate) fn answer(request: &Request, structured: bool) -> Vec<u8> {
    match (request.command, structured) {
        (cmd::READ, false) => [simple(request.cookie, 0), content(request.offset, request.len.into())].concat(),
        (cmd::READ, true) => data(request.cookie, true, request.offset, &content(request.offset, request.len.into())),
        _ => simple(request.cookie, 0),
    }
}

/// Serves as it should be, until the client goes.
pub(crate) fn serve(mut stream: UnixStream, structured: bool) {
    if !handshake(&mut stream, structured) {
        return;
    }
    while let Some(request) = read_request(&mut stream) {
        if !send(&mut stream, &answer(&request, structured)) {
            return;
        }
    }
}
