//! Work on a volume's storage nodes: making, checking, growing and deleting them. A core program does it in a process of its own, so
//! that a node that hangs blocks that process only. Before anything is changed every node has been found to be there, to be
//! this volume's and to be able to do it; what is under way is on record, so that it can be ended or undone after a death.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use everdisk_api::quantity::show_size;
use everdisk_proto::volume::{NodeUrl, VolumeSpec};
use everdisk_telemetry::event;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::{
    error::{Error, Result},
    process::of_volume,
    programs::run_well,
    progress::Progress,
    volume::Volume,
};

/// A task on storage nodes ends within this time, if they are directories.
const WITHIN: Duration = Duration::from_secs(60);
/// All of an export may have to be read (to see that it is empty) or written (to empty it). A slow server does that at this speed.
const EXPORT_BYTES_A_SECOND: u64 = 50 << 20;

/// What is on record of a volume's nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodesRecord {
    /// Directories that were made for the volume and go with it; every other one is the operator's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub made: Vec<PathBuf>,
    /// The size that a resize under way goes to: the nodes may have any size from the description's on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resizing: Option<u64>,
    /// The volume is being deleted: a node with nothing left on it is already deleted.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub deleting: bool,
}

impl NodesRecord {
    /// Whether there is nothing on record.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A line that a core says of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Made(usize),
    Gone(usize),
    Short { place: usize, free: u64, needed: u64 },
}

/// What it says. Lines of other kinds are for people.
fn told(stdout: &str) -> Vec<Told> {
    let line = |line: &str| {
        let mut words = line.split(' ');
        let kind = words.next()?;
        let place = words.next()?.parse().ok()?;
        Some(match kind {
            "made" => Told::Made(place),
            "gone" => Told::Gone(place),
            "short" => Told::Short { place, free: words.next()?.parse().ok()?, needed: words.next()?.parse().ok()? },
            _ => return None,
        })
    };
    stdout.lines().filter_map(line).collect()
}

fn url(spec: &VolumeSpec, place: usize) -> Option<&NodeUrl> {
    spec.nodes.get(place).map(|node| &node.url)
}

fn shortages(spec: &VolumeSpec, told: &[Told]) -> Vec<String> {
    let words = |told: &Told| match *told {
        Told::Short { place, free, needed } => Some(format!(
            "the file system of {} has {} free, and the volume's part there may come to need {}: when it is full, writes fail",
            url(spec, place)?,
            mebibytes(free),
            mebibytes(needed)
        )),
        _ => None,
    };
    told.iter().filter_map(words).collect()
}

fn mebibytes(bytes: u64) -> String {
    if bytes < 1 << 20 { show_size(bytes) } else { show_size(bytes >> 20 << 20) }
}

/// What a creation may do to storage nodes, beside formatting them.
#[derive(Clone, Copy, Debug, Default)]
pub struct May {
    /// Make the directories that are not there.
    pub create_dir: bool,
    /// Overwrite exports that are not empty.
    pub force: bool,
}

/// A task on the storage nodes of a volume of `size` bytes ends within this time.
fn within(spec: &VolumeSpec, size: u64) -> Duration {
    WITHIN + Duration::from_secs(if has_exports(spec) { size / EXPORT_BYTES_A_SECOND } else { 0 })
}

