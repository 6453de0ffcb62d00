//! Attach: interface, core, front ends; all of it or nothing.

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use everdisk_api::{
    frontends::{FileOptions, NbdOptions, exposure},
    operation::OperationName,
};
use everdisk_proto::{
    frame::{FileAttach, NbdListen, NbdStatus},
    identity::Build,
    limits::PEER_DEADLINE,
    nbd::NbdAddress,
};
use everdisk_sys::{file, fuse};
use everdisk_telemetry::event;
use tracing::{info, warn};

use crate::{
    catalogue::Catalogue,
    error::{Doing, Error, Result},
    give_up::does_not_end,
    limits, nodes, places,
    process::{boot_id, of_volume},
    progress::Progress,
    record::{Attachment, Phase},
    stage::Staged,
    start::{self, ARMED_WITHIN, end_all},
    volume::Volume,
};

/// The interface says within this time where it awaits NBD clients, however busy the machine is.
const BOUND_WITHIN: Duration = Duration::from_secs(5);
/// Interval between two questions.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Attaches a volume to a file, to addresses for NBD clients, or to both.
///
/// # Errors
/// Why not; nothing is left of the attempt then.
pub fn attach(
    catalogue: &Catalogue,
    volume: &Arc<Volume>,
    file: Option<&FileOptions>,
    nbd: &[NbdOptions],
    progress: &Progress,
) -> Result<()> {
    let _operation = volume.begin(OperationName::Attach)?;
    let _hands = volume.supervision.hands();
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
    refuse_strays(volume)?;
    // Before anything is done, and again once no other attach can claim a place at the same time.
    places::look_at(file, nbd, &volume.name, &catalogue.territory())?;
    nodes::settle(volume)?;
    nodes::check_exports(volume, progress)?;
    progress.step("stage the programs");
    let (staged, interface, core) = Staged::for_attach(volume)?;
    let claim = catalogue.claim();
    let places = places::look_at(file, nbd, &volume.name, &catalogue.territory())?;
    let attachment = Attachment {
        boot_id: boot_id(),
        phase: Phase::Attaching,
        file: places.file,
        nbd: places.nbd,
        created_file: false,
        interface: None,
        cores: Vec::new(),
        started: 0,
        home: Some(volume.paths.home().doing(|| format!("examine {}", volume.paths.state.display()))?),
    };
    volume.paths.make_run().doing(|| format!("make {}", volume.paths.run.display()))?;
    volume.update(|record| record.attachment = Some(attachment))?;
    drop(claim);
    volume.findings.set_trouble(None);
    if let Err(e) = bring_up(volume, &interface, &core, progress) {
        if let Err(left) = clear_away(volume) {
            warn!(volume = %volume.name, "after a failed attach: {left}");
        }
        return Err(e);
    }
    staged.keep();
    info!(event = event::VOLUME_ATTACHED, volume = %volume.name, at = volume.attached()?.places(), "a core serves");
    for exposed in nbd.iter().filter_map(|wish| exposure(&wish.address)) {
        warn!(volume = %volume.name, "{exposed}");
    }
    Ok(())
}

fn bring_up(volume: &Arc<Volume>, interface: &Build, core: &Build, progress: &Progress) -> Result<()> {
    progress.step("start the interface");
    let interface = start::interface(volume, &interface.program, false)?;
    start::interface_ready(volume, &interface)?;
    progress.step("start the core");
    let core = start::core(volume, core)?;
    start::core_armed(volume, &core, ARMED_WITHIN)?;
    progress.step("open the front ends");
    let Attachment { file, nbd, .. } = volume.attached()?;
    let target = file.as_ref().map(|file| make_target(volume, file)).transpose()?;
    let file = volume.attached()?.file;
    volume.interface().attach(file.clone(), nbd, core.id.pid).map_err(|e| match core.id.alive() {
        true => e,
        false => Error::Failed(format!("{e}; the core ended: {}", core.last_words())),
    })?;
    if let Some(target) = target.flatten() {
        file::close_to_all(target.as_fd()).doing(|| "close the file below the volume's to writers".to_owned())?;
    }
    // The kernel learns the file's size when it is first asked for it. Before, a mapping is empty and writes go one by
    // one. It refuses us where the file is another user's; then it is that user's first question that does it.
    if let Some(file) = file {
        ask_size(file.path);
    }
    let bound = where_bound(volume, BOUND_WITHIN)?;
    volume.update_attachment(|attachment| attachment.opened(&bound))
}

