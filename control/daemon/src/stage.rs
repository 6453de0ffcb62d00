//! The programs that a volume keeps: each is copied into the state directory before it runs, so that what is started anew is of the
//! recorded program, whatever lies beside the control module by then (D13).

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use everdisk_proto::{
    frame::InterfaceStatus,
    identity::{Build, Component, Identity},
};
use tracing::{info, warn};

use crate::{
    durable,
    error::{Doing, Error, Result},
    origin::Source,
    programs,
    record::Attachment,
    volume::Volume,
};

/// A version line comes within this time.
const VERSION_WITHIN: Duration = Duration::from_secs(5);
/// A program is copied within this time.
const COPIED_WITHIN: Duration = Duration::from_secs(30);

/// Copies the program of a component into a directory of its own, and asks what it is.
///
/// # Errors
/// It cannot be copied, or is no program of that component.
fn stage(volume: &Volume, component: Component, source: &Path) -> Result<Build> {
    let program = next_program(volume, component)?;
    let copied =
        Source::open(source, component).and_then(|mut source| programs::copy(&mut source, &program, COPIED_WITHIN));
    let checked = copied.and_then(|digest| {
        let identity = programs::identify(component, &program, source, VERSION_WITHIN)?;
        Ok(Build { program: program.clone(), identity, digest: Some(digest) })
    });
    if checked.is_err() {
        prune_of(volume, component);
    }
    checked
}

/// Where the next program of a component will lie: one above the highest number in use.
///
/// # Errors
/// The directory cannot be read.
pub fn next_program(volume: &Volume, component: Component) -> Result<PathBuf> {
    let directory = volume.paths.programs(component);
    durable::make_dir(&directory).doing(|| format!("make {}", directory.display()))?;
    let entries = fs::read_dir(&directory).doing(|| format!("read {}", directory.display()))?;
    let highest = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok()).max();
    Ok(directory.join((highest.unwrap_or(0) + 1).to_string()).join(component.program()))
}

/// Removes every program that is not on record and of which no core runs.
pub fn prune(volume: &Volume) {
    for component in [Component::Core, Component::Interface] {
        prune_of(volume, component);
    }
}

fn prune_of(volume: &Volume, component: Component) {
    let record = volume.record();
    let kept = [record.current, record.previous, record.interface].into_iter().flatten().map(|build| build.program);
    let cores = record.attachment.into_iter().flat_map(|attachment| attachment.cores).map(|core| core.program);
    let kept: Vec<_> = kept.chain(cores).filter_map(|program| program.parent().map(Path::to_owned)).collect();
    let Ok(entries) = fs::read_dir(volume.paths.programs(component)) else { return };
    for directory in entries.flatten().map(|entry| entry.path()).filter(|path| !kept.contains(path)) {
        if let Err(e) = fs::remove_dir_all(&directory) {
            warn!(volume = %volume.name, "cannot remove {}: {e}", directory.display());
        }
    }
}

/// The interface program that an attach begins with: the one beside the control module. One that is on record already is not copied
/// again.
///
/// # Errors
/// It cannot be read or copied.
pub fn interface_beside(volume: &Volume) -> Result<Build> {
    let beside = volume.programs.interface();
    let digest = programs::digest(&mut Source::open(&beside, Component::Interface)?)
        .doing(|| format!("read {}", beside.display()))?;
    if let Some(build) = volume.record().interface
        && build.digest.as_ref() == Some(&digest)
        && build.program.is_file()
    {
        return Ok(build);
    }
    keep_interface(volume, &beside)
}

fn keep_interface(volume: &Volume, source: &Path) -> Result<Build> {
    let build = stage(volume, Component::Interface, source)?;
    volume.update(|record| record.interface = Some(build.clone()))?;
    // Not the cores: an upgrade may be under way, or left to be taken up, whose program is on record only when it is committed.
    prune_of(volume, Component::Interface);
    Ok(build)
}

/// The interface program on record. Where a control module of record version 1 left none, and no interface runs whose program could be
/// taken, it is the one beside the control module.
///
/// # Errors
/// There is none and it cannot be staged.
pub fn interface(volume: &Volume) -> Result<Build> {
    match volume.record().interface {
        Some(build) => Ok(build),
        None => interface_beside(volume),
    }
}

