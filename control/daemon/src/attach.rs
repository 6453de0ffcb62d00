//! Attach: interface, core, mount; all of it or nothing.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use everdisk_api::request::FileOptions;
use everdisk_proto::{
    frame::FileAttach,
    journal::CoreBuild,
    limits::PEER_DEADLINE,
    volume::{NodeUrl, VolumeSpec},
};
use everdisk_sys::fuse;
use everdisk_telemetry::event;
use tracing::{info, warn};

use crate::{
    error::{Doing, Error, Result},
    process::{boot_id, of_volume},
    progress::Progress,
    record::{Attachment, Phase},
    start::{self, ARMED_WITHIN, end_all},
    volume::Volume,
};

/// Attaches a volume to a file.
///
/// # Errors
/// Why not; nothing is left of the attempt then.
pub fn attach(volume: &Arc<Volume>, options: &FileOptions, progress: &Progress) -> Result<()> {
    let _operation = volume.begin("attach")?;
    let _hands = crate::volume::lock(&volume.hands);
    if let Some(old) = volume.record().attachment {
        if old.of_this_boot() && (old.interface_alive() || old.live_cores().next().is_some()) {
            return Err(Error::State(format!(
                "volume {0} is already attached at {1}: `everdisk detach {0}` first",
                volume.name,
                old.places()
            )));
        }
        clear_away(volume)?;
    }
    let path = resolve(&options.path)?;
    refuse_own_nodes(&path, &volume.spec())?;
    let build = first_build(volume, progress)?;
    let (uid, gid) =
        options.owner.unwrap_or_else(|| (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()));
    let file = FileAttach { path, mode: options.mode, uid, gid, allow_other: options.allow_other };
    let attachment = Attachment {
        boot_id: boot_id(),
        phase: Phase::Attaching,
        file: Some(file),
        nbd: Vec::new(),
        created_file: false,
        interface: None,
        cores: Vec::new(),
        started: 0,
    };
    volume.paths.make_run().doing(|| format!("make {}", volume.paths.run.display()))?;
    volume.update(|record| record.attachment = Some(attachment))?;
    volume.set_trouble(None);
    if let Err(e) = bring_up(volume, &build, progress) {
        if let Err(left) = clear_away(volume) {
            warn!(volume = %volume.name, "after a failed attach: {left}");
        }
        return Err(e);
    }
    info!(event = event::VOLUME_ATTACHED, volume = %volume.name, path = %options.path.display());
    Ok(())
}

fn bring_up(volume: &Arc<Volume>, build: &CoreBuild, progress: &Progress) -> Result<()> {
    progress.step("start the interface");
    let interface = start::interface(volume, false)?;
    start::interface_ready(volume, &interface)?;
    progress.step("start the core");
    let core = start::core(volume, build)?;
    start::core_armed(volume, &core, ARMED_WITHIN)?;
    progress.step("mount");
    let Attachment { file, nbd, .. } = volume.attached()?;
    if let Some(file) = &file {
        make_file(volume, file)?;
    }
    volume.interface().attach(file.clone(), nbd, core.id.pid)?;
    // The kernel learns the file's size when it is first asked for it. Before, a mapping is empty and writes go one by
    // one. It refuses us where the file is another user's; then it is that user's first question that does it.
    if let Some(file) = file {
        ask_size(file.path);
    }
    volume.update_attachment(|attachment| attachment.phase = Phase::Attached)
}

/// A question to the mounted file, which a core that hangs leaves open.
fn ask_size(path: PathBuf) {
    let (sender, answered) = mpsc::channel();
    thread::spawn(move || sender.send(fs::metadata(path).is_ok()));
    let _ = answered.recv_timeout(PEER_DEADLINE);
}

/// The program in use; at the first attach the one beside the control module.
fn first_build(volume: &Volume, progress: &Progress) -> Result<CoreBuild> {
    if let Some(build) = volume.record().current {
        return Ok(build);
    }
    progress.step("stage the core");
    let build = start::stage(volume, &volume.programs.core())?;
    volume.update(|record| record.current = Some(build.clone()))?;
    Ok(build)
}

/// The path to mount on, free of symbolic links: a regular file, or a name in an existing directory.
///
/// # Errors
/// What is wrong with it.
fn resolve(path: &Path) -> Result<PathBuf> {
    let refused = |why: &str| Error::State(format!("cannot attach at {}: {why}", path.display()));
    let name = path.file_name().ok_or_else(|| refused("give the path of a file"))?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("/"));
    let parent = match fs::canonicalize(parent) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(refused("its directory does not exist; make it first"));
        }
        other => other.doing(|| format!("attach at {}", path.display()))?,
    };
    let mut target = parent.join(name);
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

