//! A client that decides on each byte it sends, and wants nothing of a server but simple replies.

use std::{
    fs::File,
    io::{self, Read, Write},
};

use super::{Kind, bytes, go, greet, option, option_reply, request, sound, try_greet, wire, wrong};

/// A client that has shaken hands, without structured replies: what comes back is a header, and the bytes of a read. The
/// cookie of its own requests is their offset.
#[derive(Debug)]
pub struct Client {
    /// The stream, for tests that send less than a request.
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

    /// Shakes hands for this export by the old option, which every server knows.
    ///
    /// # Errors
    /// The stream ends, or waits too long.
    pub fn of_export(mut stream: File, export: &str) -> io::Result<Self> {
        try_greet(&mut stream)?;
        stream.write_all(&option(wire::EXPORT_NAME, export.as_bytes()))?;
        let size = u64::from_be_bytes(bytes(&mut stream)?);
        let flags = u16::from_be_bytes(bytes(&mut stream)?);
        Ok(Self { stream, size, flags })
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

    /// Reads the head of a reply: cookie and error. Fails when it is none.
    ///
    /// # Errors
    /// The stream ends, or waits too long.
    pub fn reply(&mut self) -> io::Result<(u64, u32)> {
        sound(self.try_reply())
    }

    fn try_reply(&mut self) -> io::Result<(u64, u32)> {
        let magic = u32::from_be_bytes(bytes(&mut self.stream)?);
        let error = u32::from_be_bytes(bytes(&mut self.stream)?);
        let cookie = u64::from_be_bytes(bytes(&mut self.stream)?);
        if magic == wire::REPLY { Ok((cookie, error)) } else { Err(wrong("no simple reply")) }
    }

    /// Reads the head of a reply, and fails unless it is a good one to this request.
    pub fn good(&mut self, cookie: u64) {
        assert_eq!(self.reply().expect("a reply"), (cookie, 0));
    }

    /// Waits for the reply to the only request under way.
    fn done(&mut self, cookie: u64) -> io::Result<()> {
        match self.try_reply()? {
            (other, _) if other != cookie => Err(wrong("not the reply to the only request")),
            (_, 0) => Ok(()),
            // The protocol's errors have Linux's numbers.
            (_, error) => Err(io::Error::from_raw_os_error(error.cast_signed())),
        }
    }

    /// Writes, and waits for the reply.
    ///
    /// # Errors
    /// The server's, by number, or the stream's.
    pub fn try_write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).expect("a short write");
        self.send(Kind::Write, offset, offset, len, data)?;
        self.done(offset)
    }

    /// Reads all of `data`.
    ///
    /// # Errors
    /// As [`Client::try_write`].
    pub fn try_read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).expect("a short read");
        self.send(Kind::Read, offset, offset, len, &[])?;
        self.done(offset)?;
        self.stream.read_exact(data)
    }

    /// Writes, and waits for the reply.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.try_write(offset, data).expect("a write");
    }

    /// Reads.
    pub fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        let mut data = vec![0; len as usize];
        self.try_read(offset, &mut data).expect("a read");
        data
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
