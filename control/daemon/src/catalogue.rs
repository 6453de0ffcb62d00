//! All volumes of this host: making, finding, growing and deleting them.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use everdisk_api::{directories::Directories, operation::OperationName};
use everdisk_proto::{
    ids::VolumeName,
    volume::{Bypass, NodeSpec, NodeUrl, SPEC_VERSION, Timeouts, VolumeSpec},
};
use everdisk_telemetry::event;
use parking_lot::{Mutex, MutexGuard};
use tracing::{error, info, warn};
use uuid::Uuid;

use crate::{
    durable,
    error::{Doing, Error, Result},
    exports, health,
    nodes::{self, May},
    paths::VolumePaths,
    process::of_volume,
    programs::Programs,
    progress::Progress,
    supervise::supervise,
    territory::Territory,
    volume::{Volume, read_spec},
};

/// Name of a directory that becomes a volume; no volume's name begins with a dot.
const NEW: &str = ".new-";
/// Name of a directory that was a volume.
const OLD: &str = ".old-";
/// Name of a directory that is no longer a volume, and whose data stays on the storage nodes.
const FORGOTTEN: &str = ".forgotten-";

/// What is chosen once, when a volume is made.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes. The only field that can be changed.
    pub size: u64,
    /// Stripe unit in bytes.
    pub stripe: u64,
    /// Bytes of the write buffer; 0: none.
    pub buffer: u64,
    /// Whether writes may pass it by.
    pub bypass: Bypass,
    /// How long requests wait for storage nodes.
    pub timeouts: Timeouts,
}

/// Why the files of a volume cannot be read, and the way out.
pub type Damaged = String;

/// The volumes.
#[derive(Debug)]
pub struct Catalogue {
    directories: Directories,
    programs: Programs,
    volumes: Mutex<BTreeMap<VolumeName, Arc<Volume>>>,
    /// Those whose files could not be read, and why.
    damaged: Mutex<BTreeMap<VolumeName, Damaged>>,
    /// Those that are being made.
    drafts: Mutex<BTreeMap<VolumeName, VolumeSpec>>,
    /// Held while places are checked and entered, so that two requests at once do not get the same place.
    claims: Mutex<()>,
}

impl Catalogue {
    /// Reads every volume of the state directory. One that is damaged is reported in the log and left alone.
    ///
    /// # Errors
    /// The state directory cannot be read.
    pub fn load(directories: Directories, programs: Programs) -> Result<Self> {
        let root = directories.state.join("volumes");
        durable::make_dir(&root).doing(|| format!("make {}", root.display()))?;
        let mut volumes = BTreeMap::new();
        let mut damaged = BTreeMap::new();
        for entry in fs::read_dir(&root).doing(|| format!("read {}", root.display()))?.flatten() {
            let file_name = entry.file_name();
            // What we make there has a name in UTF-8.
            let Some(text) = file_name.to_str() else { continue };
            if text.starts_with(NEW)
                && let Err(e) = undo_creation(&entry.path(), &programs)
            {
                warn!("{e}");
            }
            if text.starts_with(OLD) {
                // A deletion that was interrupted: its data had gone before. What cannot be removed is tried at the next start.
                let _ = fs::remove_dir_all(entry.path());
            }
            let Ok(name) = text.parse::<VolumeName>() else { continue };
            match Volume::load(&directories, name.clone(), programs.clone()) {
                Ok(volume) => {
                    volumes.insert(name, Arc::new(volume));
                }
                Err(e) => {
                    let why = way_out(&name, &VolumePaths::new(&directories, &name), &e);
                    error!(event = event::VOLUME_DAMAGED, volume = %name, "{why}");
                    damaged.insert(name, why);
                }
            }
        }
        Ok(Self {
            directories,
            programs,
            volumes: Mutex::new(volumes),
            damaged: Mutex::new(damaged),
            drafts: Mutex::default(),
            claims: Mutex::default(),
        })
    }

    /// All volumes, by name.
    pub fn all(&self) -> Vec<Arc<Volume>> {
        self.volumes.lock().values().cloned().collect()
    }

    /// The volumes whose files are damaged, and why they cannot be used.
    pub fn damaged(&self) -> Vec<(VolumeName, Damaged)> {
        self.damaged.lock().iter().map(|(name, why)| (name.clone(), why.clone())).collect()
    }

    /// One volume.
    ///
    /// # Errors
    /// There is none, or its files are damaged.
    pub fn get(&self, name: &VolumeName) -> Result<Arc<Volume>> {
        self.volumes.lock().get(name).cloned().ok_or_else(|| match self.damaged.lock().get(name) {
            Some(why) => Error::State(format!("volume {name} cannot be used: {why}")),
            None => Error::NotFound(name.to_string()),
        })
    }