/// Where the interface awaits NBD clients. The front ends are open and may be in use by now, so an interface that does not answer `within`
/// this time undoes the attach only where the system chose a port, which no other process knows.
fn where_bound(volume: &Volume, within: Duration) -> Result<Vec<NbdStatus>> {
    let nbd = volume.attached()?.nbd;
    if nbd.is_empty() {
        return Ok(Vec::new());
    }
    let is_chosen = |listen: &NbdListen| matches!(listen.address, NbdAddress::Tcp { port: 0, .. });
    let deadline = Instant::now() + within;
    loop {
        match volume.interface().status() {
            Ok(status) => return Ok(status.nbd),
            Err(_) if Instant::now() < deadline => thread::sleep(POLL_INTERVAL),
            Err(e) if nbd.iter().any(is_chosen) => return Err(e),
            Err(e) => {
                warn!(volume = %volume.name, "it is not on record which sockets the interface made for NBD clients: {e}");
                return Ok(Vec::new());
            }
        }
    }
}

/// Processes that run for the volume without a record of an attachment (it was lost) may serve it: nothing is done to
/// them, and nothing beside them.
fn refuse_strays(volume: &Volume) -> Result<()> {
    let strays = of_volume(&volume.paths.spec(), &volume.paths.cores())?;
    if strays.is_empty() {
        return Ok(());
    }
    let named: Vec<String> =
        strays.iter().map(|(process, program)| format!("process {} ({})", process.pid, program.display())).collect();
    Err(Error::State(format!(
        "processes of volume {} run that are not in its record, and may serve it: {}; find out what uses them, end them, and \
         attach again",
        volume.name,
        named.join(", ")
    )))
}

/// Asks the mounted file for its size. A core that hangs leaves the request unanswered.
fn ask_size(path: PathBuf) {
    let (sender, answered) = mpsc::channel();
    let asking = thread::Builder::new().spawn(move || sender.send(fs::metadata(path).is_ok()));
    // However it ends: nothing depends on it. Where no thread can be started, nothing answers, and nothing is waited for.
    let _ = asking.map(|_| answered.recv_timeout(PEER_DEADLINE));
}

/// Finds or makes the file to mount on, and remembers which it is. A regular file that was made is closed to writers once something is
/// mounted on it: for that it is pinned here.
fn make_target(volume: &Volume, file: &FileAttach) -> Result<Option<OwnedFd>> {
    let target = places::make_target(&file.path)?;
    volume.update_attachment(|attachment| {
        attachment.created_file = target.is_ours;
        if let Some(file) = &mut attachment.file {
            file.target = Some(target.id);
        }
    })?;
    let pinned = file::pin_parent(&file.path).and_then(|(directory, name)| file::pin(directory.as_fd(), name));
    let pinned = pinned.doing(|| format!("open {}", file.path.display()))?;
    Ok(target.is_ours.then_some(pinned))
}

/// Removes what is left of an attachment: processes, mount, sockets, file, record. Does not check whether a process
/// still uses them.
///
/// # Errors
/// What could not be removed; the attachment stays recorded then.
pub fn clear_away(volume: &Volume) -> Result<()> {
    let Some(attachment) = volume.record().attachment else { return Ok(()) };
    let gone = !attachment.of_this_boot() || end_all(&attachment, Duration::ZERO);
    let strays = of_volume(&volume.paths.spec(), &volume.paths.cores())?;
    if !gone || !strays.iter().all(|(process, _)| process.end(Duration::ZERO)) {
        let mut processes = attachment.processes();
        processes.extend(
            strays.into_iter().map(|(process, _)| process).filter(|stray| !attachment.processes().contains(stray)),
        );
        return Err(Error::Failed(does_not_end(&volume.spec(), &processes)));
    }
    if let Some(file) = &attachment.file {
        unmount(file)?;
        if let Some(target) = file.target.filter(|_| attachment.created_file) {
            places::remove_target(&file.path, target);
        }
    }
    places::remove_sockets(&attachment.nbd);
    volume.paths.remove_sockets();
    volume.findings.set_trouble(None);
    volume.update(|record| record.attachment = None)
}

