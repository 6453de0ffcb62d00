//! Every front end of the volume, and lending them.

use everdisk_proto::frame::FromInterface;
use everdisk_sys::link::LinkError;

use crate::{
    cores::{Core, Cores},
    front::FileFront,
    locks::NodeLocks,
    nbd::NbdFront,
};

/// The front ends.
#[derive(Debug, Default)]
pub(crate) struct Fronts {
    pub(crate) file: Option<FileFront>,
    pub(crate) nbd: Option<NbdFront>,
    /// They keep every other process off the storage nodes while the front ends are open.
    pub(crate) locks: NodeLocks,
}

impl Fronts {
    /// Kinds of front ends. A core needs workers for all of them before it is armed.
    pub(crate) fn kinds(&self) -> u8 {
        u8::from(self.file.is_some()) + u8::from(self.nbd.is_some())
    }

    /// Frames by which they are lent to a core.
    pub(crate) fn frames(&self, core: &Core) -> u8 {
        let connections = self.nbd.as_ref().map_or(0, |nbd| nbd.connections().len());
        let locks = if core.keeps_locks { self.locks.frames() } else { 0 };
        self.kinds() + u8::try_from(connections + locks).unwrap_or(u8::MAX)
    }

    /// Lends them to a core, which ignores those that it has already.
    pub(crate) fn lend(&self, core: &mut Core) -> Result<(), LinkError> {
        if core.keeps_locks {
            self.locks.lend(core)?;
        }
        if let Some(file) = &self.file {
            core.tell(FromInterface::LendFile(file.lent()), &file.channels())?;
        }
        if let Some(nbd) = &self.nbd {
            core.tell(FromInterface::LendNbd { nbd: nbd.places() }, &nbd.sockets())?;
            for held in nbd.connections() {
                core.tell(FromInterface::LendConnection(held.lent), &held.fds())?;
            }
        }
        Ok(())
    }

    /// Lends them to every core.
    pub(crate) fn lend_to_all(&self, cores: &mut Cores) {
        for core in cores.all_mut() {
            // A core that does not read its socket loses its connection, and is lent them when it connects again.
            let _ = self.lend(core);
        }
    }

    /// Requests (on NBD: connections with requests) that no core has answered, where that is known.
    pub(crate) fn waiting(&self) -> Option<u64> {
        let file = self.file.as_ref().map(FileFront::waiting);
        match (file, &self.nbd) {
            (Some(None), _) => None,
            (file, nbd) => Some(file.flatten().unwrap_or(0) + nbd.as_ref().map_or(0, NbdFront::waiting)),
        }
    }

    /// Accepts clients that wait at the NBD front ends, and lends the new connections to every core.
    pub(crate) fn take_clients(&mut self, cores: &mut Cores) {
        let Some(nbd) = &mut self.nbd else { return };
        nbd.look_after();
        let first = nbd.accept();
        for held in nbd.connections().get(first..).unwrap_or_default() {
            for core in cores.all_mut() {
                let _ = core.tell(FromInterface::LendConnection(held.lent), &held.fds());
            }
        }
    }
}
