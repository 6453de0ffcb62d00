//! Storage nodes of a volume on a host whose core is faulty ([`Host::faulty`](crate::host::Host::faulty)): they are slow, fail or hang on
//! command, and lose what they have not flushed.

use std::ops::Deref;

use everdisk_testkit::fault_store;

use crate::volume::Volume;

/// The storage nodes of one volume. Dropping it ends every fault, so that what hangs goes on and the volume can be
/// detached: make it after the host.
#[derive(Debug)]
#[must_use]
pub struct Faults(everdisk_harness::faults::Faults);

impl Deref for Faults {
    type Target = everdisk_harness::faults::Faults;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Faults {
    /// All nodes of a volume. There are as many as the host's directories with its name.
    pub fn new(volume: &Volume<'_>) -> Self {
        let nodes: Vec<_> = (0..).map(|index| volume.node(index)).take_while(|node| node.is_dir()).collect();
        assert!(!nodes.is_empty(), "{} has no storage nodes", volume.name);
        Self(everdisk_harness::faults::Faults::of(nodes))
    }

    /// [`Self::new`], of nodes that lose on command, and at a failed flush, what they have not flushed.
    pub fn volatile(volume: &Volume<'_>) -> Self {
        let faults = Self::new(volume);
        for (_, file) in faults.nodes() {
            fault_store::make_volatile(file).expect("make a storage node volatile");
        }
        faults
    }

    /// The power fails: every volatile node loses what it has not flushed. No core may live. Returns the bytes that were lost.
    pub fn lose_power(&self) -> u64 {
        let lost = |(node, file)| fault_store::lose_power(file, node).expect("a volatile node loses its power");
        self.nodes().map(lost).sum()
    }

    /// What each volatile node would hold if the power failed now.
    pub fn durable(&self) -> Vec<Vec<u8>> {
        self.nodes().map(|(node, file)| fault_store::durable(file, node).expect("a volatile node")).collect()
    }

    /// One volatile node's kernel cannot write the unflushed data, while no flush runs: the data is lost, and the next flush reports it.
    /// Returns the bytes that were lost.
    pub fn fail_write_back(&self, index: usize) -> u64 {
        let errno = rustix::io::Errno::IO.raw_os_error();
        let (node, file) = self.nodes().nth(index).expect("a storage node");
        fault_store::fail_write_back(file, node, errno).expect("a volatile node loses what it has not written")
    }
}
