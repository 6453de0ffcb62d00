//! Where a program comes from: who could have written it, and what exactly it is.
//!
//! A core gets every descriptor of its volume, and root starts it where root runs the control module. So a program that is
//! named by an operator is run only if no other user may write it. What is checked is the open file, never a name that
//! may lead elsewhere a moment later, and what is read from it has a digest.

use std::{
    fmt::Write as _,
    fs::{self, File, Metadata, OpenOptions},
    io::Read,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use everdisk_proto::identity::Component;
use rustix::{fs::OFlags, process::geteuid};
use sha2::{Digest as _, Sha256};

use crate::error::{Doing, Error, Result};

/// Largest program: a debug build has some 100 MiB.
pub const PROGRAM_BYTES_MAX: u64 = 1 << 30;
/// Write permission of the group and of all.
const OF_OTHERS: u32 = 0o022;
/// In a directory with this bit only the owner of a file may replace it.
const STICKY: u32 = 0o1000;

/// An open program.
#[derive(Debug)]
pub struct Source {
    file: File,
    name: PathBuf,
}

impl Source {
    /// Opens a program that is to be of a component.
    ///
    /// # Errors
    /// It is no regular file, or too large.
    pub fn open(path: &Path, component: Component) -> Result<Self> {
        // Not waiting: a fifo would have us wait for its writer.
        let nonblock = i32::from_ne_bytes(OFlags::NONBLOCK.bits().to_ne_bytes());
        let file = OpenOptions::new().read(true).custom_flags(nonblock).open(path);
        let source =
            Self { file: file.doing(|| format!("read the program {}", path.display()))?, name: path.to_owned() };
        let metadata = source.metadata()?;
        if !metadata.is_file() {
            return Err(Error::Failed(format!(
                "{} is not a program: it has to be the file of an {}",
                path.display(),
                component.program()
            )));
        }
        if metadata.len() > PROGRAM_BYTES_MAX {
            return Err(Error::Failed(format!("{} is larger than any program of ours", path.display())));
        }
        Ok(source)
    }

    /// Opens a core program that an operator named.
    ///
    /// # Errors
    /// As [`Source::open`]; another user than root and the one of this process may write it.
    pub fn open_trusted(path: &Path) -> Result<Self> {
        let source = Self::open(path, Component::Core)?;
        let place = source.in_proc();
        let place = fs::read_link(&place).doing(|| format!("find out where {} is", path.display()))?;
        let directory = directory_of(&place, path)?;
        let around = fs::metadata(directory).doing(|| format!("examine {}", directory.display()))?;
        match distrust(&source.metadata()?, &around, geteuid().as_raw()) {
            None => Ok(source),
            Some(why) => Err(Error::Failed(format!(
                "{} is not run: {}; a core gets everything that its volume has. Put a copy where only root may write, for \
                 example `install -o root -m 0755 -t /usr/local/libexec {0}`, and name that",
                path.display(),
                why.replace("DIRECTORY", &directory.display().to_string()),
            ))),
        }
    }

    fn metadata(&self) -> Result<Metadata> {
        self.file.metadata().doing(|| format!("examine {}", self.name.display()))
    }

    /// A name for the open file, whatever becomes of the one it was opened by. Other processes of this user may use it while
    /// this value lives.
    pub fn in_proc(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// Its device and its number there: which file it is.
    ///
    /// # Errors
    /// It cannot be examined.
    pub fn id(&self) -> Result<(u64, u64)> {
        self.metadata().map(|found| (found.dev(), found.ino()))
    }

    /// Its length.
    ///
    /// # Errors
    /// It cannot be examined.
    pub fn bytes(&self) -> Result<u64> {
        self.metadata().map(|found| found.len())
    }

    /// The name it was opened by, for messages.
    pub fn name(&self) -> &Path {
        &self.name
    }
}

impl Read for Source {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.file.read(into)
    }
}

/// The directory in which the kernel says that an open file lies. It calls a file that a mount consists of "/".
fn directory_of<'a>(place: &'a Path, path: &Path) -> Result<&'a Path> {
    place.parent().ok_or_else(|| {
        Error::Failed(format!(
            "{} is not run: it is not known in which directory it lies, so another user may replace it",
            path.display()
        ))
    })
}

