//! The stream of a handshake, in the clear or encrypted. Every wait ends at the deadline.

use std::{
    io::{self, ErrorKind, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
};
use rustls::ClientConnection;

/// A non-blocking socket as std's traits need it, without signals.
#[derive(Debug)]
pub(crate) struct Raw<'a>(pub(crate) BorrowedFd<'a>);

impl Read for Raw<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (read, _) = rustix::io::retry_on_intr(|| recv(self.0, &mut *buffer, RecvFlags::DONTWAIT))?;
        Ok(read)
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(rustix::io::retry_on_intr(|| send(self.0, bytes, flags))?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The stream of a handshake.
#[derive(Debug)]
pub(super) struct Stream {
    socket: OwnedFd,
    tls: Option<Box<ClientConnection>>,
    deadline: Instant,
}

impl Stream {
    pub(super) const fn new(socket: OwnedFd, deadline: Instant) -> Self {
        Self { socket, tls: None, deadline }
    }

    pub(super) fn into_parts(self) -> (OwnedFd, Option<Box<ClientConnection>>) {
        (self.socket, self.tls)
    }

    pub(super) const fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// From now on everything is encrypted. Nothing of the server may have been read ahead: this stream never does.
    pub(super) fn encrypt(&mut self, mut tls: ClientConnection) -> io::Result<()> {
        while tls.is_handshaking() {
            exchange(&mut tls, &self.socket, self.deadline)?;
        }
        self.tls = Some(Box::new(tls));
        self.flush()
    }

    /// Fills `buffer`.
    pub(super) fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            let result = match &mut self.tls {
                None => Raw(self.socket.as_fd()).read(&mut buffer[filled..]),
                Some(tls) => tls.reader().read(&mut buffer[filled..]),
            };
            match result {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => filled += read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => match &mut self.tls {
                    None => wait(&self.socket, PollFlags::IN, self.deadline)?,
                    Some(tls) => exchange(tls, &self.socket, self.deadline)?,
                },
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends all bytes.
    pub(super) fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let result = match &mut self.tls {
                None => Raw(self.socket.as_fd()).write(bytes),
                Some(tls) => tls.writer().write(bytes),
            };
            match result {
                Ok(0) => self.flush()?,
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    wait(&self.socket, PollFlags::OUT, self.deadline)?;
                }
                Err(error) => return Err(error),
            }
        }
        self.flush()
    }

    /// Sends what TLS has encrypted.
    fn flush(&mut self) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        while tls.wants_write() {
            send_encrypted(tls, &self.socket, self.deadline)?;
        }
        Ok(())
    }
}

fn send_encrypted(tls: &mut ClientConnection, socket: &OwnedFd, deadline: Instant) -> io::Result<()> {
    match tls.write_tls(&mut Raw(socket.as_fd())) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => wait(socket, PollFlags::OUT, deadline),
        Err(error) => Err(error),
    }
}

/// One step of TLS: sends what there is to send, else waits for what comes.
fn exchange(tls: &mut ClientConnection, socket: &OwnedFd, deadline: Instant) -> io::Result<()> {
    if tls.wants_write() {
        return send_encrypted(tls, socket, deadline);
    }
    match tls.read_tls(&mut Raw(socket.as_fd())) {
        Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
        Ok(_) => {
            let processed = tls.process_new_packets();
            if processed.is_err() {
                // The alert tells the server why; the error is the processing's.
                let _ = tls.write_tls(&mut Raw(socket.as_fd()));
            }
            processed.map(|_| ()).map_err(io::Error::other)
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => wait(socket, PollFlags::IN, deadline),
        Err(error) => Err(error),
    }
}

/// Waits until the socket can do what `flags` say.
fn wait(socket: &OwnedFd, flags: PollFlags, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(socket, flags)], Some(&timeout)) {
        Ok(0) => Err(ErrorKind::TimedOut.into()),
        // Interrupted: the caller tries again, and waits for what is left of the time.
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
