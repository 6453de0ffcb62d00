//! The parts of the file system that volumes use, and their conflicts: a storage node lies in no other node, and neither in nor over a file
//! that a volume is attached at; no file or socket lies in a node.
//!
//! An export of an NBD server is no part of it ([`crate::exports`] is about those).
//!
//! Every volume counts that this control module knows, attached or not, and those that are being made. A place is identified by its file
//! system and the path in it ([`Ground`]), so bind mounts, links and `..` lead nowhere else.

use std::{
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use everdisk_proto::{ids::VolumeName, nbd::NbdAddress, volume::VolumeSpec};
use everdisk_sys::mounts::{self, Ground};

use crate::{
    error::{Error, Result},
    record::Attachment,
};

/// Time limit for a file system that hangs. After it, places on it are compared by their paths.
const SEARCH_LIMIT: Duration = Duration::from_secs(2);

/// A place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    path: PathBuf,
    /// Where that is, as far as it can be found out. A mounted file has two: the one it covers, and its own.
    grounds: Vec<Ground>,
}

impl Claim {
    fn is_in(&self, other: &Self) -> bool {
        if self.grounds.is_empty() || other.grounds.is_empty() {
            return self.path.starts_with(&other.path);
        }
        self.grounds.iter().any(|own| other.grounds.iter().any(|other| own.is_in(other)))
    }
}

/// What a volume has at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A storage node.
    Node,
    /// The file, or a socket, that it is attached at.
    FrontEnd,
}

/// Something that a volume has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    volume: VolumeName,
    what: What,
    place: Claim,
}

/// What volumes have, looked up at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Territory(Vec<Holding>);

impl Territory {
    /// Of these volumes with their attachments.
    pub fn of(volumes: &[(VolumeSpec, Option<Attachment>)]) -> Self {
        let mut wanted = Vec::new();
        for (spec, attachment) in volumes {
            let directories = spec.nodes.iter().filter_map(|node| node.url.as_directory());
            wanted.extend(directories.map(|path| (spec.name.clone(), What::Node, path.clone())));
            let front_ends = attachment.as_ref().map(front_ends).unwrap_or_default();
            wanted.extend(front_ends.into_iter().map(|path| (spec.name.clone(), What::FrontEnd, path)));
        }
        let places = places(wanted.iter().map(|(_, what, path)| (what.clone(), path.clone())).collect());
        let pairs = wanted.into_iter().zip(places);
        Self(pairs.map(|((volume, what, _), place)| Holding { volume, what, place }).collect())
    }

    /// Refuses a path for the file or a socket of `volume` that lies in a storage node, or is another volume's.
    ///
    /// # Errors
    /// Whose it is in.
    pub fn refuse_front_end(&self, shown: &str, path: &Path, volume: &VolumeName) -> Result<()> {
        let place = one(What::FrontEnd, path);
        for holding in &self.0 {
            let other = holding.place.path.display();
            let why = match holding.what {
                What::Node if !place.is_in(&holding.place) => continue,
                What::Node if holding.volume == *volume => {
                    format!("it lies in the volume's own storage node dir:{other}; give a path outside of it")
                }
                What::Node => {
                    format!(
                        "it lies in storage node dir:{other} of volume {}; give a path outside of it",
                        holding.volume
                    )
                }
                What::FrontEnd if holding.volume != *volume && place.is_in(&holding.place) => {
                    format!(
                        "volume {0} is attached there; give another path, or `everdisk detach {0}` first",
                        holding.volume
                    )
                }
                What::FrontEnd => continue,
            };
            return Err(Error::State(format!("cannot attach at {shown}: {why}")));
        }
        Ok(())
    }

    /// Refuses storage nodes of a new volume of which one lies in another, or in or over what other volumes have.
    ///
    /// # Errors
    /// Which is in whose way.
    pub fn refuse_nodes(&self, spec: &VolumeSpec) -> Result<()> {
        let own = Self::of(&[(spec.clone(), None)]);
        for (index, node) in own.0.iter().enumerate() {
            let earlier = &own.0[..index];
            for other in self.0.iter().chain(earlier) {
                let (inside, over) = (node.place.is_in(&other.place), other.place.is_in(&node.place));
                if !inside && !over {
                    continue;
                }
                let at = other.place.path.display();
                let whose = if other.volume == spec.name {
                    format!("storage node dir:{at} of the same volume")
                } else if other.what == What::Node {
                    format!("storage node dir:{at} of volume {}", other.volume)
                } else {
                    format!("{at}, where volume {} is attached", other.volume)
                };
                let relation = match (inside, over) {
                    (true, true) => "it is",
                    (true, false) => "it lies in",
                    _ => "in it lies",
                };
                return Err(Error::State(format!(
                    "dir:{}: {relation} {whose}; choose another directory",
                    node.place.path.display()
                )));
            }
        }
        Ok(())
    }
}

/// The paths of an attachment whose processes live. Those of a dead one are free, as far as nothing is mounted there.
fn front_ends(attachment: &Attachment) -> Vec<PathBuf> {
    if !attachment.of_this_boot() || !(attachment.is_being_made() || attachment.lives()) {
        return Vec::new();
    }
    let sockets = attachment.nbd.iter().filter_map(|nbd| match &nbd.address {
        NbdAddress::Unix(path) => Some(path.clone()),
        NbdAddress::Tcp { .. } => None,
    });
    attachment.file.iter().map(|file| file.path.clone()).chain(sockets).collect()
}

fn one(what: What, path: &Path) -> Claim {
    places(vec![(what, path.to_owned())]).pop().expect("each path has its claim")
}

/// Finds out where places are, on a thread of its own: one of the file systems may hang.
fn places(wanted: Vec<(What, PathBuf)>) -> Vec<Claim> {
    let (sender, found) = mpsc::channel();
    let paths: Vec<PathBuf> = wanted.iter().map(|(_, path)| path.clone()).collect();
    // Where no thread can be started, no answer comes, as from one that hangs.
    let _ = thread::Builder::new().spawn(move || {
        for (what, path) in wanted {
            let own = mounts::ground(&path).ok();
            let covered = match what {
                What::Node => None,
                What::FrontEnd => path
                    .parent()
                    .and_then(|parent| mounts::ground(parent).ok())
                    .and_then(|ground| Some(Ground { path: ground.path.join(path.file_name()?), ..ground })),
            };
            if sender.send(own.into_iter().chain(covered).collect()).is_err() {
                return;
            }
        }
    });
    let deadline = std::time::Instant::now() + SEARCH_LIMIT;
    let mut hangs = false;
    let look = paths.into_iter().map(|path| {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        // Once one was not there in time, what comes later is no longer matched to its path.
        let grounds: Vec<Ground> = found.recv_timeout(left).ok().filter(|_| !hangs).unwrap_or_else(|| {
            hangs = true;
            Vec::new()
        });
        Claim { path, grounds }
    });
    look.collect()
}

#[cfg(test)]
mod tests;
