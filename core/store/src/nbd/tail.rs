//! The last MiB of an export, which is Everdisk's own. It ends at the export's size, rounded down to 4096 bytes.
//!
//! ```text
//!       0  superblock, first copy (4096 bytes)
//!   64 KiB superblock, second copy
//!  128 KiB record of the export
//!  192 KiB reserved for small named blobs; zeros
//! ```
//! Each has a block of 64 KiB of its own, the largest that a server may require: writing one never touches another.
//!
//! The first copy that is sound counts. A superblock is written to both, first to the first one, when the second one is known to
//! be the same as what counts. So a write that is torn leaves the old or the new one.

use std::ops::Range;

use everdisk_proto::superblock::{BadSuperblock, SUPERBLOCK_BYTES, Superblock};
use everdisk_store_nbd::{Client, Command, Error};

use super::{
    extents::{Extents, durably, plain, read, zero},
    record::{self, Record},
};
use crate::{NodeFormat, OpenError, Place};

/// Bytes of an export that are not the volume's.
pub(super) const BYTES: u64 = 1 << 20;
const COPIES: [u64; 2] = [0, 64 << 10];
const RECORD: u64 = 128 << 10;
const BLOCK: u64 = SUPERBLOCK_BYTES as u64;
/// A disk writes these bytes whole or not at all. All that a superblock says lies in the first of them.
const SECTOR: usize = 512;
/// Where the record is not in its place, it is searched for in this many bytes of data.
const SEARCHED_MAX: u64 = 64 << 20;
const PIECE: u64 = 1 << 20;

/// The last MiB of an export.
#[derive(Debug)]
pub(super) struct Tail<'a> {
    client: &'a Client,
    place: &'a Place,
    /// Its offset.
    at: u64,
}

/// Bytes of an export that a node can use, its tail included.
fn usable(client: &Client) -> u64 {
    client.size() - client.size() % BLOCK
}

impl<'a> Tail<'a> {
    /// That of an export whose node has `len` bytes.
    ///
    /// # Errors
    /// [`OpenError::TooSmall`].
    pub(super) fn of(client: &'a Client, place: &'a Place, len: u64) -> Result<Self, OpenError> {
        let (end, needed) = (usable(client), len.next_multiple_of(BLOCK) + BYTES);
        if end < needed {
            return Err(OpenError::TooSmall { place: place.clone(), found: client.offer().size, needed });
        }
        Ok(Self { client, place, at: end - BYTES })
    }

    /// Where it begins.
    pub(super) const fn start(&self) -> u64 {
        self.at
    }

    /// Where it ends.
    pub(super) const fn end(&self) -> u64 {
        self.at + BYTES
    }

    fn failed(&self, action: &'static str) -> impl Fn(Error) -> OpenError {
        move |source| OpenError::Nbd { place: self.place.clone(), action, source }
    }

    /// Its superblock.
    ///
    /// # Errors
    /// [`OpenError::NoSuperblock`], or what else was found.
    pub(super) fn superblock(&self) -> Result<Superblock, OpenError> {
        let [first, second] = self.copies()?;
        self.chosen(first, second)
    }

    fn copies(&self) -> Result<[Result<Superblock, BadSuperblock>; 2], OpenError> {
        let [first, second] = COPIES.map(|copy| {
            let bytes = read(self.client, self.at + copy, BLOCK).map_err(self.failed("read its superblock"))?;
            Ok(Superblock::decode(&bytes))
        });
        Ok([first?, second?])
    }

    /// The copy that counts.
    fn chosen(
        &self,
        first: Result<Superblock, BadSuperblock>,
        second: Result<Superblock, BadSuperblock>,
    ) -> Result<Superblock, OpenError> {
        let bad = |source| OpenError::BadSuperblock { place: self.place.clone(), source };
        match (first, second) {
            (Ok(found), _) => Ok(found),
            // What another build has written is not judged by what this one can read.
            (Err(newer @ BadSuperblock::Format(_)), _) => Err(bad(newer)),
            (Err(_), Ok(found)) => Ok(found),
            (Err(BadSuperblock::Magic), Err(BadSuperblock::Magic)) => {
                Err(OpenError::NoSuperblock { place: self.place.clone() })
            }
            (Err(BadSuperblock::Magic), Err(damaged)) | (Err(damaged), Err(_)) => Err(bad(damaged)),
        }
    }

