//! The peer: qemu-storage-daemon's FUSE export of a raw image.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::{
        fs::{FileExt, OpenOptionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use everdisk_harness::{interrupt::Interrupt, processes};
use everdisk_sys::memory::LockedBuffer;

use crate::{Error, Result};

/// It exports the image within this time.
const UP_WITHIN: Duration = Duration::from_secs(10);

/// A running export.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    file: PathBuf,
}

impl Peer {
    /// Makes a raw image at `image` and exports it at `file`.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(interrupt: &Interrupt, image: &Path, file: &Path, bytes: u64) -> Result<Self> {
        let made = File::create(image).and_then(|image| image.set_len(bytes)).and_then(|()| File::create(file));
        made.map_err(Error::io("make the peer's image"))?;
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--blockdev").arg(format!("driver=file,node-name=file,filename={}", image.display()));
        command.args(["--blockdev", "driver=raw,node-name=raw,file=file"]);
        command.arg("--export");
        command.arg(format!("type=fuse,id=export,node-name=raw,mountpoint={},writable=on", file.display()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let child = command.spawn().map_err(Error::io("start qemu-storage-daemon"))?;
        let mut peer = Self { child, file: file.to_owned() };
        interrupt.wait_for("qemu-storage-daemon's export", UP_WITHIN, Duration::from_millis(20), || {
            if let Ok(Some(status)) = peer.child.try_wait() {
                return Err(Error::Failed(format!("qemu-storage-daemon ended with {status}")));
            }
            Ok(fs::metadata(file).is_ok_and(|found| found.len() == bytes).then_some(()))
        })?;
        Ok(peer)
    }

    /// Whether it takes O_DIRECT.
    pub fn takes_direct(&self) -> bool {
        let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let Ok(file) = OpenOptions::new().read(true).custom_flags(direct).open(&self.file) else { return false };
        LockedBuffer::new(4096).is_ok_and(|mut buffer| file.read_at(&mut buffer, 0).is_ok())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        processes::end_child(&mut self.child, UP_WITHIN);
        if processes::mount_on(&self.file).is_some() {
            processes::unmount(&self.file);
        }
    }
}
