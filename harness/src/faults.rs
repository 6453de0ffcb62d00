//! Commands to the storage nodes of a volume that runs on the faulty core ([`Host::take_faulty_core`](crate::host::Host::take_faulty_core)).

use std::{
    fs,
    path::{Path, PathBuf},
};

use everdisk_proto::volume::NodeUrl;
use everdisk_testkit::fault_store::{Counts, Faults as Language, Operation, counts, fault_file};

use crate::{Error, Result, pass};

/// The storage nodes of one volume. Dropping it ends every fault, so that what hangs goes on and the volume can be
/// detached: make it after the host.
#[derive(Debug)]
#[must_use]
pub struct Faults {
    nodes: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Faults {
    /// Of the nodes in these directories.
    pub fn of(nodes: Vec<PathBuf>) -> Self {
        let files = nodes.iter().map(|node| fault_file(&NodeUrl::Dir(node.clone()))).collect();
        Self { nodes, files }
    }

    /// Each node's directory, and the file that commands it.
    pub fn nodes(&self) -> impl Iterator<Item = (&Path, &Path)> {
        self.nodes.iter().map(PathBuf::as_path).zip(self.files.iter().map(PathBuf::as_path))
    }

    /// What every node does from the next operation on, and what hangs at once; see `fault_store::Faults` for the
    /// language.
    ///
    /// # Errors
    /// The text is not understood, or a file cannot be written.
    pub fn try_set(&self, text: &str) -> Result<()> {
        self.files.iter().try_for_each(|file| write(file, text))
    }

    /// What every node does from the next operation on, and what hangs at once.
    pub fn set(&self, text: &str) {
        pass(self.try_set(text));
    }

    /// [`Self::set`] of one node alone; the others do as before.
    pub fn set_node(&self, index: usize, text: &str) {
        pass(write(&self.files[index], text));
    }

    /// Every node works well again.
    pub fn clear(&self) {
        for file in &self.files {
            let _ = fs::remove_file(file);
        }
    }

    /// What all cores together did so far to all nodes together.
    pub fn counts(&self) -> Counts {
        self.each().map(|(_, counts)| counts).fold(Counts::default(), |sum, counts| sum + counts)
    }

    /// What one core did so far to all nodes together.
    pub fn counts_of(&self, core: u32) -> Counts {
        let own = self.each().filter(|(pid, _)| *pid == core);
        own.map(|(_, counts)| counts).fold(Counts::default(), |sum, counts| sum + counts)
    }

    /// Writes that arrived on the nodes so far.
    pub fn writes(&self) -> u64 {
        self.counts().operations(Operation::Write)
    }

    fn each(&self) -> impl Iterator<Item = (u32, Counts)> {
        self.files.iter().flat_map(|file| counts(file))
    }
}

/// Replaces the file in one step: no core may read half of it.
fn write(file: &Path, text: &str) -> Result<()> {
    text.parse::<Language>().map_err(|e| Error::Failed(e.to_string()))?;
    let aside = file.with_extension("aside");
    let written = fs::write(&aside, text).and_then(|()| fs::rename(&aside, file));
    written.map_err(Error::io("command a storage node"))
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.clear();
    }
}