    /// Replaces the superblock, durably.
    ///
    /// # Errors
    /// [`OpenError`]; then it has the old or the new one.
    pub(super) fn put_superblock(&self, new: &Superblock) -> Result<(), OpenError> {
        let [first, second] = self.copies()?;
        let now = first.as_ref().ok().or(second.as_ref().ok());
        if let Some(now) = now.filter(|now| second.as_ref().ok() != Some(*now)) {
            self.put(COPIES[1], now.encode().to_vec())?;
        }
        COPIES.iter().try_for_each(|copy| self.put(*copy, new.encode().to_vec()))
    }

    /// Notes what the export is.
    ///
    /// # Errors
    /// [`OpenError`].
    pub(super) fn put_record(&self, of: &Superblock) -> Result<(), OpenError> {
        let record = Record { volume: of.volume, node: of.node, size: self.client.offer().size };
        self.put(RECORD, record.encode().to_vec())
    }

    /// Writes durably.
    fn put(&self, at: u64, memory: Vec<u8>) -> Result<(), OpenError> {
        plain(self.client, Command::Write { offset: self.at + at, memory, fua: true })
            .map_err(self.failed("write its superblock"))
    }

    /// Checks that the export has the size that it had when the node was made. Where the size has changed by the distance of the
    /// superblock's copies, one copy lies where the other is sought, and the record lies that distance from its place. A record that is
    /// in none of the three places is damaged, and proves no other size.
    ///
    /// # Errors
    /// [`OpenError::ExportSize`].
    pub(super) fn check_record(&self, of: &Superblock) -> Result<(), OpenError> {
        for at in [RECORD, RECORD - COPIES[1], RECORD + COPIES[1]] {
            let bytes = read(self.client, self.at + at, BLOCK).map_err(self.failed("read its record"))?;
            let record = Record::decode(&bytes).filter(|record| (record.volume, record.node) == (of.volume, of.node));
            match record {
                Some(record) if record.size != self.client.offer().size => return Err(self.has_another_size(&record)),
                Some(_) => return Ok(()),
                None => {}
            }
        }
        Ok(())
    }

    fn has_another_size(&self, record: &Record) -> OpenError {
        resized(self.place, self.client, record)
    }

    /// Removes the superblock and everything else, durably. Until the superblock has gone it can be repeated.
    ///
    /// # Errors
    /// [`OpenError`].
    pub(super) fn wipe(&self) -> Result<(), OpenError> {
        let rest = self.at + RECORD..self.end();
        durably(self.client, || zero(self.client, rest.clone())).map_err(self.failed("write zeros"))?;
        COPIES.iter().try_for_each(|copy| self.put(*copy, vec![0; SECTOR]))
    }
}

fn resized(place: &Place, client: &Client, record: &Record) -> OpenError {
    OpenError::ExportSize { place: place.clone(), found: client.offer().size, had: record.size }
}

/// The error that the export has another size than when the node was made, if its record is found elsewhere than in its place.
/// An export that has shrunk by a MiB or more has lost it.
pub(super) fn found_elsewhere(client: &Client, place: &Place, format: &NodeFormat) -> Result<(), OpenError> {
    let failed = |source| OpenError::Nbd { place: place.clone(), action: "search for its record", source };
    let from = format.len.next_multiple_of(BLOCK);
    let mut left = SEARCHED_MAX;
    for extent in Extents::new(client, from..usable(client).max(from)) {
        let (range, zero) = extent.map_err(failed)?;
        let Range { start, end } = range.start - range.start % BLOCK..range.end.next_multiple_of(BLOCK);
        let mut at = start;
        while !zero && at < end && left > 0 {
            let len = PIECE.min(end - at);
            let bytes = read(client, at, len).map_err(failed)?;
            let mut records = bytes.chunks_exact(record::BYTES).filter_map(Record::decode);
            if let Some(record) = records.find(|it| {
                (it.volume, it.node) == (format.superblock.volume, format.superblock.node)
                    && it.size != client.offer().size
            }) {
                return Err(resized(place, client, &record));
            }
            left = left.saturating_sub(len);
            at += len;
        }
    }
    Ok(())
}
