//! The places where a volume is to be attached: checked, and resolved of symbolic links, before anything is started. Also what happens
//! to the sockets' names afterwards.

use std::{
    fs, io,
    os::{fd::AsFd, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
};

use everdisk_api::frontends::{FileOptions, NbdOptions, check_set};
use everdisk_proto::{
    file_id::FileId,
    frame::{FileAttach, NbdListen},
    ids::VolumeName,
    nbd::NbdAddress,
};
use everdisk_sys::{
    file,
    mounts::{self, Mount},
    packet,
};
use uuid::Uuid;

use crate::{
    error::{Doing, Error, Result},
    territory::Territory,
};

/// Front ends that could be opened.
#[derive(Debug)]
pub struct Places {
    /// The file.
    pub file: Option<FileAttach>,
    /// NBD.
    pub nbd: Vec<NbdListen>,
}

/// Checks the places that the operator asks for, on behalf of this volume.
///
/// # Errors
/// What is wrong with it.
pub fn look_at(
    file: Option<&FileOptions>,
    nbd: &[NbdOptions],
    volume: &VolumeName,
    territory: &Territory,
) -> Result<Places> {
    check_set(file.is_some(), nbd.iter().map(|nbd| &nbd.address)).map_err(Error::BadRequest)?;
    let file = file.map(|wish| -> Result<_> {
        let path = resolve_file(&wish.path, volume, territory)?;
        let (uid, gid) = owner(wish.owner);
        // The name of a mount is its identity: no other mount has had it or will have it.
        let source = Some(format!("everdisk:{volume}:{}", Uuid::new_v4().simple()));
        Ok(FileAttach { path, mode: wish.mode, uid, gid, allow_other: wish.allow_other, source, target: None })
    });
    let nbd = nbd.iter().map(|wish| -> Result<_> {
        let address = match &wish.address {
            NbdAddress::Unix(path) => resolve_socket(path, volume, territory)?,
            tcp @ NbdAddress::Tcp { .. } => tcp.clone(),
        };
        let (uid, gid) = owner(wish.owner);
        Ok(NbdListen { address, mode: wish.mode, uid, gid, bound: None })
    });
    let places = Places { file: file.transpose()?, nbd: nbd.collect::<Result<_>>()? };
    // Again, for links may lead to one place.
    check_set(places.file.is_some(), places.nbd.iter().map(|nbd| &nbd.address)).map_err(Error::BadRequest)?;
    let shared = places.file.as_ref().map(|file| NbdAddress::Unix(file.path.clone()));
    if let Some(both) = shared.filter(|file| places.nbd.iter().any(|nbd| nbd.address == *file)) {
        return Err(Error::BadRequest(format!("{both} cannot be a socket and the volume's file: give two paths")));
    }
    Ok(places)
}

fn owner(wish: Option<(u32, u32)>) -> (u32, u32) {
    wish.unwrap_or_else(|| (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()))
}

fn refused(place: &str, why: &str) -> Error {
    Error::State(format!("cannot attach at {place}: {why}"))
}

/// The path with the symbolic links of its directory followed. There may be nothing at it, or anything.
fn in_real_directory(place: &str, path: &Path) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| refused(place, "give the path of a file"))?;
    let absolute = path.parent().filter(|_| path.is_absolute());
    let parent = absolute.ok_or_else(|| refused(place, "give an absolute path"))?;
    match fs::canonicalize(parent) {
        Ok(parent) => Ok(parent.join(name)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(refused(place, "its directory does not exist; make it first"))
        }
        Err(e) => Err(e).doing(|| format!("attach at {place}")),
    }
}

/// The path to mount on, free of symbolic links: a regular file, or a name in an existing directory.
fn resolve_file(path: &Path, volume: &VolumeName, territory: &Territory) -> Result<PathBuf> {
    let place = path.display().to_string();
    let refused = |why: &str| refused(&place, why);
    let mut target = in_real_directory(&place, path)?;
    // Asked of procfs before the path itself: a mount whose server is dead answers nothing but errors.
    refuse_mounted(&target)?;
    match fs::symlink_metadata(&target) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            territory.refuse_front_end(&place, &target, volume)?;
            return Ok(target);
        }
        Err(e) => return Err(refused(&e.to_string())),
        Ok(found) if found.is_symlink() => {
            target =
                fs::canonicalize(&target).map_err(|e| refused(&format!("its symbolic link leads nowhere ({e})")))?;
            refuse_mounted(&target)?;
        }
        Ok(_) => {}
    }
    territory.refuse_front_end(&place, &target, volume)?;
    let found = fs::metadata(&target).doing(|| format!("attach at {}", target.display()))?;
    match (found.is_file(), found.is_dir()) {
        (true, _) if found.len() > 0 => Err(refused(&format!(
            "it is not empty ({} bytes), and they would be hidden; give a path where nothing is, or an empty file",
            found.len()
        ))),
        (true, _) => Ok(target),
        (_, true) => Err(refused("it is a directory; give the path of a file")),
        _ if left_placeholder(&target).is_some() => Ok(target),
        _ => Err(refused("it is not a regular file")),
    }
}

