//! Loop devices, mounts and attributes that go with their owner.

use std::path::{Path, PathBuf};

use crate::run::sh;

/// A loop device.
#[derive(Debug)]
pub struct Loop(PathBuf);

impl Loop {
    /// A loop device on `file`, with direct I/O.
    pub fn on(file: &Path) -> Self {
        let file = file.to_str().expect("a path in UTF-8");
        Self(sh("losetup", &["--find", "--show", "--direct-io=on", file]).trim().into())
    }

    /// The device.
    pub fn device(&self) -> &str {
        self.0.to_str().expect("a path in UTF-8")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        sh("losetup", &["-d", self.device()]);
        // The kernel lets go of the file a moment after the command has ended.
        let name = self.0.file_name().unwrap_or_default();
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        crate::wait::until_true("the loop device lets go of its file", || !backing.exists());
    }
}

/// A mount.
#[derive(Debug)]
pub struct Mount(PathBuf);

impl Mount {
    /// `mount ARGUMENTS TARGET`.
    pub fn new(arguments: &[&str], target: &Path) -> Self {
        let mut all = arguments.to_vec();
        all.push(target.to_str().expect("a path in UTF-8"));
        sh("mount", &all);
        Self(target.to_owned())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // What the test left running may still use it; the host is cleaned after this.
            let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
            return;
        }
        sh("umount", &[&self.0]);
    }
}
