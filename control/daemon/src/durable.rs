//! Files that exist whole or not at all, even after the machine loses power.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

/// Room for a few records: state and journal.
const RECORD_BYTES: usize = 64 << 10;

/// Makes the entries of a directory durable.
///
/// # Errors
/// The operating system's.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes a directory that only its owner can enter, and its missing parents.
///
/// # Errors
/// The operating system's.
pub fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Replaces `path` by `bytes`: temporary file, fsync, rename, fsync of the directory.
///
/// # Errors
/// The operating system's; the old content stands then.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut file = tempfile::NamedTempFile::new_in(parent)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    sync_dir(parent)
}

/// Whether `directory` has room for this number of bytes and one more record. Tries it with a file that is removed afterwards.
///
/// # Errors
/// The operating system's.
pub fn check_room(directory: &Path, bytes: u64) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(&vec![1; RECORD_BYTES])?;
    if bytes > 0 {
        let flags = rustix::fs::FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file.as_file(), flags, RECORD_BYTES as u64, bytes) {
            // A file system that cannot reserve space: what it says is free has to do.
            Err(rustix::io::Errno::OPNOTSUPP) => {
                let found = rustix::fs::fstatvfs(file.as_file())?;
                if found.f_bavail * found.f_frsize < bytes {
                    return Err(rustix::io::Errno::NOSPC.into());
                }
            }
            done => done?,
        }
    }
    file.as_file().sync_all()
}

/// Appends a line and makes it durable. The rest of a torn line is cut off first.
///
/// # Errors
/// The operating system's.
pub fn append_line(path: &Path, line: &str) -> io::Result<()> {
    let new = !path.exists();
    let mut file = OpenOptions::new().create(true).read(true).write(true).truncate(false).mode(0o600).open(path)?;
    let end = end_of_last_line(&mut file)?;
    file.set_len(end)?;
    file.seek(SeekFrom::Start(end))?;
    file.write_all(format!("{line}\n").as_bytes())?;
    file.sync_data()?;
    if new {
        sync_dir(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?;
    }
    Ok(())
}

/// Offset after the last newline.
fn end_of_last_line(file: &mut File) -> io::Result<u64> {
    let len = file.metadata()?.len();
    let start = len.saturating_sub(64 * 1024);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail)?;
    let kept = tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    Ok(start + kept as u64)
}

/// Reads a small file; `None` when it is not there.
///
/// # Errors
/// The operating system's.
pub fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_line_is_cut_off_before_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        append_line(&path, "one").unwrap();
        fs::write(&path, "one\nto").unwrap();
        append_line(&path, "two").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    }

    #[test]
    fn a_write_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write(&path, b"a").unwrap();
        write(&path, b"b").unwrap();
        assert_eq!(read(&path).unwrap().unwrap(), "b");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(read(&dir.path().join("none")).unwrap(), None);
    }
}
