//! Opening, creating, growing and removing a volume: what each of its nodes must bear, and the order over them.

use std::sync::Arc;

use everdisk_proto::{
    superblock::Superblock,
    volume::{NodeSpec, VolumeSpec},
};
use everdisk_store::{
    Created, Creation, NodeFormat, Store,
    room::{self, Room},
};

use crate::{Engine, OpenError, layout::Layout};

fn layout(spec: &VolumeSpec) -> Layout {
    Layout::new(spec.stripe, spec.nodes.len())
}

/// Every node of a volume of `size` bytes with what it must bear.
fn formats(spec: &VolumeSpec, size: u64) -> impl Iterator<Item = (&NodeSpec, NodeFormat)> {
    let layout = layout(spec);
    let nodes = u32::try_from(spec.nodes.len()).expect("a volume has at most 64 nodes");
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
        let engine = Self::open_with(spec, &|store| store)?;
        engine.serve(|_| None)?;
        Ok(engine)
    }

    /// [`Self::open`], with every store passed through `wrap`: tests put stores that fail around the real ones.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(spec: &VolumeSpec, wrap: &dyn Fn(Arc<dyn Store>) -> Arc<dyn Store>) -> Result<Self, OpenError> {
        spec.validate()?;
        let stores = formats(spec, spec.size)
            .map(|(node, format)| Ok(wrap(everdisk_store::open(&node.url, &format, spec.timeouts.io())?)))
            .collect::<Result<_, OpenError>>()?;
        Ok(Self::new(spec.size, layout(spec), stores))
    }

    /// [`Self::create_with`] nothing particular.
    ///
    /// # Errors
    /// As [`Self::create_with`].
    pub fn create(spec: &VolumeSpec) -> Result<Vec<usize>, OpenError> {
        Self::create_with(spec, Creation::default())
    }

    /// Makes every node ready, and its directory where that is missing. Returns the indices of the nodes whose
    /// directory was made.
    ///
    /// # Errors
    /// [`OpenError`]; then the nodes that were made are removed again. What was overwritten by force is lost.
    pub fn create_with(spec: &VolumeSpec, how: Creation) -> Result<Vec<usize>, OpenError> {
        spec.validate()?;
        let mut created = Vec::new();
        for (node, format) in formats(spec, spec.size) {
            match everdisk_store::create(&node.url, &format, how) {
                Ok(made) => created.push(made),
                Err(everdisk_store::OpenError::InUse { volume, .. }) if volume == spec.uuid => {
                    return Err(OpenError::SameNode(node.url.clone()));
                }
                Err(e) => return Err(e.into()),
            }
        }
        let made = created.iter().enumerate().filter(|(_, created)| created.made_directory());
        let made = made.map(|(place, _)| place).collect();
        created.into_iter().for_each(Created::confirm);
        Ok(made)
    }

    /// Checks that the directory of every node that is to be made exists.
    ///
    /// # Errors
    /// The first that is missing.
    pub fn check_directories(spec: &VolumeSpec) -> Result<(), OpenError> {
        let checked = spec.nodes.iter().map(|node| room::check_directory(&node.url));
        Ok(checked.collect::<Result<_, _>>()?)
    }

    /// Returns the indices of the nodes whose file systems have less free space than a volume of `size` bytes may come
    /// to need there, with the free and the needed bytes. Nodes that share a file system need the sum.
    pub fn short_of_room(spec: &VolumeSpec, size: u64) -> Vec<(usize, u64, u64)> {
        let parts: Vec<(Option<Room>, u64)> =
            formats(spec, size).map(|(node, format)| (room::room(&node.url), format.len)).collect();
        let needed =
            |place| parts.iter().filter(|(at, _)| at.is_some_and(|at| at.place == place)).map(|(_, len)| len).sum();
        let rooms = parts.iter().enumerate().filter_map(|(place, (room, _))| Some((place, (*room)?)));
        rooms
            .map(|(place, room)| (place, room.free, needed(room.place)))
            .filter(|(_, free, needed)| free < needed)
            .collect()
    }

    /// Checks that a core could serve from every node. Changes nothing.
    ///
    /// # Errors
    /// [`OpenError`] names the first node that is something else.
    pub fn check_open(spec: &VolumeSpec) -> Result<(), OpenError> {
        spec.validate()?;
        let mut nodes = formats(spec, spec.size);
        Ok(nodes.try_for_each(|(node, format)| everdisk_store::check_open(&node.url, &format))?)
    }

    /// Checks that every node is there, is this volume's and may be removed. Changes nothing.
    ///
    /// # Errors
    /// [`OpenError`] names the first node that is something else.
    pub fn check_destroy(spec: &VolumeSpec) -> Result<(), OpenError> {
        spec.validate()?;
        let mut nodes = spec.nodes.iter();
        Ok(nodes.try_for_each(|node| everdisk_store::check_destroy(&node.url, spec.uuid, node.uuid))?)
    }

    /// Removes every node's data and superblock. Every node is tried. May be repeated. Returns the indices of the nodes
    /// where there was nothing.
    ///
    /// # Errors
    /// The first [`OpenError`].
    pub fn destroy(spec: &VolumeSpec) -> Result<Vec<usize>, OpenError> {
        spec.validate()?;
        let tried: Vec<_> =
            spec.nodes.iter().map(|node| everdisk_store::destroy(&node.url, spec.uuid, node.uuid)).collect();
        let mut gone = Vec::new();
        for (place, tried) in tried.into_iter().enumerate() {
            if !tried? {
                gone.push(place);
            }
        }
        Ok(gone)
    }

    /// Checks that [`Engine::resize`] would begin. Changes nothing.
    ///
    /// # Errors
    /// [`OpenError`] names the first node that is in the way.
    pub fn check_resize(spec: &VolumeSpec, new_size: u64) -> Result<(), OpenError> {
        spec.validate()?;
        VolumeSpec { size: new_size, ..spec.clone() }.validate()?;
        if new_size < spec.size {
            return Err(OpenError::Shrink { size: spec.size, new_size });
        }
        let mut nodes = formats(spec, spec.size).zip(formats(spec, new_size));
        Ok(nodes.try_for_each(|((node, old), (_, new))| everdisk_store::check_resize(&node.url, &old, &new))?)
    }

    /// Grows the volume, which no core may have open, from `spec.size` to `new_size` bytes. Until the volume's
    /// description has the new size, a resize may be repeated with any other size. With `spec.size` it is undone: this
    /// removes what an interrupted resize left above that, to which nothing has been written.
    ///
    /// ```text
    ///  every node is there, is this one, may be changed, and its file system holds the length      nothing is changed
    ///  node by node: data file, superblock                                                         a failure undoes all of them
    /// ```
    ///
    /// # Errors
    /// [`OpenError`]; then every node is as `spec` says, unless the error says otherwise.
    pub fn resize(spec: &VolumeSpec, new_size: u64) -> Result<(), OpenError> {
        Self::check_resize(spec, new_size)?;
        let resized = bring_to(spec, new_size);
        let Err(refused) = resized else { return Ok(()) };
        match bring_to(spec, spec.size) {
            Ok(()) => Err(refused.into()),
            Err(stuck) => Err(OpenError::HalfResized { refused: Box::new(refused), stuck: Box::new(stuck) }),
        }
    }
}

/// Brings every node to `size`. Every node is tried.
fn bring_to(spec: &VolumeSpec, size: u64) -> Result<(), everdisk_store::OpenError> {
    let nodes = formats(spec, spec.size).zip(formats(spec, size));
    let tried = nodes.map(|((node, old), (_, new))| everdisk_store::resize(&node.url, &old, &new));
    tried.fold(Ok(()), Result::and)
}
