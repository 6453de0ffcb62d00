//! Making, recognising, growing and removing a node on an export. A death at any point leaves a node that is whole, or none:
//! the superblock is written last, and removed last.
//!
//! The whole export is the node's. When it is made, everything in it reads as zeros, and only the volume's data change that.

use std::{ops::Range, sync::Arc, time::Duration};

use everdisk_proto::{
    nbd::wire::transmission_flag as flag,
    superblock::{BadSuperblock, Superblock},
    volume::NbdExport,
};
use everdisk_store_nbd::{Address, Client, Command, Config, Error, Keeper, Kind, Tls};
use uuid::Uuid;

use super::{
    extents::{durably, first_used, offers, plain, zero},
    tail::{self, Tail},
};
use crate::{
    Creation, NodeFormat, OpenError, Place,
    superblock::{check_owner, check_superblock, node_len},
};

/// How long a server may be out of reach while a node is being made, changed or removed.
const UNAVAILABLE_AFTER: Duration = Duration::from_secs(20);

/// Connects to an export that a node can use.
///
/// # Errors
/// [`OpenError`].
pub(super) fn connect(
    export: &NbdExport,
    config: Config,
    keeper: Option<Arc<dyn Keeper>>,
) -> Result<Client, OpenError> {
    let place = place(export);
    let address = Address { server: export.server.clone(), export: export.name.clone(), tls: Tls::Off };
    let client = match Client::connect_kept(address, config, keeper) {
        Ok(client) => client,
        Err(source) => return Err(OpenError::Unreachable { place, source }),
    };
    if offers(&client, flag::READ_ONLY) {
        return Err(OpenError::ReadOnlyExport { place });
    }
    if !offers(&client, flag::SEND_FLUSH) {
        return Err(OpenError::NoFlush { place });
    }
    Ok(client)
}

/// The export's address, for errors.
pub(super) fn place(export: &NbdExport) -> Place {
    Place::Export(export.to_string())
}

fn connect_for_a_while(export: &NbdExport) -> Result<Client, OpenError> {
    connect(export, Config { unavailable_after: UNAVAILABLE_AFTER, connections: 1, ..Config::default() }, None)
}

/// Makes a node of the export. An export that is not empty is refused; what is not known to read as zeros is read, all of
/// it. With [`Creation::force`] everything in it is overwritten with zeros instead, unless it is a node already.
///
/// # Errors
/// [`OpenError`]; then the export is no node. What was overwritten is lost.
pub fn create(export: &NbdExport, format: &NodeFormat, how: Creation) -> Result<Created, OpenError> {
    let (client, place) = (connect_for_a_while(export)?, place(export));
    let tail = Tail::of(&client, &place, format.len)?;
    match tail.superblock() {
        Ok(found) => return Err(OpenError::InUse { place, volume: found.volume }),
        Err(OpenError::NoSuperblock { .. }) => {}
        Err(OpenError::BadSuperblock { source: BadSuperblock::Checksum { .. }, .. }) if how.force => {}
        Err(e) => return Err(e),
    }
    let all = 0..tail.end();
    if how.force {
        durably(&client, || zero(&client, all.clone())).map_err(failed(&place, "write zeros"))?;
    } else if let Some((offset, byte)) = first_used(&client, all).map_err(failed(&place, "read it"))? {
        return Err(OpenError::UsedExport { place, offset, byte });
    }
    let created = Created { node: Some((client, place, format.len)) };
    let (client, place, _) = created.node.as_ref().expect("put there a moment ago");
    let tail = Tail::of(client, place, format.len)?;
    tail.put_record(&format.superblock)?;
    tail.put_superblock(&format.superblock)?;
    Ok(created)
}

fn failed(place: &Place, action: &'static str) -> impl Fn(Error) -> OpenError {
    move |source| OpenError::Nbd { place: place.clone(), action, source }
}

/// A node that was made. It is wiped again on drop, unless [`Created::confirm`] was called.
#[derive(Debug)]
#[must_use = "what was created is removed again unless it is confirmed"]
pub struct Created {
    node: Option<(Client, Place, u64)>,
}

impl Created {
    /// Keeps what was created.
    pub fn confirm(mut self) {
        self.node = None;
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        let Some((client, place, len)) = &self.node else { return };
        // The error that led here is reported. A node that is left over is refused as one of this volume, and can be destroyed.
        let _ = Tail::of(client, place, *len).and_then(|tail| tail.wipe());
    }
}

