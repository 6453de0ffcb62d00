//! The volume as the front ends see it.

use std::sync::Arc;

use everdisk_engine::{IoError, Stopped, WriteBack};
use everdisk_store::Sought;
use everdisk_transport::disk::{Disk, Errno, Failure, FileRange, Hold};

use crate::gate::Request;

/// A volume, its name, and the version of the core it is served by.
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

fn failure(stopped: Stopped) -> Failure {
    match stopped {
        Stopped::Failed(error) => Failure::Errno(errno(error)),
        Stopped::Abandoned => Failure::Abandoned,
    }
}

impl Disk for VolumeDisk {
    fn size(&self) -> u64 {
        self.volume.engine().size()
    }

    fn read(&self, hold: &dyn Hold, offset: u64, buf: &mut [u8]) -> Result<(), Failure> {
        self.volume.read(&Request(hold), offset, buf).map_err(failure)
    }

    fn in_memory(&self, offset: u64, len: u64) -> Option<FileRange<'_>> {
        let range = self.volume.in_memory(offset, len)?;
        Some(FileRange { file: range.file, offset: range.offset, len: range.len })
    }

    fn write(&self, hold: &dyn Hold, offset: u64, data: &[u8]) -> Result<(), Failure> {
        self.volume.write(&Request(hold), offset, data).map_err(failure)
    }

    fn flush(&self, hold: &dyn Hold) -> Result<(), Failure> {
        self.volume.flush(&Request(hold)).map_err(failure)
    }

    fn discard(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Failure> {
        self.volume.discard(&Request(hold), offset, len).map_err(failure)
    }

    fn write_zeroes(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Failure> {
        self.volume.write_zeroes(&Request(hold), offset, len).map_err(failure)
    }

    fn allocate(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Failure> {
        self.volume.allocate(&Request(hold), offset, len).map_err(failure)
    }

    fn seek(&self, hold: &dyn Hold, offset: u64, hole: bool) -> Result<u64, Failure> {
        let what = if hole { Sought::Hole } else { Sought::Data };
        let found = self.volume.seek(&Request(hold), offset, what).map_err(failure)?;
        Ok(found.ok_or(Errno(rustix::io::Errno::NXIO.raw_os_error()))?)
    }

    fn take_over(&self, generation: u64) {
        self.volume.take_over(generation);
    }

    fn probe(&self) -> Result<u32, Errno> {
        self.volume.engine().probe().map_err(errno)
    }

    fn version(&self) -> &str {
        &self.version
    }
}
