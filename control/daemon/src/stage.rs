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
    let copied = Source::open(source).and_then(|mut source| programs::copy(&mut source, &program, COPIED_WITHIN));
    let checked = copied.and_then(|digest| {
        let identity = programs::identify(component, &program, source, VERSION_WITHIN)?;
        Ok(Build { program: program.clone(), identity, digest: Some(digest) })
    });
    if checked.is_err() {
        prune(volume);
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

/// Removes every program that is not on record.
pub fn prune(volume: &Volume) {
    let record = volume.record();
    let kept = [record.current, record.previous, record.interface].into_iter().flatten().map(|build| build.program);
    let kept: Vec<_> = kept.filter_map(|program| program.parent().map(Path::to_owned)).collect();
    for component in [Component::Core, Component::Interface] {
        let Ok(entries) = fs::read_dir(volume.paths.programs(component)) else { continue };
        for directory in entries.flatten().map(|entry| entry.path()).filter(|path| !kept.contains(path)) {
            if let Err(e) = fs::remove_dir_all(&directory) {
                warn!(volume = %volume.name, "cannot remove {}: {e}", directory.display());
            }
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
    let digest = programs::digest(&mut Source::open(&beside)?).doing(|| format!("read {}", beside.display()))?;
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
    prune(volume);
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
/// Nobody can tell.
pub fn segment_abi(volume: &Volume, status: &InterfaceStatus) -> Result<u32> {
    let recorded = || volume.record().interface.map(|build| build.identity.abi.max);
    status.segment_abi.or_else(recorded).ok_or_else(|| {
        Error::Failed(format!(
            "it is not known which ABI the segment of volume {0} has: `everdisk detach {0}` and attach it again",
            volume.name
        ))
    })
}
