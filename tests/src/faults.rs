//! Commands to the storage nodes of a volume that runs on the faulty core ([`Host::faulty`](crate::host::Host::faulty)).

use std::{
    fs,
    path::{Path, PathBuf},
};

use everdisk_proto::volume::NodeUrl;
use everdisk_testkit::fault_store::{self, Counts, Faults as Language, Operation, counts, fault_file};

use crate::volume::Volume;

/// The storage nodes of one volume. Dropping it ends every fault, so that what hangs goes on and the volume can be
/// detached: make it after the host.
#[derive(Debug)]
#[must_use]
pub struct Faults {
    nodes: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Faults {
    /// All nodes of a volume. There are as many as the host's directories with its name.
    pub fn new(volume: &Volume<'_>) -> Self {
        let nodes: Vec<PathBuf> = (0..).map(|index| volume.node(index)).take_while(|node| node.is_dir()).collect();
        let files = nodes.iter().map(|node| fault_file(&NodeUrl::Dir(node.clone()))).collect();
        assert!(!nodes.is_empty(), "{} has no storage nodes", volume.name);
        Self { nodes, files }
    }

    /// [`Self::new`], of nodes that lose on command, and at a failed flush, what they have not flushed.
    pub fn volatile(volume: &Volume<'_>) -> Self {
        let faults = Self::new(volume);
        for file in &faults.files {
            fault_store::make_volatile(file).expect("make a storage node volatile");
        }
        faults
    }

    /// The power fails: every volatile node loses what it has not flushed. No core may live. Returns the bytes that were lost.
    pub fn lose_power(&self) -> u64 {
        let nodes = self.nodes.iter().zip(&self.files);
        nodes.map(|(node, file)| fault_store::lose_power(file, node).expect("a volatile node loses its power")).sum()
    }

    /// What each volatile node would hold if the power failed now.
    pub fn durable(&self) -> Vec<Vec<u8>> {
        let nodes = self.nodes.iter().zip(&self.files);
        nodes.map(|(node, file)| fault_store::durable(file, node).expect("a volatile node")).collect()
    }

    /// One volatile node's kernel cannot write what is unflushed, while nobody flushes: it is lost, and told at the next flush.
    /// Returns the bytes that were lost.
    pub fn fail_write_back(&self, index: usize) -> u64 {
        let errno = rustix::io::Errno::IO.raw_os_error();
        let (node, file) = (&self.nodes[index], &self.files[index]);
        fault_store::fail_write_back(file, node, errno).expect("a volatile node loses what it has not written")
    }

    /// What every node does from the next operation on, and what hangs at once; see `fault_store::Faults` for the
    /// language.
    pub fn set(&self, text: &str) {
        self.files.iter().for_each(|file| write(file, text));
    }

    /// [`Self::set`] of one node alone; the others do as before.
    pub fn set_node(&self, index: usize, text: &str) {
        write(&self.files[index], text);
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
fn write(file: &Path, text: &str) {
    text.parse::<Language>().unwrap_or_else(|e| panic!("{e}"));
    let aside = file.with_extension("aside");
    fs::write(&aside, text).expect("write a fault file");
    fs::rename(&aside, file).expect("put a fault file in its place");
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.clear();
    }
}
