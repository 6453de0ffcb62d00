//! The volume as the front ends see it.

use std::sync::Arc;

use everdisk_engine::{IoError, WriteBack};
use everdisk_gate::hold::Hold;
use everdisk_store::Sought;
use everdisk_sys::file::FileRange;
use everdisk_transport::disk::{Disk, Errno, Stopped};

/// A volume, its name, and the version of the core that serves it.
pub(crate) struct VolumeDisk {
    pub(crate) volume: Arc<WriteBack>,
    pub(crate) name: String,
    pub(crate) version: String,
}

impl std::fmt::Debug for VolumeDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VolumeDisk").field("name", &self.name).finish_non_exhaustive()
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it ends a map_err")]
fn errno(error: IoError) -> Errno {
    tracing::debug!(%error, "a request failed");
    Errno(error.errno())
}

fn told(stopped: everdisk_engine::Stopped) -> Stopped {
    stopped.map(errno)
}

impl Disk for VolumeDisk {
    fn size(&self) -> u64 {
        self.volume.engine().size()
    }

    fn read(&self, hold: &dyn Hold, offset: u64, buf: &mut [u8]) -> Result<(), Stopped> {
        self.volume.read(hold, offset, buf).map_err(told)
    }

    fn in_memory(&self, offset: u64, len: u64) -> Option<FileRange<'_>> {
        self.volume.in_memory(offset, len)
    }

    fn write(&self, hold: &dyn Hold, offset: u64, data: &[u8]) -> Result<(), Stopped> {
        self.volume.write(hold, offset, data).map_err(told)
    }

    fn flush(&self, hold: &dyn Hold) -> Result<(), Stopped> {
        self.volume.flush(hold).map_err(told)
    }

    fn discard(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped> {
        self.volume.discard(hold, offset, len).map_err(told)
    }

    fn write_zeroes(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped> {
        self.volume.write_zeroes(hold, offset, len).map_err(told)
    }

    fn allocate(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped> {
        self.volume.allocate(hold, offset, len).map_err(told)
    }

    fn seek(&self, hold: &dyn Hold, offset: u64, hole: bool) -> Result<u64, Stopped> {
        let what = if hole { Sought::Hole } else { Sought::Data };
        let found = self.volume.seek(hold, offset, what).map_err(told)?;
        Ok(found.ok_or(Errno(rustix::io::Errno::NXIO.raw_os_error()))?)
    }

    fn adopt(&self, generation: u64) {
        self.volume.adopt(generation);
    }

    fn probe(&self) -> Result<u32, Errno> {
        self.volume.engine().probe().map_err(errno)
    }

    fn version(&self) -> &str {
        &self.version
    }
}