/// Records the program of an interface that a control module of record version 1 has started: the running one, whatever lies on disk
/// by now.
pub fn adopt_interface(volume: &Volume, attachment: &Attachment) {
    let Some(process) = attachment.interface.filter(|_| attachment.interface_alive()) else { return };
    if volume.record().interface.is_some() {
        return;
    }
    match keep_interface(volume, &PathBuf::from(format!("/proc/{}/exe", process.pid))) {
        Ok(build) => {
            info!(volume = %volume.name, program = %build.identity, "the program of the interface that runs is on record now");
        }
        Err(e) => warn!(volume = %volume.name, "the program of the interface that runs cannot be kept: {e}"),
    }
}

/// The core program that an attach begins with: the one on record, or the one beside the control module where that cannot serve the
/// segments that the interface makes.
///
/// # Errors
/// It cannot be staged, or cannot serve them either.
pub fn core(volume: &Volume, interface: &Identity) -> Result<Build> {
    let abi = interface.abi.max;
    match volume.record().current {
        Some(build) if build.identity.abi.contains(abi) => return Ok(build),
        Some(old) => warn!(
            volume = %volume.name,
            "{} does not serve the segments of ABI {abi} that {interface} makes: the volume goes on with the core that came with it",
            old.identity
        ),
        None => {}
    }
    let build = stage(volume, Component::Core, &volume.programs.core())?;
    programs::serves(&build.identity, abi)?;
    volume.update(|record| record.current = Some(build.clone()))?;
    Ok(build)
}

/// ABI of the segment of an attached volume: as its interface says, or, where that does not tell, the one that its program makes.
///
/// # Errors
/// Unknown.
pub fn segment_abi(volume: &Volume, status: &InterfaceStatus) -> Result<u32> {
    let recorded = || volume.record().interface.map(|build| build.identity.abi.max);
    status.segment_abi.or_else(recorded).ok_or_else(|| {
        Error::Failed(format!(
            "it is not known which ABI the segment of volume {0} has: `everdisk detach {0}` and attach it again",
            volume.name
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{fake, volume::tests::volume};

    fn program(path: &Path, line: &str) {
        fs::write(path, format!("#!/bin/sh\necho '{line}'\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// D13: the program of an attach is the installed one, copied once; what is on record is not changed by what is installed later; and
    /// the program of an upgrade that is not committed yet stays where it is.
    #[test]
    fn d13_an_interface_is_staged_and_stays_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let mut volume = std::sync::Arc::into_inner(volume(dir.path())).unwrap();
        volume.programs = programs::Programs::in_directory(dir.path());
        let installed = dir.path().join("everdisk-interface");
        let uncommitted = volume.paths.cores().join("9");
        durable::make_dir(&uncommitted).unwrap();
        program(&installed, "everdisk-interface 1.0 (abi 4..4, buffer 2..2)");
        let first = interface_beside(&volume).unwrap();
        assert_eq!((first.identity.version.as_str(), &volume.record().interface), ("1.0", &Some(first.clone())));
        assert_eq!(interface_beside(&volume).unwrap(), first, "not copied again");
        program(&installed, "everdisk-interface 2.0 (abi 5..5, buffer 2..2)");
        assert_eq!(interface(&volume).unwrap(), first, "what is started anew is of the record");
        let second = interface_beside(&volume).unwrap();
        assert_eq!(interface(&volume).unwrap(), second, "until the next attach");
        assert!(!first.program.exists() && second.program.exists());
        program(&installed, "everdisk-core 2.0 (abi 5..5, buffer 2..2)");
        assert!(interface_beside(&volume).unwrap_err().to_string().contains("is not an everdisk-interface"));
        assert!(second.program.exists() && uncommitted.exists());
        fs::remove_file(&installed).unwrap();
        fs::create_dir(&installed).unwrap();
        let no_file = interface_beside(&volume).unwrap_err().to_string();
        assert!(no_file.contains("is not a program: it has to be the file of an everdisk-interface"), "{no_file}");
    }

    /// D13: the ABI of the segment is the interface's word, else what the program on record makes.
    #[test]
    fn d13_the_abi_of_the_segment_is_known_or_it_is_said_that_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let mut status = fake::Interface::start(&volume).status();
        status.segment_abi = Some(7);
        assert_eq!(segment_abi(&volume, &status).unwrap(), 7);
        status.segment_abi = None;
        assert!(segment_abi(&volume, &status).unwrap_err().to_string().contains("attach it again"));
        let identity = Identity::parse("everdisk-interface 0.1.0 (abi 3)").unwrap();
        let build = Build { program: "/i".into(), identity, digest: None };
        volume.update(|record| record.interface = Some(build)).unwrap();
        assert_eq!(segment_abi(&volume, &status).unwrap(), 3);
    }
}
