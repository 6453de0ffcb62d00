//! The memory of an NBD connection, mapped, and the system calls that keep its cursors.
//!
//! Each ring is mapped twice, one mapping behind the other, so that data that begins near its end is contiguous.

use std::{
    io,
    ops::Deref,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::Ordering::{Acquire, Relaxed, Release},
};

use everdisk_proto::connection::{BYTES, INPUT_BYTES, MAGIC, OUTPUT_BYTES, PAGE_BYTES, Page, VERSION};
use rustix::{
    fs::{MemfdFlags, SealFlags},
    mm::{Advice, MapFlags, MlockFlags, ProtFlags},
};

use crate::cursor::{finish, message, position, prepare};

const INPUT_AT: usize = PAGE_BYTES;
const OUTPUT_AT: usize = INPUT_AT + 2 * INPUT_BYTES;
const MAPPED_BYTES: usize = OUTPUT_AT + 2 * OUTPUT_BYTES;

/// The part of the input ring that small requests keep to.
const POPULATED_INPUT_BYTES: usize = 256 << 10;

/// The memory of a connection. The gate decides which worker may write which part of it, and when: one worker at a time
/// is admitted to each stream.
#[derive(Debug)]
pub struct ConnectionMemory {
    base: NonNull<u8>,
    fd: OwnedFd,
}

// SAFETY: the mapping is plain memory that belongs to this value; nothing about it is bound to a thread.
unsafe impl Send for ConnectionMemory {}
// SAFETY: what can be reached through a shared reference are atomics, and bytes that are copied in and out through raw
// pointers; no Rust reference to the rings ever exists.
unsafe impl Sync for ConnectionMemory {}