    /// Keeps all others from claiming places until the result is dropped. By then, what was claimed is in a volume's record or a draft.
    pub fn claim(&self) -> MutexGuard<'_, ()> {
        self.claims.lock()
    }

    /// The descriptions of the volumes, and of those that are being made.
    fn specs(&self) -> Vec<VolumeSpec> {
        let known = self.all().into_iter().map(|volume| volume.spec());
        known.chain(self.drafts.lock().values().cloned()).collect()
    }

    /// What volumes have of the file system.
    pub fn territory(&self) -> Territory {
        let volumes = self.all().into_iter().map(|volume| (volume.spec(), volume.attachment()));
        let drafts: Vec<_> = self.drafts.lock().values().map(|spec| (spec.clone(), None)).collect();
        Territory::of(&volumes.chain(drafts).collect::<Vec<_>>())
    }

    /// An error of the storage nodes' with the names of the volumes that it knows by their identities.
    fn named(&self, error: Error) -> Error {
        let names = |mut words: String| {
            for volume in self.all() {
                let uuid = volume.spec().uuid.to_string();
                words = words.replace(&uuid, &format!("{} ({uuid})", volume.name));
            }
            words
        };
        match error {
            Error::Failed(words) => Error::Failed(names(words)),
            Error::Killed(words) => Error::Killed(names(words)),
            Error::State(words) => Error::State(names(words)),
            other => other,
        }
    }

    /// Makes a volume: formats its storage nodes, then enters it. With what the operator should know of it.
    ///
    /// # Errors
    /// Why not; nothing is entered then.
    pub fn create(
        &self,
        name: &VolumeName,
        shape: Shape,
        nodes: Vec<NodeUrl>,
        may: May,
        progress: &Progress,
    ) -> Result<(Arc<Volume>, Vec<String>)> {
        let Shape { size, stripe, buffer, bypass, timeouts } = shape;
        let nodes = nodes.into_iter().map(|url| NodeSpec { url, uuid: Uuid::new_v4() }).collect();
        let (spec_version, uuid) = (SPEC_VERSION, Uuid::new_v4());
        let spec = VolumeSpec { spec_version, name: name.clone(), uuid, size, stripe, buffer, bypass, timeouts, nodes };
        spec.validate().map_err(|e| Error::BadRequest(e.to_string()))?;
        let paths = VolumePaths::new(&self.directories, name);
        paths.check_sockets().map_err(Error::BadRequest)?;
        if paths.state.exists() {
            return Err(Error::State(match self.damaged.lock().get(name) {
                Some(why) => format!("there is a volume {name} already, which cannot be used: {why}"),
                None => {
                    format!("there is a volume {name} already (see `everdisk volume show {name}`): choose another name")
                }
            }));
        }
        let mut draft = Draft::new(self, &spec)?;
        let text = serde_json::to_vec_pretty(&spec).map_err(|e| Error::Failed(e.to_string()))?;
        let file = draft.path.join("volume.json");
        durable::write(&file, &text).doing(|| format!("write {}", file.display()))?;
        progress.step("format the storage nodes");
        let made = nodes::create(&self.programs.core(), &file, &spec, may).map_err(|e| {
            // A core that ended by itself has undone what it did.
            draft.unclear = matches!(e, Error::Killed(_));
            self.named(e)
        })?;
        // Until the volume is entered, only the draft has the nodes' identities: they are undone with the draft.
        draft.unclear = true;
        fs::rename(&draft.path, &paths.state).doing(|| format!("make {}", paths.state.display()))?;
        let made_durable = durable::sync_dir(&self.directories.state.join("volumes"));
        let entered = made_durable.doing(|| "make it durable".to_owned()).and_then(|()| self.enter(name));
        draft.unclear = entered.is_err();
        if let Err(e) = &entered
            && let Err(stays) = fs::rename(&paths.state, &draft.path)
        {
            draft.unclear = false;
            return Err(Error::Failed(format!(
                "{e}. What was made of volume {name} cannot be undone now ({stays}): the volume is there when everdiskd is started again"
            )));
        }
        let volume = entered?;
        info!(event = event::VOLUME_CREATED, volume = %volume.name, bytes = size, "the volume is made");
        // Last: if this cannot be recorded, the volume still exists, and its directories stay behind when it is deleted.
        if let Err(e) = volume.update(|record| record.nodes.made = made.directories) {
            warn!(volume = %volume.name, "the directories that were made for it are not on record, and will stay: {e}");
        }
        Ok((volume, made.warnings))
    }

    /// Reads a volume's files, has it watched, and enters it.
    fn enter(&self, name: &VolumeName) -> Result<Arc<Volume>> {
        let volume = Arc::new(Volume::load(&self.directories, name.clone(), self.programs.clone())?);
        let watched = health::watch(&volume).and_then(|()| supervise(&volume));
        // One that is watched by half is not: the thread that was started ends.
        watched.doing(|| "start a thread".to_owned()).inspect_err(|_| volume.operations.set_deleted())?;
        self.volumes.lock().insert(name.clone(), Arc::clone(&volume));
        Ok(volume)
    }

    /// Grows a detached volume. Returns warnings for the operator.
    ///
    /// # Errors
    /// Why not.
    pub fn resize(&self, name: &VolumeName, size: u64, progress: &Progress) -> Result<(Arc<Volume>, Vec<String>)> {
        let volume = self.get(name)?;
        let _operation = volume.begin(OperationName::Resize)?;
        refuse_attached(&volume, "resized")?;
        let warnings = nodes::resize(&volume, size, progress).map_err(|e| self.named(e))?;
        Ok((volume, warnings))
    }

    /// Deletes a detached volume, its data first. `force`: even if nodes are missing. Returns what stays behind, in words.
    ///
    /// # Errors
    /// Why not; the volume stays then.
    pub fn delete(&self, name: &VolumeName, force: bool, progress: &Progress) -> Result<Vec<String>> {
        let volume = self.get(name)?;
        let _operation = volume.begin(OperationName::Delete)?;
        refuse_attached(&volume, "deleted")?;
        let left = nodes::delete(&volume, force, progress).map_err(|e| self.named(e))?;
        // Out of the way at once; what a crash leaves of it is cleared at the next start.
        let grave = self.directories.state.join("volumes").join(format!("{OLD}{name}"));
        // Mostly there is none; one that stays is in the way of the rename, which says so.
        let _ = fs::remove_dir_all(&grave);
        self.bury(&volume, &grave)?;
        fs::remove_dir_all(&grave).doing(|| format!("remove {}", grave.display()))?;
        info!(event = event::VOLUME_DELETED, volume = %name, forced = force, "the volume is deleted; left behind: {left:?}");
        Ok(left)
    }

    /// Moves the files of a volume to `grave`, and removes it from the list.
    fn bury(&self, volume: &Volume, grave: &Path) -> Result<()> {
        let state = &volume.paths.state;
        fs::rename(state, grave).doing(|| format!("remove {}", state.display()))?;
        volume.operations.set_deleted();
        self.volumes.lock().remove(&volume.name);
        // A volume that is there again after a power loss can be buried again. The run directory is of this boot, and sockets alone.
        let _ = durable::sync_dir(&self.directories.state.join("volumes"));
        let _ = fs::remove_dir_all(&volume.paths.run);
        Ok(())
    }

    /// Makes a volume usable again whose record is damaged, and whose description is not: ends what runs of it and begins a new record.
    /// None: the volume is sound, or there is none. `yes`: although something runs.
    ///
    /// # Errors
    /// Why not.
    pub fn begin_record_anew(&self, name: &VolumeName, yes: bool) -> Result<Option<Arc<Volume>>> {
        let paths = VolumePaths::new(&self.directories, name);
        if !self.damaged.lock().contains_key(name) || read_spec(&paths, name).is_err() {
            return Ok(None);
        }
        let running = of_volume(&paths.spec(), &paths.cores())?;
        if !running.is_empty() && !yes {
            return Err(Error::GivesUp(format!(
                "the record of volume {name} is damaged, and {} processes of it run: ending them cuts off the volume's users, and gives \
                 up what is buffered; say --yes to do it",
                running.len()
            )));
        }
        for (process, _) in running {
            if !process.end(Duration::ZERO) {
                return Err(Error::Failed(crate::give_up::does_not_end(&read_spec(&paths, name)?, &[process])));
            }
        }
        let aside = paths.record().with_extension("json.damaged");
        match fs::rename(paths.record(), &aside) {
            // An attempt before has moved it, and could do no more.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            moved => moved.doing(|| format!("move {}", paths.record().display()))?,
        }
        let volume = self.enter(name)?;
        self.damaged.lock().remove(name);
        warn!(volume = %name, "its damaged record was moved to {}, and a new one is begun", aside.display());
        Ok(Some(volume))
    }

    /// Forgets a detached volume, or one whose files are damaged, and leaves its storage nodes as they are. Where its files lie then.
    ///
    /// # Errors
    /// Why not; the volume stays then.
    pub fn forget(&self, name: &VolumeName) -> Result<PathBuf> {
        let root = self.directories.state.join("volumes");
        let free = |n: u32| Some(root.join(format!("{FORGOTTEN}{name}-{n}"))).filter(|path| !path.exists());
        let grave = (1..).find_map(free).ok_or_else(|| Error::Failed("there is no room for it".to_owned()))?;
        let known = self.volumes.lock().get(name).cloned();
        if let Some(volume) = known {
            let _operation = volume.begin(OperationName::Forget)?;
            refuse_attached(&volume, "forgotten")?;
            refuse_served(name, &volume.paths)?;
            self.bury(&volume, &grave)?;
        } else {
            let mut damaged = self.damaged.lock();
            if !damaged.contains_key(name) {
                return Err(Error::NotFound(name.to_string()));
            }
            let paths = VolumePaths::new(&self.directories, name);
            refuse_served(name, &paths)?;
            fs::rename(&paths.state, &grave).doing(|| format!("move {}", paths.state.display()))?;
            // As in `bury`.
            let _ = durable::sync_dir(&root);
            let _ = fs::remove_dir_all(&paths.run);
            damaged.remove(name);
        }
        warn!(event = event::VOLUME_FORGOTTEN, volume = %name, "the volume is forgotten; its files lie in {}", grave.display());
        Ok(grave)
    }
}