/// Why a user other than root and this one could have written a file in this directory.
fn distrust(file: &Metadata, directory: &Metadata, user: u32) -> Option<String> {
    if file.uid() != 0 && file.uid() != user {
        return Some(format!("it belongs to user {}, neither root nor user {user}, who would run it", file.uid()));
    }
    if file.mode() & OF_OTHERS != 0 {
        return Some(format!("other users may write it (mode {:04o})", file.mode() & 0o7777));
    }
    if directory.mode() & OF_OTHERS != 0 && directory.mode() & STICKY == 0 {
        return Some(format!("other users may replace it (DIRECTORY has mode {:04o})", directory.mode() & 0o7777));
    }
    None
}

/// SHA-256 of what was read.
#[derive(Debug, Default)]
pub struct Digest(Sha256);

impl Digest {
    /// Goes on.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// In hexadecimal.
    pub fn end(self) -> String {
        self.0.finalize().iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("writing to a string does not fail");
            text
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;

    fn program(directory: &Path) -> PathBuf {
        let path = directory.join("core");
        fs::write(&path, "program").unwrap();
        mode(&path, 0o755);
        path
    }

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn refusal(path: &Path) -> String {
        Source::open_trusted(path).unwrap_err().to_string()
    }

    #[test]
    fn d15_a_file_that_lies_in_no_directory_is_refused() {
        assert_eq!(directory_of(Path::new("/a/core"), Path::new("/a/core")).unwrap(), Path::new("/a"));
        let why = directory_of(Path::new("/"), Path::new("/proc/1/fd/9")).unwrap_err().to_string();
        assert!(why.contains("/proc/1/fd/9 is not run: it is not known in which directory it lies"), "{why}");
    }

    #[test]
    fn a_program_that_other_users_may_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let core = program(dir.path());
        Source::open_trusted(&core).unwrap();
        for bad in [0o775, 0o757] {
            mode(&core, bad);
            let said = refusal(&core);
            assert!(
                said.contains(&format!("may write it (mode {bad:04o})")) && said.contains("install -o root"),
                "{said}"
            );
        }
        mode(&core, 0o755);
        for bad in [0o775, 0o757] {
            mode(dir.path(), bad);
            let said = refusal(&core);
            let directory = dir.path().display();
            assert!(said.contains(&format!("may replace it ({directory} has mode {bad:04o})")), "{said}");
        }
        mode(dir.path(), 0o1777);
        Source::open_trusted(&core).unwrap();
    }

    #[test]
    fn it_is_the_file_that_counts_and_not_the_link() {
        let (outer, inner) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let core = program(inner.path());
        let link = outer.path().join("link");
        std::os::unix::fs::symlink(&core, &link).unwrap();
        Source::open_trusted(&link).unwrap();
        mode(inner.path(), 0o777);
        assert!(refusal(&link).contains("may replace it"));
    }

    #[test]
    fn a_program_of_another_user_is_refused() {
        if !geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let core = program(dir.path());
        chown(&core, Some(65_534), None).unwrap();
        assert!(refusal(&core).contains("belongs to user 65534"));
        let (file, around) = (fs::metadata(&core).unwrap(), fs::metadata(dir.path()).unwrap());
        assert_eq!(distrust(&file, &around, 65_534), None, "the user runs what is the user's");
        chown(&core, Some(0), None).unwrap();
        assert_eq!(distrust(&fs::metadata(&core).unwrap(), &around, 65_534), None, "and what is root's");
    }

    #[test]
    fn what_was_opened_is_what_is_read_whatever_becomes_of_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let core = program(dir.path());
        let mut source = Source::open_trusted(&core).unwrap();
        fs::write(dir.path().join("other"), "evil").unwrap();
        fs::rename(dir.path().join("other"), &core).unwrap();
        assert_eq!(fs::read_to_string(source.in_proc()).unwrap(), "program");
        let mut text = String::new();
        source.read_to_string(&mut text).unwrap();
        assert_eq!(text, "program");
    }

    #[test]
    fn what_is_no_file_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        assert!(refusal(Path::new("/dev/zero")).contains("is not a program"));
        assert!(refusal(dir.path()).contains("is not a program"));
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(refusal(&fifo).contains("is not a program"));
        assert!(refusal(&dir.path().join("none")).contains("read the program"));
    }

    #[test]
    fn a_digest_is_that_of_sha256sum() {
        let mut digest = Digest::default();
        digest.update(b"ab");
        digest.update(b"c");
        assert_eq!(digest.end(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