impl ConnectionMemory {
    /// New memory for an unused connection: a memfd that can neither shrink nor grow.
    ///
    /// # Errors
    /// The operating system's.
    pub fn create() -> io::Result<Self> {
        let fd = rustix::fs::memfd_create("everdisk-nbd", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, BYTES as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let memory = Self::map(fd)?;
        memory.version.store(VERSION, Relaxed);
        memory.magic.store(MAGIC, Release);
        Ok(memory)
    }

    /// Maps memory that another process lent, after checking that it is that of a connection.
    ///
    /// # Errors
    /// `InvalidData` when it is not, else the operating system's.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let bad = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        if u64::try_from(rustix::fs::fstat(&fd)?.st_size) != Ok(BYTES as u64) {
            return bad("the memory of a connection has another length than this program's");
        }
        if !rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
            return bad("the memory of a connection is not sealed");
        }
        let memory = Self::map(fd)?;
        if memory.magic.load(Acquire) != MAGIC || memory.version.load(Relaxed) != VERSION {
            return bad("the memory of a connection has another layout than this program's");
        }
        memory.populate(INPUT_AT, POPULATED_INPUT_BYTES);
        memory.populate(OUTPUT_AT, OUTPUT_BYTES);
        Ok(memory)
    }

    fn map(fd: OwnedFd) -> io::Result<Self> {
        let none = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a fresh mapping, without access, at an address the kernel chooses; it aliases nothing of ours.
        let base = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), MAPPED_BYTES, none.0, none.1) }?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // From here on dropping it unmaps the whole, whatever was mapped into it.
        let memory = Self { base, fd };
        let output = INPUT_AT + INPUT_BYTES;
        memory.place(0, PAGE_BYTES, 0)?;
        memory.place(INPUT_AT, INPUT_BYTES, INPUT_AT)?;
        memory.place(INPUT_AT + INPUT_BYTES, INPUT_BYTES, INPUT_AT)?;
        memory.place(OUTPUT_AT, OUTPUT_BYTES, output)?;
        memory.place(OUTPUT_AT + OUTPUT_BYTES, OUTPUT_BYTES, output)?;
        // The kernel writes the cursors even for a thread that is being killed, and can do so only where the page is resident.
        // Where the lock limit is reached it goes unlocked: a page in use at every request is hardly swapped out.
        // SAFETY: the range is the first page of the mapping just made.
        let _ = unsafe { rustix::mm::mlock_with(memory.base.as_ptr().cast(), PAGE_BYTES, MlockFlags::empty()) };
        Ok(memory)
    }

    /// Maps a part of the memfd to a place in the reservation.
    fn place(&self, at: usize, len: usize, from: usize) -> io::Result<()> {
        // SAFETY: at is one of the constants above, inside the reservation.
        let address = unsafe { self.base.add(at) };
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: [at, at + len) lies inside the reservation, which belongs to this value and which nobody has a reference into.
        unsafe {
            rustix::mm::mmap(
                address.as_ptr().cast(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
                &self.fd,
                from as u64,
            )
        }?;
        Ok(())
    }

    /// Maps pages before they are needed, so that the first requests after a hand-over do not take page faults.
    fn populate(&self, at: usize, len: usize) {
        // SAFETY: at is one of the constants above, inside the reservation.
        let address = unsafe { self.base.add(at) };
        // SAFETY: [at, at + len) lies inside a ring that was mapped; populating changes no byte. A kernel that cannot (before 5.14) does
        // without.
        let _ = unsafe { rustix::mm::madvise(address.as_ptr().cast(), len, Advice::LinuxPopulateWrite) };
    }

    /// Position of the input up to which the socket was read.
    pub fn received(&self) -> u64 {
        position(&self.received)
    }

    /// Position of the output up to which the socket was written.
    pub fn sent(&self) -> u64 {
        position(&self.sent)
    }

    /// Receives at most `max` bytes into the input ring at `at`, without waiting; 0 when the peer has ended its
    /// direction of the stream.
    ///
    /// # Errors
    /// The operating system's, EAGAIN among them; `InvalidInput` for a place outside of the ring.
    pub fn receive(&self, socket: BorrowedFd<'_>, at: usize, max: usize) -> io::Result<usize> {
        let into = self.ring(INPUT_AT, INPUT_BYTES, at, max).ok_or(io::ErrorKind::InvalidInput)?;
        let part = libc::iovec { iov_base: into.as_ptr().cast(), iov_len: max };
        let call = prepare(&self.received, message(&raw const part, 1));
        // SAFETY: `call` is a message header in the live page whose one iovec is `part`, which lives on the stack beyond the
        // call, and whose bytes lie inside the input ring, which no Rust reference covers.
        let done = unsafe { libc::recvmmsg(socket.as_raw_fd(), call, 1, libc::MSG_DONTWAIT, std::ptr::null_mut()) };
        finish(&self.received, done)
    }

    /// Sends `len` bytes of the output ring from `at` on, as many as the socket takes without waiting.
    ///
    /// # Errors
    /// The operating system's, EAGAIN among them; `InvalidInput` for a place outside of the ring.
    pub fn send(&self, socket: BorrowedFd<'_>, at: usize, len: usize) -> io::Result<usize> {
        let from = self.ring(OUTPUT_AT, OUTPUT_BYTES, at, len).ok_or(io::ErrorKind::InvalidInput)?;
        self.send_part(socket, libc::iovec { iov_base: from.as_ptr().cast(), iov_len: len })
    }

    /// Sends bytes that are not in the ring, as many as the socket takes without waiting.
    ///
    /// # Errors
    /// The operating system's, EAGAIN among them.
    pub fn send_direct(&self, socket: BorrowedFd<'_>, data: &[u8]) -> io::Result<usize> {
        self.send_part(socket, libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() })
    }

    /// Sends a part of a file without copying it, as much as the (non-blocking) socket takes; 0 at the file's end.
    ///
    /// # Errors
    /// The operating system's, EAGAIN among them.
    pub fn send_file(
        &self,
        socket: BorrowedFd<'_>,
        file: BorrowedFd<'_>,
        offset: u64,
        len: usize,
    ) -> io::Result<usize> {
        let call = prepare(&self.sent, [offset, offset, 0, 0, 0, 0, 0, 0]);
        // SAFETY: the second word of a call in the live page is a loff_t that the kernel reads, and writes before it returns.
        let place = unsafe { call.cast::<libc::loff_t>().add(1) };
        // SAFETY: as above; both descriptors are open.
        let done = unsafe { libc::sendfile(socket.as_raw_fd(), file.as_raw_fd(), place, len) };
        finish(&self.sent, i32::from(done >= 0) - 1)
    }

    fn send_part(&self, socket: BorrowedFd<'_>, part: libc::iovec) -> io::Result<usize> {
        let call = prepare(&self.sent, message(&raw const part, 1));
        // SAFETY: `call` is a message header in the live page whose one iovec is `part`, which lives on the stack beyond the
        // call, and whose bytes are live and are only read by the kernel.
        let done = unsafe { libc::sendmmsg(socket.as_raw_fd(), call, 1, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
        finish(&self.sent, done)
    }

    /// Copies bytes out of the input ring. False when they are not inside it.
    #[must_use]
    pub fn read_input(&self, at: usize, into: &mut [u8]) -> bool {
        let Some(from) = self.ring(INPUT_AT, INPUT_BYTES, at, into.len()) else { return false };
        // SAFETY: source and target are valid for the length, and do not overlap: the target is a borrow of other memory.
        // The source is shared memory that no Rust reference covers.
        unsafe { from.as_ptr().copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
        true
    }

    /// Copies bytes into the output ring. False when they would not lie inside it.
    #[must_use]
    pub fn write_output(&self, at: usize, from: &[u8]) -> bool {
        let Some(into) = self.ring(OUTPUT_AT, OUTPUT_BYTES, at, from.len()) else { return false };
        // SAFETY: as in `read_input`, the other way round.
        unsafe { into.as_ptr().copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        true
    }

    /// The place in a ring at `at`, if `len` bytes can lie there.
    fn ring(&self, start: usize, bytes: usize, at: usize, len: usize) -> Option<NonNull<u8>> {
        // SAFETY: at < bytes, so inside the first of the ring's two mappings; with len <= bytes it ends inside the second.
        (at < bytes && len <= bytes).then(|| unsafe { self.base.add(start + at) })
    }
}

impl Deref for ConnectionMemory {
    type Target = Page;
    fn deref(&self) -> &Page {
        const { assert!(align_of::<Page>() <= 4096) };
        // SAFETY: the first page of the mapping, sealed so that it stays, holds a Page; every field of it is an atomic valid for
        // all bit patterns, so other processes and the kernel may change it at any time.
        unsafe { self.base.cast::<Page>().as_ref() }
    }
}

impl Drop for ConnectionMemory {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the reservation this value made, and every borrow of it has ended.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), MAPPED_BYTES) };
    }
}

impl AsFd for ConnectionMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests;
