//! Whether a superblock is the expected one, wherever it lies.

use everdisk_proto::superblock::Superblock;
use uuid::Uuid;

use crate::{OpenError, Place};

const ADVICE_LAYOUT: &str = "Give the storage nodes as they were when the volume was created";
pub(crate) const ADVICE_RESIZE: &str =
    "If a resize was interrupted, repeat it; else restore the storage node from a backup";

/// Checks that a superblock is of this node.
pub(crate) fn check_owner(found: &Superblock, volume: Uuid, node: Uuid, place: &Place) -> Result<(), OpenError> {
    if found.volume != volume {
        return Err(OpenError::OtherVolume { place: place.clone(), found: found.volume, expected: volume });
    }
    if found.node != node {
        return Err(OpenError::OtherNode { place: place.clone(), found: found.node, expected: node });
    }
    Ok(())
}

/// Checks that a superblock is the expected one.
pub(crate) fn check_superblock(found: &Superblock, expected: &Superblock, place: &Place) -> Result<(), OpenError> {
    check_owner(found, expected.volume, expected.node, place)?;
    let properties = [
        ("place", u64::from(found.index), u64::from(expected.index), ADVICE_LAYOUT),
        ("number of storage nodes", u64::from(found.nodes), u64::from(expected.nodes), ADVICE_LAYOUT),
        ("stripe unit", found.stripe, expected.stripe, ADVICE_LAYOUT),
        ("volume size", found.size, expected.size, ADVICE_RESIZE),
    ];
    match properties.into_iter().find(|(_, found, expected, _)| found != expected) {
        None => Ok(()),
        Some((what, found, expected, advice)) => {
            Err(OpenError::OtherLayout { place: place.clone(), what, found, expected, advice })
        }
    }
}

/// Bytes of the volume that a node with this superblock holds: whole stripes in turn, from the first node on.
pub fn node_len(superblock: &Superblock) -> u64 {
    let Superblock { size, stripe, .. } = *superblock;
    let row = stripe * u64::from(superblock.nodes);
    let before = stripe * u64::from(superblock.index);
    size / row * stripe + (size % row).saturating_sub(before).min(stripe)
}
