//! One request: reads its bytes, executes it, writes the bytes of the reply. Needs no kernel, so it is tested without
//! one.
#![deny(clippy::indexing_slicing)]

use everdisk_gate::hold::Hold;
use everdisk_proto::segment::FrontArea;
use rustix::io::Errno as Os;
use std::sync::atomic::Ordering::Relaxed;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::abi::{
    Attr, AttrOut, FallocateIn, GetxattrIn, GetxattrOut, InHeader, LseekIn, LseekOut, OpenOut, OutHeader, ROOT, ReadIn,
    SetattrIn, StatfsOut, WriteIn, WriteOut, opcode, open_flag, setattr_valid,
};
use crate::disk::{Disk, Errno, Stopped};

/// Bytes of a reply's head.
pub const REPLY_HEAD: usize = size_of::<OutHeader>();
/// Bytes before the data of a WRITE.
pub const WRITE_HEAD: usize = size_of::<InHeader>() + size_of::<WriteIn>();
/// The extended attribute that names the core that serves.
pub const VERSION_XATTR: &str = "user.everdisk.core";

const ATTR_VALID_SECS: u64 = 3600;
const S_IFREG: u32 = 0o100_000;
const O_DSYNC: u32 = 0o10_000;
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;
const FALLOC_KEEP_SIZE: u32 = 1;
const FALLOC_PUNCH_HOLE: u32 = 2;
const FALLOC_ZERO_RANGE: u32 = 0x10;

const fn errno(os: Os) -> Errno {
    Errno(os.raw_os_error())
}

/// What a request did, for the statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Bytes of the reply in the reply buffer; 0: this request has no reply.
    pub reply: usize,
    /// Payload read.
    pub read: u64,
    /// Payload written.
    pub written: u64,
    /// It ended with EIO.
    pub io_error: bool,
    /// It was not carried out, because the gate was closed while it waited. It has no reply, and has to be kept.
    pub abandoned: bool,
}

/// The head of a request and what follows it, if the bytes are a request.
pub fn header(request: &[u8]) -> Option<(InHeader, &[u8])> {
    let (header, body) = InHeader::read_from_prefix(request).ok()?;
    (usize::try_from(header.len) == Ok(request.len())).then_some((header, body))
}

/// Whether the kernel expects no reply. Such a request changes nothing, and is executed in any state of the gate.
pub const fn is_silent(opcode: u32) -> bool {
    matches!(opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT)
}

/// Executes requests on a disk.
pub struct Operations<'a> {
    /// The disk.
    pub disk: &'a dyn Disk,
    /// Attributes of the file.
    pub front: &'a FrontArea,
}

