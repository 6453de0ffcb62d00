//! A worker of the file front end: reads requests from one channel, executes them, writes the replies to the same
//! channel (the kernel accepts them nowhere else).
//!
//! ```text
//!          ┌──────────► parked ──── admitted ────► read(2) ──── request ───► enter ─── yes ──► execute, reply ─┐
//!          │                                        ▲   │                      │                              │
//!          │◄──── evicted, gate no longer ours ─────┼───┘                      no: keep it                     │
//!          │◄───────────────────────────────────────┼──────────────────────────┘                              │
//!                                                   └─────────────────────────────────────────────────────────┘
//! ```
//! A kept request is executed when the gate comes back under the same generation. Under another one it was given out
//! anew, and is forgotten here. A request that was abandoned, because the gate was closed while it waited for a storage
//! node, is kept in the same way. Several workers serve a channel, and one of them at a time reads ([`Lead`]).

use std::os::fd::BorrowedFd;

use everdisk_gate::ticket::Pass;
use everdisk_proto::limits::REQUEST_BYTES_MAX;
use everdisk_sys::memory::LockedBuffer;
use rustix::io::Errno as Os;

use super::{
    abi::OutHeader,
    operation::{Operations, REPLY_HEAD, WRITE_HEAD, header, is_silent},
};
use crate::{channel::Lead, worker::GateAccess};

/// Page size: payloads begin on a page, which makes copies cheaper.
const PAGE: usize = 4096;
const REQUEST_START: usize = PAGE - WRITE_HEAD;
const REPLY_START: usize = PAGE - REPLY_HEAD;

/// The buffers of one worker: resident and locked, see [`LockedBuffer`].
pub struct Buffers {
    request: LockedBuffer,
    reply: LockedBuffer,
}

impl Buffers {
    const EACH: usize = PAGE + REQUEST_BYTES_MAX;
    /// Bytes that one worker locks.
    pub const BYTES: usize = 2 * Self::EACH;

    /// Buffers for the largest request and reply.
    ///
    /// # Errors
    /// When the memory cannot be locked.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { request: LockedBuffer::new(Self::EACH)?, reply: LockedBuffer::new(Self::EACH)? })
    }
}

/// Why a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to.
    Stopped,
    /// The file was unmounted.
    Unmounted,
    /// /dev/fuse failed.
    Failed(Os),
}

enum Read {
    Request(usize),
    Evicted,
}

/// A worker and what it works on.
struct Worker<'w, 'a> {
    access: &'w GateAccess<'a>,
    channel: BorrowedFd<'w>,
    lead: &'w Lead,
    operations: &'w Operations<'w>,
}

/// Serves one channel until the core ends or the file is unmounted.
pub fn serve(
    access: &GateAccess<'_>,
    channel: BorrowedFd<'_>,
    lead: &Lead,
    operations: &Operations<'_>,
    buffers: &mut Buffers,
) -> Ended {
    let worker = Worker { access, channel, lead, operations };
    let mut kept: Option<(usize, Pass)> = None;
    loop {
        if kept.is_none() && !lead.is_with(access.index()) {
            access.idle();
            if !lead.wait(access.index(), || access.must_stop()) {
                return Ended::Stopped;
            }
        }
        let Some(pass) = access.wait(operations.disk) else { return Ended::Stopped };
        let mut first = true;
        if let Some((len, under)) = kept.take() {
            access.let_go();
            if under.continues_in(pass) && !(access.enter(pass) && worker.execute(pass, buffers, len, &mut first)) {
                kept = Some((len, under));
                access.park(true);
                continue;
            }
        }
        while lead.goes_on(access.index()) && access.may_read(pass) {
            match read(channel, buffers) {
                Ok(Read::Request(len)) => {
                    let Some((head, _)) = header(buffers.request(len)) else {
                        tracing::error!(len, "the kernel sent something else than a request");
                        continue;
                    };
                    if is_silent(head.opcode) {
                        continue;
                    }
                    if !access.enter(pass) || !worker.execute(pass, buffers, len, &mut first) {
                        kept = Some((len, pass));
                        break;
                    }
                }
                Ok(Read::Evicted) => {}
                Err(Os::NODEV) => return Ended::Unmounted,
                Err(errno) => return Ended::Failed(errno),
            }
        }
        access.park(kept.is_some());
    }
}

impl Buffers {
    fn request(&self, len: usize) -> &[u8] {
        &self.request[REQUEST_START..REQUEST_START + len]
    }
}

fn read(channel: BorrowedFd<'_>, buffers: &mut Buffers) -> Result<Read, Os> {
    match rustix::io::read(channel, &mut buffers.request[REQUEST_START..]) {
        Ok(len) => Ok(Read::Request(len)),
        // EINTR: evicted, or a stray signal. ENOENT: the request was aborted while it was read. EAGAIN: spurious.
        Err(Os::INTR | Os::NOENT | Os::AGAIN) => Ok(Read::Evicted),
        Err(errno) => Err(errno),
    }
}

impl Worker<'_, '_> {
    /// Executes a request and answers it. False: it was abandoned and has to be kept.
    fn execute(&self, pass: Pass, buffers: &mut Buffers, len: usize, first: &mut bool) -> bool {
        let access = self.access;
        if std::mem::take(first) {
            access.note_first_request();
        }
        let Buffers { request, reply } = buffers;
        let (request, space) = (&request[REQUEST_START..REQUEST_START + len], &mut reply[REPLY_START..]);
        let hold = access.hold(pass, Some(self.lead), Some(access.file_told()));
        let done = self.operations.execute(&hold, request, space);
        if done.abandoned {
            return false;
        }
        let reply = || {
            if done.reply > 0
                && let Err(errno) = answer(self.channel, &space[..done.reply])
                && errno != Os::NOENT
            {
                // ENOENT: the application gave the request up. Anything else is a fault of ours.
                tracing::error!(%errno, len = done.reply, head = size_of::<OutHeader>(), "the kernel refused a reply");
            }
        };
        match hold.tells() {
            Some(errors) => access.tell_file(errors, reply),
            None => reply(),
        }
        // A failure that belongs to another core says nothing against this one.
        access.leave(done.read, done.written, done.io_error && hold.tells().is_none());
        true
    }
}

fn answer(channel: BorrowedFd<'_>, reply: &[u8]) -> Result<(), Os> {
    loop {
        match rustix::io::write(channel, reply) {
            Err(Os::INTR) => {}
            other => return other.map(drop),
        }
    }
}
