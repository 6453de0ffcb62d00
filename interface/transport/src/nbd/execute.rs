//! One request of a client, carried out on the disk.

use std::ops::Range;

use everdisk_gate::hold::Hold;

use super::{
    protocol::{base_allocation, cmd_flag},
    request::{Command, Request},
};
use crate::disk::{Disk, Errno, Stopped};

/// The most that is read or written at once.
pub(super) const PIECE: usize = 1 << 20;
/// The data of a longer reply is sent directly to the socket.
pub(super) const INLINE_MAX: usize = 64 << 10;
/// Extents in one answer to BLOCK_STATUS. A client that wants more asks again from where the answer ends.
const EXTENTS_MAX: usize = 512;
/// CACHE is advice; more than this is not read ahead.
const CACHE_MAX: u64 = 32 << 20;
const ENXIO: Errno = Errno(rustix::io::Errno::NXIO.raw_os_error());

/// The outcome of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Done {
    /// Success without data.
    Nothing,
    /// This many bytes of the data are in the buffer: all of it; or the first piece; or none, for a large reply that
    /// can be sent from where it lies.
    Data(usize),
    /// What is allocated: lengths and flags of base:allocation.
    Extents(Vec<(u32, u32)>),
}

/// A worker's own buffer, as long as the largest need so far.
#[derive(Debug, Default)]
pub(super) struct Data(Vec<u8>);

impl Data {
    /// The first `len` bytes.
    pub(super) fn first(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() < len {
            self.0.resize(len.next_power_of_two().max(64 << 10), 0);
        }
        &mut self.0[..len]
    }

    /// The first bytes, as they were put there before.
    pub(super) fn part(&self, range: Range<usize>) -> &[u8] {
        &self.0[range]
    }
}

/// Carries out a request that was checked against the export. The data of a WRITE is in `data`. `lends`: a large reply
/// may be sent from where its data lies.
pub(super) fn execute(
    disk: &dyn Disk,
    hold: &dyn Hold,
    request: &Request,
    data: &mut Data,
    lends: bool,
) -> Result<Done, Stopped> {
    let (offset, len) = (request.offset, u64::from(request.len));
    let bytes = request.len as usize;
    match request.command {
        _ if len == 0 && request.command != Command::Flush => return Ok(Done::Nothing),
        Command::Read => {
            let first = bytes.min(PIECE);
            if lends && first > INLINE_MAX && disk.in_memory(offset, first as u64).is_some() {
                return Ok(Done::Data(0));
            }
            disk.read(hold, offset, data.first(first))?;
            return Ok(Done::Data(first));
        }
        Command::BlockStatus => return status(disk, hold, request).map(Done::Extents),
        Command::Write => disk.write(hold, offset, data.first(bytes))?,
        Command::Flush => disk.flush(hold)?,
        Command::Trim => disk.discard(hold, offset, len)?,
        Command::WriteZeroes if request.has(cmd_flag::NO_HOLE) => {
            disk.write_zeroes(hold, offset, len)?;
            disk.allocate(hold, offset, len)?;
        }
        Command::WriteZeroes => disk.discard(hold, offset, len)?,
        Command::Cache => cache(disk, hold, offset, len, data)?,
        Command::Disconnect | Command::Unknown(_) => {}
    }
    let changes = matches!(request.command, Command::Write | Command::Trim | Command::WriteZeroes);
    if changes && request.has(cmd_flag::FUA) {
        disk.flush(hold)?;
    }
    Ok(Done::Nothing)
}

fn cache(disk: &dyn Disk, hold: &dyn Hold, offset: u64, len: u64, data: &mut Data) -> Result<(), Stopped> {
    let end = offset + len.min(CACHE_MAX);
    let mut at = offset;
    while at < end {
        let piece = usize::try_from(end - at).map_or(PIECE, |left| left.min(PIECE));
        disk.read(hold, at, data.first(piece))?;
        at += piece as u64;
    }
    Ok(())
}

/// The extents from the request's offset on.
fn status(disk: &dyn Disk, hold: &dyn Hold, request: &Request) -> Result<Vec<(u32, u32)>, Stopped> {
    let end = request.offset + u64::from(request.len);
    let most = if request.has(cmd_flag::REQ_ONE) { 1 } else { EXTENTS_MAX };
    let mut extents: Vec<(u32, u32)> = Vec::new();
    let mut at = request.offset;
    while at < end && extents.len() < most {
        let data = sought(disk, hold, at, false)?.map_or(end, |found| found.min(end));
        let is_hole = data > at;
        let next = if is_hole { data } else { sought(disk, hold, at, true)?.map_or(end, |found| found.min(end)) };
        // A hole that was filled between the two seeks has no length. It counts as data up to the end of the request.
        let next = if next > at { next } else { end };
        let flags = if is_hole { base_allocation::HOLE | base_allocation::ZERO } else { 0 };
        extents.push((u32::try_from(next - at).expect("an extent lies within the request"), flags));
        at = next;
    }
    Ok(extents)
}

/// Offset of the next data or hole, if there is one.
fn sought(disk: &dyn Disk, hold: &dyn Hold, at: u64, hole: bool) -> Result<Option<u64>, Stopped> {
    match disk.seek(hold, at, hole) {
        Ok(found) => Ok(Some(found)),
        Err(Stopped::Failed(ENXIO)) => Ok(None),
        Err(failure) => Err(failure),
    }
}
