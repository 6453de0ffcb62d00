//! INIT: the agreement between the kernel and us, once for the life of the mount. The interface does it before any core
//! is involved; a core never sees an INIT.
#![deny(clippy::indexing_slicing)]

use zerocopy::{FromBytes, IntoBytes};

use super::abi::{InHeader, InitIn, InitOut, MAJOR, MINOR, MINOR_MIN, OutHeader, init_flag, opcode};

/// The flags that we request from the kernel.
const WANTED: u64 = init_flag::ASYNC_READ
    | init_flag::BIG_WRITES
    | init_flag::ASYNC_DIO
    | init_flag::MAX_PAGES
    | init_flag::HANDLE_KILLPRIV_V2
    | init_flag::INIT_EXT
    | init_flag::HAS_RESEND;
/// Also requested where the file is the only front end. The pages of a shared mapping are a cache in the kernel: a
/// write by another front end would not be visible there, and would be overwritten when such a page is written back.
/// Without this flag mmap(2) with MAP_SHARED fails with ENODEV.
const WANTED_ALONE: u64 = init_flag::DIRECT_IO_ALLOW_MMAP;
/// Asynchronous requests that the kernel has under way with us before it makes submitters wait. Its own default of 12
/// would cap the queue depth.
const MAX_BACKGROUND: u16 = 512;
const CONGESTION_THRESHOLD: u16 = 384;
const PAGE: u32 = 4096;

/// Why the mount cannot be served.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadInit {
    /// The first request is not an INIT.
    #[error("the kernel's first request is no FUSE_INIT")]
    NotInit,
    /// The kernel is too old.
    #[error("the kernel speaks FUSE {0}.{1}; {MAJOR}.{MINOR_MIN} or later is needed (Linux 5.4)")]
    Version(u32, u32),
    /// The kernel could not give requests that were read to another core.
    #[error("the kernel's FUSE cannot give out requests again (FUSE_HAS_RESEND): Linux 6.9 or later is needed")]
    NoResend,
}

/// Reads the INIT request and makes the reply. `alone`: the file is the volume's only front end as long as it is
/// mounted.
///
/// # Errors
/// [`BadInit`]; answer nothing and unmount.
pub fn answer(request: &[u8], max_write: u32, alone: bool) -> Result<Vec<u8>, BadInit> {
    let (header, rest) = InHeader::read_from_prefix(request).map_err(|_| BadInit::NotInit)?;
    let (init, _) = InitIn::read_from_prefix(rest).map_err(|_| BadInit::NotInit)?;
    if header.opcode != opcode::INIT {
        return Err(BadInit::NotInit);
    }
    if init.major != MAJOR || init.minor < MINOR_MIN {
        return Err(BadInit::Version(init.major, init.minor));
    }
    let offered = if u64::from(init.flags) & init_flag::INIT_EXT == 0 {
        u64::from(init.flags)
    } else {
        u64::from(init.flags) | (u64::from(init.flags2) << 32)
    };
    if offered & init_flag::HAS_RESEND == 0 {
        return Err(BadInit::NoResend);
    }
    let flags = offered & if alone { WANTED | WANTED_ALONE } else { WANTED };
    let minor = init.minor.min(MINOR);
    let [low, high] =
        [flags & u64::from(u32::MAX), flags >> 32].map(|half| u32::try_from(half).expect("half of 64 bits"));
    let body = InitOut {
        major: MAJOR,
        minor,
        max_readahead: init.max_readahead,
        flags: low,
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTION_THRESHOLD,
        max_write,
        time_gran: 1,
        max_pages: u16::try_from(max_write / PAGE).expect("a request has at most 257 pages"),
        flags2: high,
        ..InitOut::zeroed()
    };
    let len = size_of::<OutHeader>() + size_of::<InitOut>();
    let head = OutHeader { len: u32::try_from(len).expect("a reply is short"), error: 0, unique: header.unique };
    Ok([head.as_bytes(), body.as_bytes()].concat())
}
