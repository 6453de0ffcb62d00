//! The locks of the storage nodes: as long as the front ends of a volume are open, no other process serves, grows or
//! deletes its nodes.
//!
//! A node is locked by an exclusive flock(2) on its data file, the file that is written to; it is never replaced, only
//! grown in its place. The interface takes the locks when it opens the front ends, and lends them to every core. So the
//! death of one process does not release them while another serves; they are released with the last.
//!
//! This concerns directories. An export of an NBD server has no lock of an operating system. What protects it is the identity
//! in its superblock: a core serves it only for the volume that it belongs to. Two computing nodes that serve that volume at
//! once are not prevented yet; a lease in the superblock is to do that in a later version.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use everdisk_proto::{frame::FromInterface, limits::FRAME_FDS_MAX, superblock::DATA_FILE, volume::NodeUrl};
use everdisk_sys::{
    link::LinkError,
    lock::{self, LockError},
};
use rustix::{
    fs::{Mode, OFlags},
    io::retry_on_intr,
};

use crate::cores::Core;

/// The locks of the directories among the nodes, in the order of the layout.
#[derive(Debug, Default)]
pub(crate) struct NodeLocks(Vec<OwnedFd>);

impl NodeLocks {
    /// Takes the lock of every node that is a directory, or none.
    pub(crate) fn take(nodes: &[NodeUrl]) -> Result<Self, String> {
        let directories = nodes.iter().filter_map(|node| Some((node, node.as_directory()?)));
        let locks = directories.map(|(node, path)| {
            take(path).map_err(|e| match e {
                LockError::Held(_) => format!("storage node {node}: {e}; detach the volume there, or end that process"),
                LockError::Unsupported(_) => format!(
                    "storage node {node}: {e}, so nothing would keep another control module off it; mount it with locks \
                     (NFS: the server's lock service, or local_lock=flock where one computing node alone uses it)"
                ),
                LockError::Io(_) => format!("storage node {node}: {e}"),
            })
        });
        locks.collect::<Result<_, _>>().map(Self)
    }

    /// Adopts the locks that a core gave back.
    pub(crate) fn adopt(locks: Vec<OwnedFd>) -> Self {
        Self(locks)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Frames by which they are lent.
    pub(crate) fn frames(&self) -> usize {
        self.0.len().div_ceil(FRAME_FDS_MAX)
    }

    /// Lends them to a core.
    pub(crate) fn lend(&self, core: &mut Core) -> Result<(), LinkError> {
        for (index, locks) in self.0.chunks(FRAME_FDS_MAX).enumerate() {
            let from = u8::try_from(index * FRAME_FDS_MAX).expect("a volume has at most 64 nodes");
            let fds: Vec<BorrowedFd<'_>> = locks.iter().map(AsFd::as_fd).collect();
            let count = u8::try_from(fds.len()).expect("a frame has at most 16 descriptors");
            core.tell(FromInterface::LendLocks { from, locks: count }, &fds)?;
        }
        Ok(())
    }
}

fn take(node: &Path) -> Result<OwnedFd, LockError> {
    let path = node.join(DATA_FILE);
    // Opened for writing, which NFS requires for a lock.
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = retry_on_intr(|| rustix::fs::open(&path, flags, Mode::empty())).map_err(std::io::Error::from)?;
    lock::exclusive(file.as_fd())?;
    if !lock::is_at(file.as_fd(), &path)? {
        return Err(std::io::Error::other("it was replaced at this moment; try again").into());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsRawFd};

    use super::*;

    fn nodes(paths: &[std::path::PathBuf]) -> Vec<NodeUrl> {
        paths.iter().cloned().map(NodeUrl::Dir).collect()
    }

    #[test]
    fn all_nodes_are_locked_or_none_and_the_refusal_names_node_and_holder() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["a", "b"].map(|name| dir.path().join(name));
        for path in &paths {
            fs::create_dir(path).unwrap();
            fs::write(path.join(DATA_FILE), "").unwrap();
        }
        let second = NodeLocks::take(&nodes(&paths[1..])).unwrap();
        let refused = NodeLocks::take(&nodes(&paths)).unwrap_err();
        let (node, holder) = (format!("dir:{}", paths[1].display()), format!("process {}", std::process::id()));
        assert!(refused.contains(&node) && refused.contains(&holder) && refused.contains("detach"), "{refused}");
        let first = NodeLocks::take(&nodes(&paths[..1])).unwrap();
        drop((first, second));
        assert_eq!(NodeLocks::take(&nodes(&paths)).unwrap().len(), 2);
    }

    #[test]
    fn g_directories_beside_exports_are_locked_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["a", "b"].map(|name| dir.path().join(name));
        for path in &paths {
            fs::create_dir(path).unwrap();
            fs::write(path.join(DATA_FILE), "").unwrap();
        }
        let mut mixed = nodes(&paths);
        mixed.insert(0, "nbd://host/x".parse().unwrap());
        mixed.insert(2, "nbd+unix:///y?socket=/run/s".parse().unwrap());
        let locks = NodeLocks::take(&mixed).unwrap();
        let file = |fd: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        let locked: Vec<_> = locks.0.iter().map(file).collect();
        assert_eq!(locked, paths.map(|path| path.canonicalize().unwrap().join(DATA_FILE)));
        assert_eq!(NodeLocks::take(&mixed[..1]).unwrap().len(), 0);
        assert!(NodeLocks::take(&mixed).unwrap_err().contains(&mixed[1].to_string()));
    }
}