impl Operations<'_> {
    /// Executes the request and puts the reply into `reply`, which has room for [`REPLY_HEAD`] bytes and the largest
    /// payload.
    pub fn execute(&self, hold: &dyn Hold, request: &[u8], reply: &mut [u8]) -> Done {
        let Some((head, body)) = header(request) else { return Done::default() };
        if is_silent(head.opcode) {
            return Done::default();
        }
        let (reply_head, payload) = reply.split_at_mut(REPLY_HEAD);
        let mut done = Done::default();
        let result = if head.nodeid == ROOT {
            self.dispatch(hold, head.opcode, body, payload, &mut done)
        } else {
            Err(errno(Os::STALE).into())
        };
        let (error, len) = match result {
            Ok(len) => (0, len),
            Err(Stopped::Abandoned) => return Done { abandoned: true, ..Done::default() },
            Err(Stopped::Failed(Errno(code))) => {
                done.io_error = code == Os::IO.raw_os_error();
                (-code, 0)
            }
        };
        done.reply = REPLY_HEAD + len;
        let out = OutHeader {
            len: u32::try_from(done.reply).expect("a reply lies in its buffer"),
            error,
            unique: head.unique,
        };
        out.write_to(reply_head).expect("the place is as long as the head");
        done
    }

    fn dispatch(
        &self,
        hold: &dyn Hold,
        code: u32,
        body: &[u8],
        payload: &mut [u8],
        done: &mut Done,
    ) -> Result<usize, Stopped> {
        match code {
            opcode::READ => {
                let len = self.read(hold, &arg(body)?, payload)?;
                done.read = len as u64;
                Ok(len)
            }
            opcode::WRITE => {
                let (write, data) = split(body)?;
                let size = self.write(hold, &write, data)?;
                done.written = u64::from(size);
                Ok(put(payload, &WriteOut { size, padding: 0 })?)
            }
            opcode::FSYNC => self.disk.flush(hold).map(|()| 0),
            opcode::FALLOCATE => self.fallocate(hold, &arg(body)?).map(|()| 0),
            opcode::LSEEK => Ok(put(payload, &LseekOut { offset: self.lseek(hold, &arg(body)?)? })?),
            _ => Ok(self.answer(code, body, payload)?),
        }
    }

    /// Requests that need no disk.
    fn answer(&self, code: u32, body: &[u8], payload: &mut [u8]) -> Result<usize, Errno> {
        match code {
            opcode::GETATTR => put(payload, &self.attributes()),
            opcode::SETATTR => {
                self.may_set(&arg(body)?)?;
                put(payload, &self.attributes())
            }
            opcode::OPEN => {
                let open_flags = open_flag::DIRECT_IO | open_flag::PARALLEL_DIRECT_WRITES | open_flag::NOFLUSH;
                put(payload, &OpenOut { fh: 0, open_flags, backing_id: 0 })
            }
            opcode::RELEASE | opcode::FLUSH | opcode::ACCESS => Ok(0),
            opcode::STATFS => put(payload, &self.statfs()),
            opcode::GETXATTR => {
                let (want, name) = split(body)?;
                if name.strip_suffix(b"\0") != Some(VERSION_XATTR.as_bytes()) {
                    return Err(errno(Os::NODATA));
                }
                xattr(&want, self.disk.version().as_bytes(), payload)
            }
            opcode::LISTXATTR => xattr(&arg(body)?, [VERSION_XATTR, "\0"].concat().as_bytes(), payload),
            _ => Err(errno(Os::NOSYS)),
        }
    }

    fn read(&self, hold: &dyn Hold, read: &ReadIn, payload: &mut [u8]) -> Result<usize, Stopped> {
        let left = self.disk.size().saturating_sub(read.offset);
        let len = usize::try_from(left.min(u64::from(read.size))).map_err(|_| errno(Os::INVAL))?;
        let buf = payload.get_mut(..len).ok_or(errno(Os::INVAL))?;
        if len > 0 {
            self.disk.read(hold, read.offset, buf)?;
        }
        Ok(len)
    }

    /// As for a block device: what lies past the end is not written, and a write that begins there gets ENOSPC.
    fn write(&self, hold: &dyn Hold, write: &WriteIn, data: &[u8]) -> Result<u32, Stopped> {
        let left = self.disk.size().saturating_sub(write.offset);
        let size = u64::from(write.size).min(left);
        if size == 0 && write.size > 0 {
            return Err(errno(Os::NOSPC).into());
        }
        let len = usize::try_from(size).map_err(|_| errno(Os::INVAL))?;
        let data = data.get(..len).ok_or(errno(Os::INVAL))?;
        if len > 0 {
            self.disk.write(hold, write.offset, data)?;
        }
        if write.flags & O_DSYNC != 0 {
            self.disk.flush(hold)?;
        }
        Ok(u32::try_from(size).map_err(|_| errno(Os::INVAL))?)
    }

    fn fallocate(&self, hold: &dyn Hold, want: &FallocateIn) -> Result<(), Stopped> {
        let end = want.offset.checked_add(want.length).ok_or(errno(Os::FBIG))?;
        let size = self.disk.size();
        let punch = want.mode == FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE;
        if punch {
            // As for any file, the part of a hole that lies past the end is no error.
            let len = end.min(size).saturating_sub(want.offset);
            return if len == 0 { Ok(()) } else { self.disk.discard(hold, want.offset, len) };
        }
        if end > size {
            return Err(errno(Os::NOSPC).into());
        }
        match want.mode & !FALLOC_KEEP_SIZE {
            FALLOC_ZERO_RANGE => self.disk.write_zeroes(hold, want.offset, want.length),
            0 => self.disk.allocate(hold, want.offset, want.length),
            _ => Err(errno(Os::OPNOTSUPP).into()),
        }
    }

    fn lseek(&self, hold: &dyn Hold, want: &LseekIn) -> Result<u64, Stopped> {
        if want.offset >= self.disk.size() {
            return Err(errno(Os::NXIO).into());
        }
        match want.whence {
            SEEK_DATA => self.disk.seek(hold, want.offset, false),
            SEEK_HOLE => self.disk.seek(hold, want.offset, true),
            _ => Err(errno(Os::INVAL).into()),
        }
    }

    /// Times may be set (and are not kept). Size, mode and owner may only be set to their present values.
    fn may_set(&self, set: &SetattrIn) -> Result<(), Errno> {
        let differs = (set.valid & setattr_valid::SIZE != 0 && set.size != self.disk.size())
            || (set.valid & setattr_valid::MODE != 0 && set.mode & 0o7777 != self.front.mode.load(Relaxed))
            || (set.valid & setattr_valid::UID != 0 && set.uid != self.front.uid.load(Relaxed))
            || (set.valid & setattr_valid::GID != 0 && set.gid != self.front.gid.load(Relaxed));
        if differs { Err(errno(Os::PERM)) } else { Ok(()) }
    }

    fn attributes(&self) -> AttrOut {
        let size = self.disk.size();
        let time = self.front.attached_at.load(Relaxed);
        AttrOut {
            attr_valid: ATTR_VALID_SECS,
            attr: Attr {
                ino: ROOT,
                size,
                blocks: size / 512,
                atime: time,
                mtime: time,
                ctime: time,
                mode: S_IFREG | self.front.mode.load(Relaxed),
                nlink: 1,
                uid: self.front.uid.load(Relaxed),
                gid: self.front.gid.load(Relaxed),
                blksize: 4096,
                ..Attr::zeroed()
            },
            ..AttrOut::zeroed()
        }
    }

    fn statfs(&self) -> StatfsOut {
        let blocks = self.disk.size() / 4096;
        StatfsOut { blocks, files: 1, bsize: 4096, frsize: 4096, namelen: 255, ..StatfsOut::zeroed() }
    }
}

fn arg<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Result<T, Errno> {
    split(body).map(|(value, _)| value)
}

/// A request's argument, and what follows it.
fn split<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(body).map_err(|_| errno(Os::INVAL))
}

fn put<T: IntoBytes + Immutable>(payload: &mut [u8], value: &T) -> Result<usize, Errno> {
    value.write_to_prefix(payload).map_err(|_| errno(Os::INVAL))?;
    Ok(size_of::<T>())
}

/// The size alone when the caller has provided no room yet, else the value.
fn xattr(want: &GetxattrIn, value: &[u8], payload: &mut [u8]) -> Result<usize, Errno> {
    let size = u32::try_from(value.len()).map_err(|_| errno(Os::RANGE))?;
    if want.size == 0 {
        return put(payload, &GetxattrOut { size, padding: 0 });
    }
    if want.size < size {
        return Err(errno(Os::RANGE));
    }
    payload.get_mut(..value.len()).ok_or(errno(Os::RANGE))?.copy_from_slice(value);
    Ok(value.len())
}
