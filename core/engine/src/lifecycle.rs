//! Opening, creating, growing and removing a volume: what each of its nodes must bear, and the order over them.

use everdisk_proto::{
    superblock::Superblock,
    volume::{NodeSpec, VolumeSpec},
};
use everdisk_store::{Created, NodeFormat, Store};

use crate::{Engine, OpenError, layout::Layout};

fn layout(spec: &VolumeSpec) -> Layout {
    Layout::new(spec.stripe, spec.nodes.len())
}

/// Every node of a volume of `size` bytes with what it must bear.
fn formats(spec: &VolumeSpec, size: u64) -> impl Iterator<Item = (&NodeSpec, NodeFormat)> {
    let layout = layout(spec);
    let nodes = u32::try_from(spec.nodes.len()).unwrap_or(u32::MAX);
    (0..nodes).zip(&spec.nodes).enumerate().map(move |(place, (index, node))| {
        let superblock = Superblock { volume: spec.uuid, node: node.uuid, size, stripe: spec.stripe, index, nodes };
        (node, NodeFormat { superblock, len: layout.node_len(place, size) })
    })
}

impl Engine {
    /// Opens the volume. Every node must bear its superblock (D11).
    ///
    /// # Errors
    /// [`OpenError`] names the first node that is something else.
    pub fn open(spec: &VolumeSpec) -> Result<Self, OpenError> {
        Self::open_with(spec, &|store| store)
    }

    /// [`Self::open`], with every store passed through `wrap`: tests put stores that fail around the real ones.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(spec: &VolumeSpec, wrap: &dyn Fn(Box<dyn Store>) -> Box<dyn Store>) -> Result<Self, OpenError> {
        spec.validate()?;
        let stores = formats(spec, spec.size)
            .map(|(node, format)| Ok(wrap(everdisk_store::open(&node.url, &format)?)))
            .collect::<Result<_, OpenError>>()?;
        Ok(Self::new(spec.size, layout(spec), stores))
    }

    /// Makes every node ready.
    ///
    /// # Errors
    /// [`OpenError`]; then the nodes that were made are removed again.
    pub fn create(spec: &VolumeSpec) -> Result<(), OpenError> {
        spec.validate()?;
        let created = formats(spec, spec.size)
            .map(|(node, format)| everdisk_store::create(&node.url, &format))
            .collect::<Result<Vec<_>, _>>()?;
        created.into_iter().for_each(Created::confirm);
        Ok(())
    }

    /// Removes every node's data and superblock. Every node is tried; may be repeated.
    ///
    /// # Errors
    /// The first [`OpenError`].
    pub fn destroy(spec: &VolumeSpec) -> Result<(), OpenError> {
        spec.validate()?;
        let destroyed = spec.nodes.iter().map(|node| everdisk_store::destroy(&node.url, spec.uuid, node.uuid));
        Ok(destroyed.fold(Ok(()), Result::and)?)
    }

    /// Grows the volume, which no core may have open, from `spec.size` to `new_size` bytes. When it is interrupted
    /// between two nodes the volume does not open until it is repeated, with the same or a larger `new_size`.
    ///
    /// # Errors
    /// [`OpenError`]. Every node is examined before the first is changed.
    pub fn resize(spec: &VolumeSpec, new_size: u64) -> Result<(), OpenError> {
        spec.validate()?;
        VolumeSpec { size: new_size, ..spec.clone() }.validate()?;
        if new_size < spec.size {
            return Err(OpenError::Shrink { size: spec.size, new_size });
        }
        for ((node, old), (_, new)) in formats(spec, spec.size).zip(formats(spec, new_size)) {
            everdisk_store::check_resize(&node.url, &old, &new)?;
        }
        for ((node, old), (_, new)) in formats(spec, spec.size).zip(formats(spec, new_size)) {
            everdisk_store::resize(&node.url, &old, &new)?;
        }
        Ok(())
    }
}