/// Checks that the export bears exactly this node, and has the size that it had.
///
/// # Errors
/// [`OpenError`] says what was found instead.
pub(super) fn check(client: &Client, place: &Place, format: &NodeFormat) -> Result<(), OpenError> {
    let found = Tail::of(client, place, format.len).and_then(|tail| Ok((tail.superblock()?, tail)));
    let (found, tail) = match found {
        Err(e @ (OpenError::TooSmall { .. } | OpenError::NoSuperblock { .. })) => {
            tail::found_elsewhere(client, place, format)?;
            return Err(e);
        }
        found => found?,
    };
    check_superblock(&found, &format.superblock, place)?;
    tail.check_record(&format.superblock)
}

/// Checks that a core could serve from the export. Changes nothing.
///
/// # Errors
/// [`OpenError`].
pub fn check_open(export: &NbdExport, format: &NodeFormat) -> Result<(), OpenError> {
    check(&connect_for_a_while(export)?, &place(export), format)
}

/// Checks that the node can be brought from `old` to `new`: it is this one, and its export has room. Changes nothing.
///
/// # Errors
/// [`OpenError`].
pub fn check_resize(export: &NbdExport, old: &NodeFormat, new: &NodeFormat) -> Result<(), OpenError> {
    let (client, place) = (connect_for_a_while(export)?, place(export));
    resizable(&client, &place, old, new).map(drop)
}

/// Brings the node to `new`, wherever an interrupted resize from `old` left it. What it gains reads as zeros. Nothing has
/// been written to what it has above `new`.
///
/// # Errors
/// [`OpenError`].
pub fn resize(export: &NbdExport, old: &NodeFormat, new: &NodeFormat) -> Result<(), OpenError> {
    let (client, place) = (connect_for_a_while(export)?, place(export));
    let (tail, found) = resizable(&client, &place, old, new)?;
    let gained = node_len(&found)..new.len;
    if !gained.is_empty() {
        durably(&client, || zero(&client, gained.clone())).map_err(failed(&place, "write zeros"))?;
    }
    if found.size == new.superblock.size { Ok(()) } else { tail.put_superblock(&new.superblock) }
}

/// A node that may be resized, with its superblock. An interrupted resize may have left it larger.
fn resizable<'a>(
    client: &'a Client,
    place: &'a Place,
    old: &NodeFormat,
    new: &NodeFormat,
) -> Result<(Tail<'a>, Superblock), OpenError> {
    let found = Tail::of(client, place, old.len)?.superblock();
    if let Err(OpenError::NoSuperblock { .. }) = &found {
        tail::found_elsewhere(client, place, old)?;
    }
    let found = found?;
    let size = found.size.max(old.superblock.size);
    check_superblock(&found, &Superblock { size, ..old.superblock }, place)?;
    let tail = Tail::of(client, place, new.len)?;
    tail.check_record(&old.superblock)?;
    let lost = new.len..node_len(&found);
    if !lost.is_empty() && first_used(client, lost).map_err(failed(place, "read it"))?.is_some() {
        return Err(OpenError::Beyond { place: place.clone(), len: new.len });
    }
    Ok((tail, found))
}

/// Checks that the node is this one and may be removed. Changes nothing.
///
/// # Errors
/// [`OpenError`].
pub fn check_destroy(export: &NbdExport, volume: Uuid, node: Uuid) -> Result<(), OpenError> {
    let (client, place) = (connect_for_a_while(export)?, place(export));
    check_owner(&Tail::of(&client, &place, 0)?.superblock()?, volume, node, &place)
}

/// Removes the node: its data where the server has a way to do that without being sent zeros, then its superblock. Returns
/// false when there was none.
///
/// # Errors
/// [`OpenError`] when the export belongs to another volume or node, or when the server fails.
pub fn destroy(export: &NbdExport, volume: Uuid, node: Uuid) -> Result<bool, OpenError> {
    let (client, place) = (connect_for_a_while(export)?, place(export));
    let tail = Tail::of(&client, &place, 0)?;
    match tail.superblock() {
        Ok(found) => check_owner(&found, volume, node, &place)?,
        Err(OpenError::NoSuperblock { .. }) => return Ok(false),
        Err(e) => return Err(e),
    }
    match durably(&client, || give_back(&client, 0..tail.start())) {
        Err(source) if source.kind() == Kind::Unavailable => {
            return Err(OpenError::Nbd { place, action: "give its space back", source });
        }
        // The data is wanted no more. If it stays, its space does too, and the next volume there needs force.
        _ => {}
    }
    tail.wipe()?;
    Ok(true)
}

fn give_back(client: &Client, range: Range<u64>) -> Result<(), Error> {
    let (offset, len) = (range.start, range.end - range.start);
    if offers(client, flag::SEND_WRITE_ZEROES) {
        zero(client, range)
    } else if offers(client, flag::SEND_TRIM) {
        plain(client, Command::Trim { offset, len })
    } else {
        Ok(())
    }
}