/// What is wrong with the files of a volume, and what to do.
fn way_out(name: &VolumeName, paths: &VolumePaths, error: &Error) -> Damaged {
    let why = match error {
        Error::NotFound(_) => format!("{} is missing", paths.spec().display()),
        other => other.to_string(),
    };
    let way = if read_spec(paths, name).is_ok() {
        format!(
            "`everdisk detach {name} --force` ends what may run of the volume, puts this file aside and makes the volume usable again"
        )
    } else {
        format!(
            "`everdisk volume forget {name}` puts the files of the volume aside and leaves its storage nodes as they are"
        )
    };
    format!("{why}. Restore it from a backup and start everdiskd again; or {way}")
}

fn refuse_served(name: &VolumeName, paths: &VolumePaths) -> Result<()> {
    let Some((process, program)) = of_volume(&paths.spec(), &paths.cores())?.into_iter().next() else { return Ok(()) };
    Err(Error::State(format!(
        "volume {name} cannot be forgotten: process {} ({}) may be serving it; end it first",
        process.pid,
        program.display()
    )))
}

fn refuse_attached(volume: &Volume, what: &str) -> Result<()> {
    match volume.attachment() {
        None => Ok(()),
        Some(attachment) => Err(Error::State(format!(
            "volume {0} is attached at {1} and cannot be {what}: `everdisk detach {0}` first",
            volume.name,
            attachment.places()
        ))),
    }
}

