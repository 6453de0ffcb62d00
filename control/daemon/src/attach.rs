//! Attach: interface, core, front ends; all of it or nothing.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use everdisk_api::frontends::{FileOptions, NbdOptions, exposure};
use everdisk_proto::{frame::FileAttach, journal::CoreBuild, limits::PEER_DEADLINE};
use everdisk_sys::fuse;
use everdisk_telemetry::event;
use tracing::{info, warn};

use crate::{
    error::{Doing, Error, Result},
    give_up::does_not_end,
    limits, nodes, places,
    process::{boot_id, of_volume},
    progress::Progress,
    record::{Attachment, Phase},
    start::{self, ARMED_WITHIN, end_all},
    volume::Volume,
};

/// Attaches a volume to a file, to places at which NBD clients are awaited, or to both.
///
/// # Errors
/// Why not; nothing is left of the attempt then.
pub fn attach(volume: &Arc<Volume>, file: Option<&FileOptions>, nbd: &[NbdOptions], progress: &Progress) -> Result<()> {
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
    limits::check(&volume.spec(), file.is_some())?;
    nodes::settle(volume)?;
    let places = places::look_at(file, nbd, &volume.spec())?;
    let build = first_build(volume, progress)?;
    let attachment = Attachment {
        boot_id: boot_id(),
        phase: Phase::Attaching,
        file: places.file,
        nbd: places.nbd,
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
    info!(event = event::VOLUME_ATTACHED, volume = %volume.name, at = volume.attached()?.places(), "a core serves");
    for exposed in nbd.iter().filter_map(|wish| exposure(&wish.address)) {
        warn!(volume = %volume.name, "{exposed}");
    }
    Ok(())
}

fn bring_up(volume: &Arc<Volume>, build: &CoreBuild, progress: &Progress) -> Result<()> {
    progress.step("start the interface");
    let interface = start::interface(volume, false)?;
    start::interface_ready(volume, &interface)?;
    progress.step("start the core");
    let core = start::core(volume, build)?;
    start::core_armed(volume, &core, ARMED_WITHIN)?;
    progress.step("open the front ends");
    let Attachment { file, nbd, .. } = volume.attached()?;
    if let Some(file) = &file {
        make_file(volume, file)?;
    }
    volume.interface().attach(file.clone(), nbd, core.id.pid).map_err(|e| match core.id.alive() {
        true => e,
        false => Error::Failed(format!("{e}; the core ended: {}", core.last_words())),
    })?;
    // The kernel learns the file's size when it is first asked for it. Before, a mapping is empty and writes go one by
    // one. It refuses us where the file is another user's; then it is that user's first question that does it.
    if let Some(file) = file {
        ask_size(file.path);
    }
    // Of a port that the system chose, nobody else knows which one it is.
    let bound = volume.interface().status().map(|status| status.nbd).unwrap_or_default();
    volume.update_attachment(|attachment| attachment.opened(&bound))
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
/// still uses them.
///
/// # Errors
/// What could not be removed; the attachment stays recorded then.
pub fn clear_away(volume: &Volume) -> Result<()> {
    let Some(attachment) = volume.record().attachment else { return Ok(()) };
    let gone = !attachment.of_this_boot() || end_all(&attachment, Duration::ZERO);
    let strays = of_volume(&volume.paths.spec(), &volume.paths.cores());
    if !gone || !strays.iter().all(|(process, _)| process.end(Duration::ZERO)) {
        let mut processes = attachment.processes();
        processes.extend(
            strays.into_iter().map(|(process, _)| process).filter(|stray| !attachment.processes().contains(stray)),
        );
        return Err(Error::Failed(does_not_end(&volume.spec(), &processes)));
    }
    if let Some(FileAttach { path, .. }) = &attachment.file {
        unmount(path)?;
        let empty = fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() == 0);
        if attachment.created_file && empty {
            let _ = fs::remove_file(path);
        }
    }
    places::remove_sockets(&attachment.nbd);
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
    use std::os::unix::net::UnixListener;

    use everdisk_proto::{frame::NbdListen, nbd::NbdAddress};

    use super::*;

    #[test]
    fn only_an_empty_file_that_attach_made_is_removed_and_every_dead_socket() {
        let dir = tempfile::tempdir().unwrap();
        let volume = crate::volume::tests::volume(dir.path());
        for (created, content, stays) in [(true, "", false), (true, "data", true), (false, "", true)] {
            let path = dir.path().join("file");
            fs::write(&path, content).unwrap();
            let socket = dir.path().join("socket");
            drop(UnixListener::bind(&socket).unwrap());
            let attachment = Attachment {
                boot_id: "another".to_owned(),
                phase: Phase::Attached,
                file: Some(FileAttach { path: path.clone(), mode: 0o600, uid: 0, gid: 0, allow_other: false }),
                nbd: vec![NbdListen { address: NbdAddress::Unix(socket.clone()), mode: 0o600, uid: 0, gid: 0 }],
                created_file: created,
                interface: None,
                cores: Vec::new(),
                started: 1,
            };
            volume.update(|record| record.attachment = Some(attachment)).unwrap();
            clear_away(&volume).unwrap();
            assert_eq!((path.exists(), socket.exists()), (stays, false));
            assert_eq!(volume.record().attachment, None);
        }
    }
}
