//! Identity of a file, independent of its name.

use serde::{Deserialize, Serialize};

/// Identity of a file. Device and inode distinguish it from every other existing file. The birth time distinguishes it
/// from a later file with the same inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Its file system, as stat(2) numbers it.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// Its birth time, in ns after 1970, where the file system records it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub born_ns: Option<u64>,
}