/// What was made.
#[derive(Debug)]
pub struct Made {
    /// The directories that were not there before.
    pub directories: Vec<PathBuf>,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// Makes the nodes of the volume described in `file`.
///
/// # Errors
/// Why not; after [`Error::Killed`] it is not known what was made.
pub fn create(core: &Path, file: &Path, spec: &VolumeSpec, may: May) -> Result<Made> {
    let mut arguments = vec!["--volume".into(), file.as_os_str().to_owned(), "--create".into()];
    arguments.extend(may.create_dir.then(|| OsString::from("--create-dir")));
    arguments.extend(may.force.then(|| OsString::from("--force")));
    let told = told(&run_well(core, &arguments, within(spec, spec.size))?);
    let directory = |told: &Told| match told {
        Told::Made(place) => url(spec, *place)?.as_directory().cloned(),
        _ => None,
    };
    Ok(Made { directories: told.iter().filter_map(directory).collect(), warnings: shortages(spec, &told) })
}

/// Undoes what a creation of the volume described in `file` has made, or may still be making in a process that its control module left.
///
/// # Errors
/// Why not.
pub fn undo_creation(core: &Path, file: &Path, cores: &Path) -> Result<()> {
    end_tasks(file, cores)?;
    let spec = std::fs::read(file).ok().and_then(|text| serde_json::from_slice::<VolumeSpec>(&text).ok());
    // One that cannot be read cannot be undone by the core either, which says so.
    let limit = spec.map_or(WITHIN, |spec| within(&spec, spec.size));
    run_well(core, &["--volume".into(), file.as_os_str().to_owned(), OsString::from("--destroy")], limit).map(drop)
}

/// Ends the tasks on a volume's nodes that a control module left when it died. Processes that may serve it are left alone, and are an error.
fn end_tasks(file: &Path, cores: &Path) -> Result<()> {
    let (tasks, serving): (Vec<_>, Vec<_>) =
        of_volume(file, cores)?.into_iter().partition(|(process, _)| is_task(process.pid));
    if !serving.is_empty() {
        let named: Vec<String> = serving
            .iter()
            .map(|(process, program)| format!("process {} ({})", process.pid, program.display()))
            .collect();
        return Err(Error::State(format!(
            "the volume is in use by {}, which its record does not list: find out what uses them, end them, and try again",
            named.join(", ")
        )));
    }
    for (process, _) in tasks {
        if !process.end(Duration::ZERO) {
            return Err(Error::Failed(format!(
                "process {}, which an earlier everdiskd started on {}, does not end although it was killed",
                process.pid,
                file.display()
            )));
        }
    }
    Ok(())
}

/// Whether a process does a task on nodes and ends. A process that has gone by now is none.
fn is_task(pid: u32) -> bool {
    const TASKS: [&str; 4] = ["--create", "--destroy", "--resize", "--check"];
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|word| TASKS.iter().any(|task| task.as_bytes() == word))
}

fn task(volume: &Volume, task: &[&str]) -> Result<Vec<Told>> {
    let mut arguments = vec![OsString::from("--volume"), volume.paths.spec().into_os_string()];
    arguments.extend(task.iter().map(OsString::from));
    // The core that came with this control module: it knows these tasks, which one that the volume was attached with may not.
    let spec = volume.spec();
    let size = spec.size.max(volume.record().nodes.resizing.unwrap_or(0));
    Ok(told(&run_well(&volume.programs.core(), &arguments, within(&spec, size))?))
}

/// Whether a core could serve a volume with exports among its nodes. A core connects to them when it has joined the interface
/// already, and could then only say that it does not serve.
///
/// # Errors
/// What is in the way, with the node's address.
pub fn check_exports(volume: &Volume, progress: &Progress) -> Result<()> {
    if !has_exports(&volume.spec()) {
        return Ok(());
    }
    progress.step("inspect the exports");
    check_serve(volume)
}

fn has_exports(spec: &VolumeSpec) -> bool {
    spec.nodes.iter().any(|node| node.url.as_directory().is_none())
}

/// Whether a core could serve the volume from its nodes. The nodes may be in use while this is checked.
///
/// # Errors
/// What is in the way.
pub fn check_serve(volume: &Volume) -> Result<()> {
    task(volume, &["--check", "serve"]).map(drop)
}

