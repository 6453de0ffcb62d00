//! Where a storage node may be made, and how much room there is.

use std::fs;

use everdisk_proto::volume::NodeUrl;
use rustix::{fs::statvfs, io::Errno};

use crate::OpenError;

/// Free space of the place of a node, and what tells that place from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Nodes with the same number share the space.
    pub place: u64,
    /// Bytes that are free.
    pub free: u64,
}

/// Whether the directory of a node that is to be made is there.
///
/// # Errors
/// [`OpenError::NoDirectory`].
pub fn check_directory(url: &NodeUrl) -> Result<(), OpenError> {
    let NodeUrl::Dir(path) = url;
    match fs::metadata(path) {
        Err(e) if Errno::from_io_error(&e) == Some(Errno::NOENT) => {
            Err(OpenError::NoDirectory { path: path.to_owned() })
        }
        // Whatever else is wrong, making the node says.
        _ => Ok(()),
    }
}

/// The room for a node that is there; none where nobody can tell.
pub fn room(url: &NodeUrl) -> Option<Room> {
    let NodeUrl::Dir(path) = url;
    let found = statvfs(path).ok()?;
    Some(Room {
        place: std::os::unix::fs::MetadataExt::dev(&fs::metadata(path).ok()?),
        free: found.f_bavail * found.f_frsize,
    })
}
