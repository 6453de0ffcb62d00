//! The engine as the front ends see it.

use std::sync::Arc;

use everdisk_engine::{Engine, IoError};
use everdisk_store::Sought;
use everdisk_transport::disk::{Disk, Errno};

/// An engine, and the version of the core it runs in.
pub(crate) struct EngineDisk {
    pub(crate) engine: Arc<Engine>,
    pub(crate) version: String,
}

#[expect(clippy::needless_pass_by_value, reason = "it ends a map_err")]
fn errno(error: IoError) -> Errno {
    tracing::debug!(%error, "a request failed");
    Errno(error.errno())
}

impl Disk for EngineDisk {
    fn size(&self) -> u64 {
        self.engine.size()
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
        self.engine.read(offset, buf).map_err(errno)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.engine.write(offset, data).map_err(errno)
    }

    fn flush(&self) -> Result<(), Errno> {
        self.engine.flush().map_err(errno)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.engine.discard(offset, len).map_err(errno)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.engine.write_zeroes(offset, len).map_err(errno)
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.engine.allocate(offset, len).map_err(errno)
    }

    fn seek(&self, offset: u64, hole: bool) -> Result<u64, Errno> {
        let what = if hole { Sought::Hole } else { Sought::Data };
        match self.engine.seek(offset, what) {
            Ok(Some(at)) => Ok(at),
            Ok(None) => Err(Errno(rustix::io::Errno::NXIO.raw_os_error())),
            Err(error) => Err(errno(error)),
        }
    }

    fn probe(&self) -> Result<u32, Errno> {
        self.engine.probe().map_err(errno)
    }

    fn version(&self) -> &str {
        &self.version
    }
}
