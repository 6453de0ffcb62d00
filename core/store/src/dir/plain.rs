//! The dir store on file systems with fewer features: ramfs has neither fallocate nor holes, ext2 makes holes and
//! reserves nothing.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;

use super::{tests::format, *};
use crate::conformance::{self, Fixture};

/// A file system of its own, unmounted on drop; `None` (and a message) where that is not possible.
struct Mounted {
    directory: TempDir,
    at: PathBuf,
}

impl Mounted {
    fn new(mount: impl FnOnce(&Path, &Path) -> io::Result<()>) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let at = directory.path().join("fs");
        fs::create_dir(&at).unwrap();
        match mount(directory.path(), &at) {
            Ok(()) => Some(Self { directory, at }),
            Err(e) => {
                let _ = writeln!(io::stderr(), "skipped: {e}; run as root, with mkfs.ext2");
                None
            }
        }
    }

    fn ramfs() -> Option<Self> {
        Self::new(|_, at| Ok(rustix::mount::mount("none", at, "ramfs", MountFlags::empty(), None)?))
    }

    fn ext2(mib: u64) -> Option<Self> {
        let run = |command: &mut Command| {
            let output = command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output()?;
            let said = || io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned());
            if output.status.success() { Ok(()) } else { Err(said()) }
        };
        Self::new(|directory, at| {
            let image = directory.join("image");
            File::create(&image)?.set_len(mib << 20)?;
            run(Command::new("mkfs.ext2").args(["-q", "-b", "4096"]).arg(&image))?;
            run(Command::new("mount").args(["-t", "ext2", "-o", "loop"]).args([&image, at]))
        })
    }

    fn store(&self, name: &str, len: u64) -> DirStore {
        let path = self.at.join(name);
        create(&path, &format(len)).unwrap().confirm();
        DirStore::open(&path, &format(len)).unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.at, UnmountFlags::DETACH).unwrap();
        let _ = &self.directory;
    }
}

struct Directories {
    mounted: Mounted,
    made: u64,
    /// Whether the file system reports the space a file takes, and where.
    tells: bool,
}

impl Fixture for Directories {
    fn store(&mut self, len: u64) -> Arc<dyn Store> {
        self.made += 1;
        Arc::new(self.mounted.store(&self.made.to_string(), len))
    }

    fn allocated_bytes(&self) -> Option<u64> {
        let data = self.mounted.at.join(self.made.to_string()).join("data");
        self.tells.then(|| fs::metadata(data).unwrap().blocks() * 512)
    }

    fn knows_holes(&self) -> bool {
        self.tells
    }
}

/// M7, where neither holes can be made nor space be reserved.
#[test]
fn conforms_without_fallocate() {
    let Some(mounted) = Mounted::ramfs() else { return };
    let store = mounted.store("unable", 4096);
    assert!(store.punch(0, 4096) == Err(Errno::OPNOTSUPP) && store.zero_range(0, 4096) == Err(Errno::OPNOTSUPP));
    conformance::run(&mut Directories { mounted, made: 0, tells: false });
}

/// M7, where holes can be made and space cannot be reserved: the results are the same.
#[test]
fn conforms_without_reservations() {
    let Some(mounted) = Mounted::ext2(64) else { return };
    let store = mounted.store("unable", 4096);
    assert_eq!(store.fallocate(FallocateFlags::KEEP_SIZE, 0, 4096), Err(Errno::OPNOTSUPP));
    conformance::run(&mut Directories { mounted, made: 0, tells: true });
}

/// A reservation for which there is no space is ENOSPC, and the existing data is unchanged.
#[test]
fn a_reservation_on_a_full_disk_that_cannot_reserve_is_refused() {
    let Some(mounted) = Mounted::ext2(8) else { return };
    let store = mounted.store("node", 32 << 20);
    store.write_at(4096, &[7; 4096]).unwrap();
    assert_eq!(store.allocate(0, 32 << 20).unwrap_err().errno(), Errno::NOSPC.raw_os_error());
    let mut bytes = [0; 4096];
    store.read_at(4096, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 4096]);
}

/// Where no holes can be made a discard writes zeros over what is not zero, and over nothing else.
#[test]
fn a_discard_without_holes_writes_over_data_only() {
    let Some(mounted) = Mounted::ext2(64) else { return };
    let store = mounted.store("node", 32 << 20);
    let data = vec![7; 1 << 20];
    store.write_at(10 << 20, &data).unwrap();
    store.flush().unwrap();
    let taken = store.allocated_bytes().unwrap();
    store.clear(5000, 30 << 20).unwrap();
    store.clear_data(0, 32 << 20).unwrap();
    let mut found = vec![1; 32 << 20];
    store.read_at(0, &mut found).unwrap();
    assert!(found.iter().all(|byte| *byte == 0));
    store.flush().unwrap();
    assert_eq!(store.allocated_bytes().unwrap(), taken, "what took no space takes some now");
    store.write_at(0, &data).unwrap();
    store.clear(4097, 77).unwrap();
    let mut expected = data;
    expected[4097..4097 + 77].fill(0);
    let mut found = vec![1; 1 << 20];
    store.read_at(0, &mut found).unwrap();
    assert!(found == expected);
}

/// Bytes that are written while their range is being reserved are never reverted.
#[test]
fn a_reservation_takes_back_no_write() {
    let Some(mounted) = Mounted::ext2(64) else { return };
    let store = mounted.store("node", 1 << 20);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for round in 1..200_u8 {
                store.discard(0, 1 << 20).unwrap();
                for block in 0..256 {
                    store.write_at(block * 4096, &[round; 4096]).unwrap();
                }
                let mut found = vec![0; 1 << 20];
                store.read_at(0, &mut found).unwrap();
                assert!(found.iter().all(|byte| *byte == round), "round {round}");
            }
        });
        while !writer.is_finished() {
            store.allocate(0, 1 << 20).unwrap();
        }
    });
}
