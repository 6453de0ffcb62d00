//! The memory of an in-flight table (`everdisk_proto::in_flight`), mapped.

use std::{
    io::{self, IoSlice},
    ops::{Deref, DerefMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    slice,
    sync::atomic::Ordering::{Acquire, Relaxed, Release},
};

use everdisk_proto::in_flight::{BYTES, INBOX_BYTES, MAGIC, TABLE_BYTES, Table, VERSION};
use rustix::{
    fs::{FallocateFlags, MemfdFlags, SealFlags},
    mm::{MapFlags, MlockFlags, ProtFlags},
};

use crate::{
    cursor::{finish, message, position, prepare},
    memory::Mapping,
};

/// The table of a connection.
#[derive(Debug)]
pub struct InFlight {
    mapping: Mapping,
    fd: OwnedFd,
}

/// The inbox of a connection, for the process that made it. That process alone writes there. The interface reads there
/// when that process is dead.
#[derive(Debug)]
pub struct Inbox(Mapping);

impl InFlight {
    /// A new, empty table with its inbox: a memfd that can neither shrink nor grow, with its memory reserved.
    ///
    /// # Errors
    /// The operating system's.
    pub fn create() -> io::Result<(Self, Inbox)> {
        let fd = rustix::fs::memfd_create("everdisk-in-flight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, BYTES as u64)?;
        // Reserved now: later, a process that touches a page without memory would be killed.
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, BYTES as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let mapping = map(&fd, 0, TABLE_BYTES)?;
        // The kernel writes the cursor even for a thread that is being killed, and can do so only where the page is
        // resident. Where the lock limit is reached it goes unlocked: a page in use at every request is hardly swapped out.
        // SAFETY: the range is the mapping just made.
        let _ = unsafe { rustix::mm::mlock_with(mapping.base.as_ptr().cast(), TABLE_BYTES, MlockFlags::empty()) };
        let inbox = Inbox(map(&fd, TABLE_BYTES, INBOX_BYTES)?);
        let table = Self { mapping, fd };
        table.version.store(VERSION, Relaxed);
        table.magic.store(MAGIC, Release);
        Ok((table, inbox))
    }

    /// Maps the table that another process made, after checking that it is one.
    ///
    /// # Errors
    /// `InvalidData` when it is not, else the operating system's.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let bad = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        if u64::try_from(rustix::fs::fstat(&fd)?.st_size) != Ok(BYTES as u64) {
            return bad("an in-flight table has another length than this program's");
        }
        if !rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
            return bad("an in-flight table is not sealed");
        }
        let table = Self { mapping: map(&fd, 0, TABLE_BYTES)?, fd };
        if table.magic.load(Acquire) != MAGIC || table.version.load(Relaxed) != VERSION {
            return bad("an in-flight table has another layout than this program's");
        }
        Ok(table)
    }

    /// Sends parts one behind the other, as many bytes as the socket takes without waiting.
    ///
    /// # Errors
    /// The operating system's, EAGAIN among them.
    pub fn send(&self, socket: BorrowedFd<'_>, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let call = prepare(&self.sent, message(parts.as_ptr().cast(), parts.len()));
        // SAFETY: `call` is a message header in the live table whose iovecs are `parts` (an IoSlice has the layout of an iovec),
        // which outlive the call, and whose bytes the kernel only reads.
        let done = unsafe { libc::sendmmsg(socket.as_raw_fd(), call, 1, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        finish(&self.sent, done)
    }

    /// How far the socket was written.
    pub fn sent(&self) -> u64 {
        position(&self.sent)
    }

    /// A copy of what lies in the inbox, old bytes among it. Its writer is dead.
    ///
    /// # Errors
    /// The operating system's.
    pub fn inbox(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; INBOX_BYTES];
        let read = rustix::io::pread(&self.fd, &mut bytes, TABLE_BYTES as u64)?;
        assert_eq!(read, INBOX_BYTES, "a memfd that is sealed has its length");
        Ok(bytes)
    }
}

/// Maps a part of the memfd.
fn map(fd: &OwnedFd, at: usize, len: usize) -> io::Result<Mapping> {
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
    // SAFETY: a fresh mapping at an address the kernel chooses; it aliases nothing of ours.
    let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, flags, fd, at as u64) }?;
    let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
    Ok(Mapping { base, len })
}

impl Deref for InFlight {
    type Target = Table;
    fn deref(&self) -> &Table {
        const { assert!(align_of::<Table>() <= 4096) };
        // SAFETY: the mapping, sealed so that it stays, holds a Table; every field of it is an atomic valid for all bit patterns,
        // so other processes and the kernel may change it at any time.
        unsafe { self.mapping.base.cast::<Table>().as_ref() }
    }
}

impl AsFd for InFlight {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Deref for Inbox {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: a live mapping of this length, initialised (zeroed by the kernel), that no other process writes.
        unsafe { slice::from_raw_parts(self.0.base.as_ptr(), self.0.len) }
    }
}

impl DerefMut for Inbox {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes this the only borrow.
        unsafe { slice::from_raw_parts_mut(self.0.base.as_ptr(), self.0.len) }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn another_process_sees_how_far_the_socket_was_written_and_what_was_received() {
        let (table, mut inbox) = InFlight::create().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let parts = [IoSlice::new(b"head"), IoSlice::new(b"payload")];
        assert_eq!(table.send(ours.as_fd(), &parts).unwrap(), 11);
        let mut got = [0; 11];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"headpayload");
        inbox[INBOX_BYTES - 3..].copy_from_slice(b"end");
        table.entries[255].cookie.store(9, Release);
        let seen = InFlight::adopt(table.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!((seen.sent(), seen.entries[255].cookie.load(Acquire)), (11, 9));
        assert_eq!(seen.inbox().unwrap()[INBOX_BYTES - 4..], *b"\0end");
    }

    #[test]
    fn a_full_socket_takes_a_part_and_the_position_says_how_much() {
        let (table, _inbox) = InFlight::create().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let bytes = vec![7; 8 << 20];
        let first = table.send(ours.as_fd(), &[IoSlice::new(&bytes)]).unwrap();
        assert!(first < bytes.len() && table.sent() == first as u64);
        assert_eq!(table.send(ours.as_fd(), &[IoSlice::new(&bytes)]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(table.sent(), first as u64, "nothing was sent");
        theirs.read_exact(&mut vec![0; first]).unwrap();
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let fd = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        let said = |fd: &OwnedFd| InFlight::adopt(fd.try_clone().unwrap()).unwrap_err().to_string();
        assert!(said(&fd).contains("length"));
        rustix::fs::ftruncate(&fd, BYTES as u64).unwrap();
        assert!(said(&fd).contains("sealed"));
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        assert!(said(&fd).contains("layout"));
    }
}