/// Undoes a creation that was interrupted: its description is the only copy of the identities that its storage nodes may
/// bear by now.
fn undo_creation(draft: &Path, programs: &Programs) -> Result<()> {
    let spec = draft.join("volume.json");
    if spec.exists() {
        nodes::undo_creation(&programs.core(), &spec, &draft.join("cores")).map_err(|e| {
            Error::Failed(format!(
                "the creation of a volume was interrupted and cannot be undone yet: {e}; mend that and start everdiskd again ({} \
                 says what its storage nodes were to be)",
                spec.display()
            ))
        })?;
    }
    fs::remove_dir_all(draft).doing(|| format!("remove {}", draft.display()))
}

/// A directory that becomes a volume by being renamed, and goes otherwise. Two creations of one name do not meet.
struct Draft<'a> {
    catalogue: &'a Catalogue,
    name: VolumeName,
    path: PathBuf,
    /// Its storage nodes may have been formatted.
    unclear: bool,
}

impl<'a> Draft<'a> {
    fn new(catalogue: &'a Catalogue, spec: &VolumeSpec) -> Result<Self> {
        let name = spec.name.clone();
        {
            let _claim = catalogue.claim();
            if catalogue.drafts.lock().contains_key(&name) {
                return Err(Error::State(format!("a volume {name} is being made at this moment")));
            }
            exports::refuse(spec, &catalogue.specs())?;
            catalogue.territory().refuse_nodes(spec)?;
            catalogue.drafts.lock().insert(name.clone(), spec.clone());
        }
        let path = catalogue.directories.state.join("volumes").join(format!("{NEW}{name}"));
        let left = path.exists();
        let mut draft = Self { catalogue, name, path, unclear: left };
        if left {
            undo_creation(&draft.path, &catalogue.programs)?;
            draft.unclear = false;
        }
        durable::make_dir(&draft.path).doing(|| format!("make {}", draft.path.display()))?;
        Ok(draft)
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if !self.unclear {
            // What stays is undone at the next start.
            let _ = fs::remove_dir_all(&self.path);
        } else if let Err(e) = undo_creation(&self.path, &self.catalogue.programs) {
            warn!(volume = %self.name, "{e}");
        }
        self.catalogue.drafts.lock().remove(&self.name);
    }
}

#[cfg(test)]
mod tests;