/// A volume whose file lies in one of its own storage nodes would be written into itself.
fn refuse_own_nodes(path: &Path, spec: &VolumeSpec) -> Result<()> {
    let inside = spec.nodes.iter().find(|node| {
        let NodeUrl::Dir(node) = &node.url;
        path.starts_with(fs::canonicalize(node).as_ref().unwrap_or(node))
    });
    inside.map_or(Ok(()), |node| {
        Err(Error::State(format!(
            "cannot attach at {}: it lies in the volume's own storage node {}; give a path outside of it",
            path.display(),
            node.url
        )))
    })
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

/// Makes the file to mount on, if there is none.
fn make_file(volume: &Volume, file: &FileAttach) -> Result<()> {
    let mut options = OpenOptions::new();
    match options.write(true).create_new(true).mode(0o600).open(&file.path) {
        Ok(_) => volume.update_attachment(|attachment| attachment.created_file = true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(e).doing(|| format!("make {}", file.path.display())),
    }
}

/// Removes what is left of an attachment: processes, mount, sockets, file, record. Does not ask whether somebody
/// still uses the file.
///
/// # Errors
/// What could not be removed; the attachment stays recorded then.
pub fn clear_away(volume: &Volume) -> Result<()> {
    let Some(attachment) = volume.record().attachment else { return Ok(()) };
    let gone = !attachment.of_this_boot() || end_all(&attachment, Duration::ZERO);
    let strays = of_volume(&volume.paths.spec(), &volume.paths.cores());
    if !gone || !strays.into_iter().all(|(process, _)| process.end(Duration::ZERO)) {
        return Err(Error::Failed(format!(
            "a process of volume {} does not end although it was killed: see the kernel's log",
            volume.name
        )));
    }
    if let Some(FileAttach { path, .. }) = &attachment.file {
        unmount(path)?;
        let empty = fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() == 0);
        if attachment.created_file && empty {
            let _ = fs::remove_file(path);
        }
    }
    volume.paths.remove_sockets();
    volume.set_trouble(None);
    volume.update(|record| record.attachment = None)
}

/// Takes our mount on `path` out of the tree, if there is one.
fn unmount(path: &Path) -> Result<()> {
    let found = fuse::find_mount(path).doing(|| "read /proc/self/mountinfo".to_owned())?;
    match found {
        Some(mounted) if mounted.source == "everdisk" => {
            fuse::unmount(path, true).doing(|| format!("unmount {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_mounted_on_is_refused_and_links_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let why = |path: &Path| resolve(path).unwrap_err().to_string();
        fs::write(at("file"), "x").unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        std::os::unix::fs::symlink(at("nowhere"), at("dangling")).unwrap();
        let real = fs::canonicalize(dir.path()).unwrap();
        assert_eq!(resolve(&at("new")).unwrap(), real.join("new"));
        assert_eq!(resolve(&at("link")).unwrap(), real.join("file"));
        assert!(why(&at("dangling")).contains("leads nowhere"));
        assert!(why(dir.path()).contains("is a directory"));
        assert!(why(Path::new("/dev/null")).contains("no regular file"));
        assert!(why(&at("none/new")).contains("directory does not exist"));
        assert!(why(Path::new("/")).contains("path of a file"));
    }

    #[test]
    fn a_path_in_a_node_of_the_volume_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("node");
        fs::create_dir(&node).unwrap();
        std::os::unix::fs::symlink(&node, dir.path().join("link")).unwrap();
        let mut spec = crate::volume::tests::volume(dir.path()).spec();
        spec.nodes[0].url = NodeUrl::Dir(dir.path().join("link"));
        let real = fs::canonicalize(&node).unwrap();
        for inside in ["file", "deep/file"] {
            let refused = refuse_own_nodes(&real.join(inside), &spec).unwrap_err().to_string();
            assert!(refused.contains("own storage node"), "{refused}");
        }
        assert!(refuse_own_nodes(&real.with_file_name("node2"), &spec).is_ok());
    }

    #[test]
    fn only_an_empty_file_that_attach_made_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let volume = crate::volume::tests::volume(dir.path());
        for (created, content, stays) in [(true, "", false), (true, "data", true), (false, "", true)] {
            let path = dir.path().join("file");
            fs::write(&path, content).unwrap();
            let attachment = Attachment {
                boot_id: "another".to_owned(),
                phase: Phase::Attached,
                file: Some(FileAttach { path: path.clone(), mode: 0o600, uid: 0, gid: 0, allow_other: false }),
                nbd: Vec::new(),
                created_file: created,
                interface: None,
                cores: Vec::new(),
                started: 1,
            };
            volume.update(|record| record.attachment = Some(attachment)).unwrap();
            clear_away(&volume).unwrap();
            assert_eq!(path.exists(), stays);
            assert_eq!(volume.record().attachment, None);
        }
    }
}