/// Grows a detached volume. Returns warnings for the operator.
///
/// # Errors
/// Why not; the volume has its old size then.
pub fn resize(volume: &Volume, size: u64, progress: &Progress) -> Result<Vec<String>> {
    let mut spec = volume.spec();
    if size < spec.size {
        return Err(Error::State(format!(
            "volume {} has {} and can only grow: data would be lost",
            volume.name,
            show_size(spec.size)
        )));
    }
    spec.size = size;
    spec.validate().map_err(|e| Error::BadRequest(e.to_string()))?;
    end_tasks(&volume.paths.spec(), &volume.paths.cores())?;
    // Before anything is on record: what is refused here has nothing to be undone.
    task(volume, &["--check", "resize", "--bytes", &size.to_string()])?;
    progress.step("grow the storage nodes");
    volume.update(|record| record.nodes.resizing = Some(size))?;
    // The new size counts once the description says it; until then what was done to the nodes can be undone.
    let grown = task(volume, &["--resize", &size.to_string()]).and_then(|told| {
        volume.set_spec(spec.clone())?;
        Ok(shortages(&spec, &told))
    });
    if let Err(refused) = grown {
        return Err(match settle(volume) {
            Ok(()) => refused,
            Err(stuck) => Error::Failed(format!("{refused}. {stuck}")),
        });
    }
    volume.update(|record| record.nodes.resizing = None)?;
    info!(event = event::VOLUME_RESIZED, volume = %volume.name, bytes = size, "the volume is resized");
    grown
}

/// Undoes a resize that was interrupted before the description said the new size.
///
/// # Errors
/// It cannot be undone yet.
pub fn settle(volume: &Volume) -> Result<()> {
    let Some(wanted) = volume.record().nodes.resizing else { return Ok(()) };
    let size = volume.spec().size;
    if size != wanted {
        end_tasks(&volume.paths.spec(), &volume.paths.cores())?;
        task(volume, &["--resize", &size.to_string()]).map_err(|e| {
            Error::Failed(format!(
                "The resize of volume {0} to {1} was interrupted and cannot be undone yet: {e}. Mend that and do again what you did, or \
                 repeat `everdisk volume resize {0} {1}`",
                volume.name,
                show_size(wanted)
            ))
        })?;
        warn!(volume = %volume.name, bytes = wanted, "a resize that was interrupted is undone");
    }
    volume.update(|record| record.nodes.resizing = None)
}

/// Deletes a detached volume's data. `force`: even if nodes are missing, or have nothing of it. Returns what stays behind, in words.
///
/// # Errors
/// Why not. Nothing was touched then, unless a node failed in the middle; then it can be repeated.
pub fn delete(volume: &Volume, force: bool, progress: &Progress) -> Result<Vec<String>> {
    end_tasks(&volume.paths.spec(), &volume.paths.cores())?;
    progress.step("inspect the storage nodes");
    // One that was begun has found every node there.
    let begun = volume.record().nodes.deleting;
    if !begun && !force {
        task(volume, &["--check", "delete"]).map_err(|e| {
            Error::State(format!(
                "volume {0} is not deleted, and nothing of it was touched: {e}. If what is missing there shall stay where it is, \
                 `everdisk volume delete {0} --force` deletes the rest",
                volume.name
            ))
        })?;
    }
    // Only where every node was found: a repetition believes that.
    if !force {
        volume.update(|record| record.nodes.deleting = true)?;
    }
    progress.step("delete the data");
    let spec = volume.spec();
    let told = task(volume, &["--destroy"])?;
    for directory in &volume.record().nodes.made {
        // One that holds anything else, or is a mount point by now, stays.
        let _ = std::fs::remove_dir(directory);
    }
    let gone = told.iter().filter_map(|told| match told {
        Told::Gone(place) if !begun => url(&spec, *place),
        _ => None,
    });
    let left = gone.map(|url| {
        let otherwise = match url {
            NodeUrl::Dir(_) => "if its disk is not mounted, the volume's data on it stay there",
            NodeUrl::Nbd(_) => {
                "if its server exports another disk than before, the volume's data on that one stay there"
            }
        };
        format!("{url} had nothing of the volume: {otherwise}")
    });
    Ok(left.collect())
}

#[cfg(test)]
mod tests;