/// The placeholder of an attachment of ours that is not on record.
fn left_placeholder(path: &Path) -> Option<FileId> {
    let (directory, name) = file::pin_parent(path).ok()?;
    let found = file::look_at(directory.as_fd(), name).ok()??;
    (file::is_placeholder(&found) && !has_owner(path)).then_some(found.id)
}

/// What a volume's file is mounted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The file.
    pub id: FileId,
    /// It was made for the volume, and goes with its attachment.
    pub is_ours: bool,
}

/// Finds the file to mount on, or makes it: as root a placeholder that no user can write to, so that a write to the path
/// fails after the volume's file was unmounted by hand; fusermount3 mounts on regular files only.
///
/// # Errors
/// What is there by now, or the operating system's.
pub fn make_target(path: &Path) -> Result<Target> {
    let make = || -> io::Result<Target> {
        let (directory, name) = file::pin_parent(path)?;
        let directory = directory.as_fd();
        match file::look_at(directory, name)? {
            None if rustix::process::geteuid().is_root() => {
                Ok(Target { id: file::make_placeholder(directory, name)?, is_ours: true })
            }
            None => Ok(Target { id: file::make_empty(directory, name)?, is_ours: true }),
            Some(found) if file::is_placeholder(&found) => Ok(Target { id: found.id, is_ours: true }),
            Some(found) if was_closed(&found) => {
                let user = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
                file::give(file::pin(directory, name)?.as_fd(), user.0, user.1, 0o600)?;
                Ok(Target { id: found.id, is_ours: true })
            }
            Some(found) if found.kind.is_file() && found.len == 0 => Ok(Target { id: found.id, is_ours: false }),
            Some(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "something else is there by now")),
        }
    };
    make().doing(|| format!("make {}", path.display()))
}

/// Whether this is what an attachment of this user left, closed to writers, that is no longer known to be ours: fusermount3 could not
/// mount on it.
fn was_closed(found: &file::Found) -> bool {
    let user = rustix::process::geteuid();
    found.kind.is_file() && found.len == 0 && found.mode == 0 && found.uid == user.as_raw() && !user.is_root()
}

/// Removes the placeholder, unless something else is at its path by now, or it was written to.
pub fn remove_target(path: &Path, id: FileId) {
    let Ok((directory, name)) = file::pin_parent(path) else { return };
    let directory = directory.as_fd();
    if file::look_at(directory, name).is_ok_and(|found| found.is_some_and(|found| found.id == id && found.len == 0)) {
        let _ = file::remove(directory, name, id);
    }
}

/// The volume's mount, wherever it is by now; none when it has gone, whatever else is at its path.
///
/// # Errors
/// When procfs cannot be read.
pub fn mount_of(file: &FileAttach) -> io::Result<Option<Mount>> {
    match &file.source {
        Some(source) => mounts::from_source(source),
        // Attached before mounts had names: no mount of today is called so.
        None => Ok(mounts::at(&file.path)?.filter(|mount| mount.source == "everdisk")),
    }
}

fn refuse_mounted(path: &Path) -> Result<()> {
    let found = mounts::at(path).doing(|| "read /proc/self/mountinfo".to_owned())?;
    found.map_or(Ok(()), |mounted| {
        Err(Error::State(format!(
            "cannot attach at {0}: {1} is mounted there already; detach or unmount it first (umount {0})",
            path.display(),
            mounted.source
        )))
    })
}

/// The address of a UNIX socket with the links of its directory followed. What is there is a socket that no process has, which
/// the interface replaces, or nothing.
fn resolve_socket(path: &Path, volume: &VolumeName, territory: &Territory) -> Result<NbdAddress> {
    let place = format!("unix:{}", path.display());
    let refused = |why: &str| refused(&place, why);
    let target = in_real_directory(&place, path)?;
    match fs::symlink_metadata(&target) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(refused("something that is not a socket is there; remove it or give another path"));
        }
        Ok(_) if has_owner(&target) => {
            return Err(refused("a process has that socket already; end it or give another path"));
        }
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(refused(&e.to_string())),
        _ => {}
    }
    territory.refuse_front_end(&place, &target, volume)?;
    let text = target.to_str().ok_or_else(|| refused("the path is not valid UTF-8"))?;
    format!("unix:{text}").parse().map_err(|e: everdisk_proto::nbd::BadNbdAddress| refused(&e.to_string()))
}

/// Whether a process has the socket at `path`, or this is unknown. Stream sockets answer a connect of another type with a
/// refusal of their own kind, so the process that listens there sees no connection.
fn has_owner(path: &Path) -> bool {
    packet::connect(path).err().is_none_or(|e| e.kind() != io::ErrorKind::ConnectionRefused)
}

/// Removes the sockets that were made at these places, where nothing else is by now.
pub fn remove_sockets(nbd: &[NbdListen]) {
    for listen in nbd {
        let (NbdAddress::Unix(path), Some(bound)) = (&listen.address, listen.bound) else { continue };
        // What was made there went with its directory, or is no longer there: then there is nothing to remove.
        let _ = file::pin_parent(path).and_then(|(directory, name)| file::remove(directory.as_fd(), name, bound));
    }
}

#[cfg(test)]
mod tests;
