//! Bytes that were received and not read yet, and where more come from.

use std::{
    io::{self, ErrorKind, IoSliceMut, Read},
    os::fd::{AsFd, OwnedFd},
};

use everdisk_sys::in_flight;
use rustix::{
    io::retry_on_intr,
    net::{RecvAncillaryBuffer, RecvFlags, recvmsg},
};
use rustls::ClientConnection;

use crate::connect::Raw;

/// Bytes that were received and not read yet.
#[derive(Debug)]
pub(crate) struct Inbox {
    bytes: in_flight::Inbox,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(crate) fn new(bytes: in_flight::Inbox) -> Self {
        Self { bytes, start: 0, end: 0 }
    }

    pub(crate) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(crate) fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        assert!(self.start <= self.end, "only what was received is consumed");
    }

    /// Receives once without waiting: first into `direct`, which is filled only when nothing is unread, and what is
    /// over into the inbox. The bytes that went into `direct`. An error of the kind `WouldBlock` says that nothing is there.
    pub(crate) fn receive(
        &mut self,
        socket: &OwnedFd,
        tls: Option<&mut ClientConnection>,
        direct: &mut [u8],
    ) -> io::Result<usize> {
        // What is unread is less than a head, so this is cheap.
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let spare = &mut self.bytes[self.end..];
        let received = match tls {
            None => {
                let into = &mut [IoSliceMut::new(direct), IoSliceMut::new(spare)];
                let mut nothing = RecvAncillaryBuffer::default();
                retry_on_intr(|| recvmsg(socket, into, &mut nothing, RecvFlags::DONTWAIT))?.bytes
            }
            Some(tls) if direct.is_empty() => decrypt(socket, tls, spare)?,
            Some(tls) => decrypt(socket, tls, direct)?,
        };
        if received == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let into_direct = received.min(direct.len());
        self.end += received - into_direct;
        Ok(into_direct)
    }
}

/// Reads plain bytes, and encrypted ones from the socket when there are no plain ones.
fn decrypt(socket: &OwnedFd, tls: &mut ClientConnection, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match tls.reader().read(into) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            other => return other,
        }
        if tls.read_tls(&mut Raw(socket.as_fd()))? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        tls.process_new_packets().map_err(io::Error::other)?;
    }
}