/// Takes the volume's mount out of the tree, if it is there, and no other that is at its path.
fn unmount(file: &FileAttach) -> Result<()> {
    let found = places::mount_of(file).doing(|| "read /proc/self/mountinfo".to_owned())?;
    let unmounted = found.map_or(Ok(()), |mount| fuse::unmount(&mount, true));
    unmounted.doing(|| format!("unmount {}", file.path.display()))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, path::Path};

    use everdisk_proto::file_id::FileId;

    use super::*;

    /// An attachment of another boot: nothing of it runs or is mounted, and files may have been put in the place of what it made.
    fn left(path: &Path, socket: &Path, target: Option<FileId>, bound: Option<FileId>) -> Attachment {
        Attachment {
            boot_id: "another".to_owned(),
            phase: Phase::Attached,
            file: Some(FileAttach {
                path: path.to_owned(),
                mode: 0o600,
                uid: 0,
                gid: 0,
                allow_other: false,
                source: Some("everdisk:v:gone".to_owned()),
                target,
            }),
            nbd: vec![NbdListen { address: NbdAddress::Unix(socket.to_owned()), mode: 0o600, uid: 0, gid: 0, bound }],
            created_file: true,
            interface: None,
            cores: Vec::new(),
            started: 1,
            home: None,
        }
    }

    fn id(path: &Path) -> FileId {
        let (directory, name) = file::pin_parent(path).unwrap();
        file::look_at(directory.as_fd(), name).unwrap().unwrap().id
    }

    #[test]
    fn only_what_attach_made_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let volume = crate::volume::tests::volume(dir.path());
        let root = fs::canonicalize(dir.path()).unwrap();
        let (path, socket) = (root.join("file"), root.join("socket"));
        let clear = |attachment: Attachment| {
            volume.update(|record| record.attachment = Some(attachment)).unwrap();
            clear_away(&volume).unwrap();
            assert_eq!(volume.record().attachment, None);
        };
        let make = || {
            let target = places::make_target(&path).unwrap();
            drop(UnixListener::bind(&socket).unwrap());
            (Some(target.id), Some(id(&socket)))
        };
        let (target, bound) = make();
        clear(left(&path, &socket, target, bound));
        assert!(!path.exists() && !socket.exists(), "what was made goes");
        // Other files were put in their places.
        let (target, bound) = make();
        for made in [&path, &socket] {
            fs::rename(made, made.with_extension("moved")).unwrap();
            fs::write(made, "").unwrap();
        }
        clear(left(&path, &socket, target, bound));
        assert!(path.exists() && socket.exists(), "what others made stays");
        // Or wrote into it.
        let target = Some(id(&path));
        fs::write(&path, "data").unwrap();
        clear(left(&path, &socket, target, None));
        assert_eq!(fs::read(&path).unwrap(), b"data");
        let kept = Attachment { created_file: false, ..left(&path, &socket, target, None) };
        fs::write(&path, "").unwrap();
        clear(kept);
        assert!(path.exists(), "and what was there before the attach");
    }

    /// Once the front ends are open, a late answer does not undo the attach, and none only where it is needed.
    #[test]
    fn a_late_answer_of_the_interface_does_not_undo_an_attach() {
        let dir = tempfile::tempdir().unwrap();
        let volume = crate::volume::tests::volume(dir.path());
        let attach = |port| {
            let address = NbdAddress::Tcp { host: "127.0.0.1".to_owned(), port };
            let nbd = vec![NbdListen { address, mode: 0, uid: 0, gid: 0, bound: None }];
            let attachment = Attachment { nbd, ..crate::record::tests::attachment() };
            let attachment = Attachment { boot_id: boot_id(), ..attachment };
            volume.update(|record| record.attachment = Some(attachment)).unwrap();
        };
        attach(10_809);
        assert_eq!(where_bound(&volume, Duration::ZERO).unwrap(), []);
        attach(0);
        assert!(where_bound(&volume, Duration::ZERO).is_err(), "nobody knows the port");
        let late = Arc::clone(&volume);
        let answers = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            crate::fake::Interface::start(&late)
        });
        assert_eq!(where_bound(&volume, BOUND_WITHIN).unwrap(), []);
        drop(answers.join().unwrap());
    }
}
