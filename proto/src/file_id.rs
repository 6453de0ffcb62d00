//! What a file is, whatever bears its name by now.

use serde::{Deserialize, Serialize};

/// Identity of a file. Device and inode tell it from every other file that exists; when it was made tells it from a later one that
/// was given its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Its file system, as stat(2) numbers it.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// When it was made, in ns after 1970, where the file system knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub born_ns: Option<u64>,
}
