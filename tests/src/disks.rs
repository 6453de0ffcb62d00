//! Disks of their own for storage nodes: ext4 on loop devices. What a power failure would leave of one is what has come as far
//! as its device.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use crate::{
    guards::{Loop, Mount},
    programs::need,
    run::sh,
};

/// Bytes of a disk.
const SIZE: u64 = 32 << 20;

/// A disk with a file system on it. Make it before the host whose storage nodes lie on it, so that it goes after it.
#[derive(Debug)]
pub struct Disk {
    _mount: Mount,
    _device: Loop,
    directory: TempDir,
}

impl Disk {
    /// A disk with an empty ext4.
    pub fn new() -> Self {
        need("mkfs.ext4");
        let directory = TempDir::with_prefix_in("evd-disk-", "/dev/shm").expect("a temporary directory");
        let (image, at) = (image(directory.path()), directory.path().join("fs"));
        File::create(&image).and_then(|file| file.set_len(SIZE)).expect("make an image");
        fs::create_dir(&at).expect("make a mount point");
        let device = Loop::on(&image);
        sh("mkfs.ext4", &["-q", device.device()]);
        let mount = Mount::new(&[device.device()], &at);
        Self { _mount: mount, _device: device, directory }
    }

    /// Where a storage node on it lies.
    pub fn node(&self) -> PathBuf {
        self.directory.path().join("fs/node")
    }

    /// What the data of the node would be if the power failed now. The disk goes on as before.
    pub fn durable(&self) -> Vec<u8> {
        let aside = TempDir::with_prefix_in("evd-copy-", "/dev/shm").expect("a temporary directory");
        let copy = aside.path().join("copy");
        fs::copy(image(self.directory.path()), &copy).expect("copy the disk");
        let at = aside.path().join("fs");
        fs::create_dir(&at).expect("make a mount point");
        let device = Loop::on(&copy);
        let _mount = Mount::new(&[device.device()], &at);
        fs::read(at.join("node/data")).expect("read the copy of the storage node")
    }
}

impl Default for Disk {
    fn default() -> Self {
        Self::new()
    }
}

fn image(directory: &Path) -> PathBuf {
    directory.join("image")
}
