//! Checks before a storage node is made: its directory, and the free space.

use std::fs;

use everdisk_proto::volume::NodeUrl;
use rustix::{fs::statvfs, io::Errno};

use crate::OpenError;

/// Free space at the place of a node, and a number that identifies that place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Nodes with the same number share the space.
    pub place: u64,
    /// Bytes that are free.
    pub free: u64,
}

/// Checks that the directory of a node that is to be made exists. An export has none, and is looked at when the node is made.
///
/// # Errors
/// [`OpenError::NoDirectory`].
pub fn check_directory(url: &NodeUrl) -> Result<(), OpenError> {
    let NodeUrl::Dir(path) = url else { return Ok(()) };
    match fs::metadata(path) {
        Err(e) if Errno::from_io_error(&e) == Some(Errno::NOENT) => {
            Err(OpenError::NoDirectory { path: path.to_owned() })
        }
        // Any other problem is reported when the node is made.
        _ => Ok(()),
    }
}

/// The room for a node that is to be made there; `None` where that is unknown. NBD tells the size of an export, which
/// bounds the node ([`OpenError::TooSmall`]), and not what its server has left to fill it.
pub fn room(url: &NodeUrl) -> Option<Room> {
    let path = url.as_directory()?;
    let found = statvfs(path).ok()?;
    Some(Room {
        place: std::os::unix::fs::MetadataExt::dev(&fs::metadata(path).ok()?),
        free: found.f_bavail * found.f_frsize,
    })
}
