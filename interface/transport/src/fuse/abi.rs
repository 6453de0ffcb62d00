//! The bytes of the FUSE protocol, version 7.31 and later: `include/uapi/linux/fuse.h`. Only what the one file needs.
#![deny(clippy::indexing_slicing)]

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Major version of the protocol.
pub const MAJOR: u32 = 7;
/// Oldest minor version that is accepted (Linux 5.4).
pub const MINOR_MIN: u32 = 31;
/// Minor version whose structures these are.
pub const MINOR: u32 = 41;
/// `fuse_notify_code` FUSE_NOTIFY_RESEND: give out again everything that was read and not answered (Linux 6.9).
pub const NOTIFY_RESEND: i32 = 7;
/// The node id of the root, the only node there is.
pub const ROOT: u64 = 1;

/// Operation codes.
pub mod opcode {
    #![expect(missing_docs, reason = "the names are those of linux/fuse.h")]
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const ACCESS: u32 = 34;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const LSEEK: u32 = 46;
}

/// INIT flags (both words; those of the second word shifted by 32).
pub mod init_flag {
    /// Reads of one file may be under way side by side.
    pub const ASYNC_READ: u64 = 1 << 0;
    /// Writes larger than a page.
    pub const BIG_WRITES: u64 = 1 << 5;
    /// Direct I/O submitted asynchronously is sent asynchronously.
    pub const ASYNC_DIO: u64 = 1 << 15;
    /// `max_pages` is valid.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// The server clears suid bits itself (there are none). So the kernel need not ask for capabilities on each write.
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    /// `flags2` is valid.
    pub const INIT_EXT: u64 = 1 << 30;
    /// Files opened with DIRECT_IO may be mapped shared (Linux 6.6).
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    /// The kernel understands NOTIFY_RESEND (Linux 6.9).
    pub const HAS_RESEND: u64 = 1 << 39;
}

/// OPEN reply flags.
pub mod open_flag {
    /// Every read and write of the application is a request. Nothing is cached, so the application sees writes by other
    /// front ends.
    pub const DIRECT_IO: u32 = 1 << 0;
    /// No FLUSH request at close: closing a disk does not flush it.
    pub const NOFLUSH: u32 = 1 << 5;
    /// Writes of one file may be under way side by side.
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// SETATTR: what is to be set.
pub mod setattr_valid {
    #![expect(missing_docs, reason = "the names are those of linux/fuse.h")]
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
}

macro_rules! wire {
    ($(#[$meta:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? } = $bytes:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        #[expect(missing_docs, reason = "the fields are those of linux/fuse.h")]
        pub struct $name { $(pub $field: $type),* }
        const _: () = assert!(size_of::<$name>() == $bytes);
        impl $name {
            /// All zeros.
            pub fn zeroed() -> Self {
                Self::new_zeroed()
            }
        }
    };
}

wire! {
    /// Head of every request.
    InHeader { len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32, extlen: u16, padding: u16 } = 40
}
wire! {
    /// Head of every reply and notification.
    OutHeader { len: u32, error: i32, unique: u64 } = 16
}
wire! {
    /// INIT.
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11] } = 64
}
wire! {
    /// Reply to INIT.
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32,
        request_timeout: u16, unused: [u16; 11],
    } = 64
}
wire! {
    /// A file's attributes.
    Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32,
        ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    } = 88
}
wire! {
    /// Reply to GETATTR and SETATTR.
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr } = 104
}
wire! {
    /// SETATTR.
    SetattrIn {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    } = 88
}
wire! {
    /// Reply to OPEN.
    OpenOut { fh: u64, open_flags: u32, backing_id: i32 } = 16
}
wire! {
    /// READ.
    ReadIn { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32 } = 40
}
wire! {
    /// WRITE; the data follows.
    WriteIn { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32 } = 40
}
wire! {
    /// Reply to WRITE.
    WriteOut { size: u32, padding: u32 } = 8
}
wire! {
    /// FALLOCATE.
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 } = 32
}
wire! {
    /// LSEEK.
    LseekIn { fh: u64, offset: u64, whence: u32, padding: u32 } = 24
}
wire! {
    /// Reply to LSEEK.
    LseekOut { offset: u64 } = 8
}
wire! {
    /// GETXATTR (the name follows) and LISTXATTR.
    GetxattrIn { size: u32, padding: u32 } = 8
}
wire! {
    /// Reply to either when only the size was asked.
    GetxattrOut { size: u32, padding: u32 } = 8
}
wire! {
    /// Reply to STATFS.
    StatfsOut {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32,
        padding: u32, spare: [u32; 6],
    } = 80
}

/// The notification that makes the kernel give out anew everything that is unanswered.
pub fn resend_notification() -> OutHeader {
    OutHeader { len: 16, error: NOTIFY_RESEND, unique: 0 }
}
