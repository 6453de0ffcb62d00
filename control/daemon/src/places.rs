//! Where a volume is to be attached: looked at, and cleared of symbolic links, before anything is started. Also what becomes
//! of the sockets' names afterwards.

use std::{
    fs, io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use everdisk_api::frontends::{FileOptions, NbdOptions, check_set};
use everdisk_proto::{
    frame::{FileAttach, NbdListen},
    nbd::NbdAddress,
    volume::{NodeUrl, VolumeSpec},
};
use everdisk_sys::{fuse, packet};

use crate::error::{Doing, Error, Result};

/// Front ends that could be opened.
#[derive(Debug)]
pub struct Places {
    /// The file.
    pub file: Option<FileAttach>,
    /// NBD.
    pub nbd: Vec<NbdListen>,
}

/// Looks at what the operator asks for, on behalf of this volume.
///
/// # Errors
/// What is wrong with it.
pub fn look_at(file: Option<&FileOptions>, nbd: &[NbdOptions], spec: &VolumeSpec) -> Result<Places> {
    check_set(file.is_some(), nbd.iter().map(|nbd| &nbd.address)).map_err(Error::BadRequest)?;
    let file = file.map(|wish| -> Result<_> {
        let path = resolve_file(&wish.path)?;
        refuse_own_nodes(&path.display().to_string(), &path, spec)?;
        let (uid, gid) = owner(wish.owner);
        Ok(FileAttach { path, mode: wish.mode, uid, gid, allow_other: wish.allow_other })
    });
    let nbd = nbd.iter().map(|wish| -> Result<_> {
        let address = match &wish.address {
            NbdAddress::Unix(path) => resolve_socket(path, spec)?,
            tcp @ NbdAddress::Tcp { .. } => tcp.clone(),
        };
        let (uid, gid) = owner(wish.owner);
        Ok(NbdListen { address, mode: wish.mode, uid, gid })
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
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("/"));
    match fs::canonicalize(parent) {
        Ok(parent) => Ok(parent.join(name)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Err(refused(place, "its directory does not exist; make it first"))
        }
        Err(e) => Err(e).doing(|| format!("attach at {place}")),
    }
}

/// The path to mount on, free of symbolic links: a regular file, or a name in an existing directory.
fn resolve_file(path: &Path) -> Result<PathBuf> {
    let place = path.display().to_string();
    let refused = |why: &str| refused(&place, why);
    let mut target = in_real_directory(&place, path)?;
    // Asked of procfs before the path itself: a mount whose server is dead answers nothing but errors.
    refuse_mounted(&target)?;
    match fs::symlink_metadata(&target) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(target),
        Err(e) => return Err(refused(&e.to_string())),
        Ok(found) if found.is_symlink() => {
            target =
                fs::canonicalize(&target).map_err(|e| refused(&format!("its symbolic link leads nowhere ({e})")))?;
            refuse_mounted(&target)?;
        }
        Ok(_) => {}
    }
    let found = fs::metadata(&target).doing(|| format!("attach at {}", target.display()))?;
    match (found.is_file(), found.is_dir()) {
        (true, _) => Ok(target),
        (_, true) => Err(refused("it is a directory; give the path of a file")),
        _ => Err(refused("it is no regular file")),
    }
}

fn refuse_mounted(path: &Path) -> Result<()> {
    let found = fuse::find_mount(path).doing(|| "read /proc/self/mountinfo".to_owned())?;
    found.map_or(Ok(()), |mounted| {
        Err(Error::State(format!(
            "cannot attach at {0}: {1} is mounted there already; detach or unmount it first (umount {0})",
            path.display(),
            mounted.source
        )))
    })
}

/// The address of a UNIX socket with the links of its directory followed. What is there is a socket that nobody has, which
/// the interface replaces, or nothing.
fn resolve_socket(path: &Path, spec: &VolumeSpec) -> Result<NbdAddress> {
    let place = format!("unix:{}", path.display());
    let refused = |why: &str| refused(&place, why);
    let target = in_real_directory(&place, path)?;
    match fs::symlink_metadata(&target) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(refused("something that is no socket is there; remove it or give another path"));
        }
        Ok(_) if has_owner(&target) => {
            return Err(refused("a process has that socket already; end it or give another path"));
        }
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(refused(&e.to_string())),
        _ => {}
    }
    refuse_own_nodes(&place, &target, spec)?;
    let text = target.to_str().ok_or_else(|| refused("the path is no UTF-8 text"))?;
    format!("unix:{text}").parse().map_err(|e: everdisk_proto::nbd::BadNbdAddress| refused(&e.to_string()))
}

/// Whether a process has the socket at `path`, or nobody can tell. Stream sockets answer a question of another type with a
/// refusal of their own kind, so that whoever listens there sees no connection.
fn has_owner(path: &Path) -> bool {
    packet::connect(path).err().is_none_or(|e| e.kind() != io::ErrorKind::ConnectionRefused)
}

/// Removes the sockets that were made at these places and that no process has any more.
pub fn remove_sockets(nbd: &[NbdListen]) {
    for listen in nbd {
        let NbdAddress::Unix(path) = &listen.address else { continue };
        let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
        if is_socket && !has_owner(path) {
            let _ = fs::remove_file(path);
        }
    }
}

/// A volume whose file lies in one of its own storage nodes would be written into itself, and a socket there is none of the
/// node's business.
fn refuse_own_nodes(place: &str, path: &Path, spec: &VolumeSpec) -> Result<()> {
    let inside = spec.nodes.iter().find(|node| {
        let NodeUrl::Dir(node) = &node.url;
        path.starts_with(fs::canonicalize(node).as_ref().unwrap_or(node))
    });
    inside.map_or(Ok(()), |node| {
        let why = format!("it lies in the volume's own storage node {}; give a path outside of it", node.url);
        Err(refused(place, &why))
    })
}

#[cfg(test)]
mod tests;
