//! All volumes of this host: making, finding, growing and deleting them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, atomic::Ordering},
    time::Duration,
};

use everdisk_api::directories::Directories;
use everdisk_proto::{
    ids::VolumeName,
    volume::{NodeSpec, NodeUrl, SPEC_VERSION, VolumeSpec},
};
use tracing::warn;
use uuid::Uuid;

use crate::{
    durable,
    error::{Doing, Error, Result},
    paths::VolumePaths,
    programs::{Programs, run_well},
    progress::Progress,
    supervise::supervise,
    territory::Territory,
    volume::{Volume, lock},
};

/// Formatting, growing or deleting storage nodes ends within this time.
const NODES_WITHIN: Duration = Duration::from_secs(60);

/// Name of a directory that becomes a volume; no volume's name begins with a dot.
const NEW: &str = ".new-";
/// Name of a directory that was a volume.
const OLD: &str = ".old-";

/// What is chosen once, when a volume is made.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes; the only one that can be changed.
    pub size: u64,
    /// Stripe unit in bytes.
    pub stripe: u64,
    /// Bytes of the write buffer; 0: none.
    pub buffer: u64,
}

/// The volumes.
#[derive(Debug)]
pub struct Catalogue {
    directories: Directories,
    programs: Programs,
    volumes: Mutex<BTreeMap<VolumeName, Arc<Volume>>>,
    /// Those whose files could not be read, and why.
    damaged: BTreeMap<VolumeName, String>,
    /// Those that are being made.
    drafts: Mutex<BTreeMap<VolumeName, VolumeSpec>>,
    /// Held while places are looked at and entered, so that two wishes at once do not get one place.
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
            let text = file_name.to_str().unwrap_or_default();
            if text.starts_with(NEW)
                && let Err(e) = undo_creation(&entry.path(), &programs)
            {
                warn!("{e}");
            }
            if text.starts_with(OLD) {
                // A deletion that was interrupted: its data had gone before.
                let _ = fs::remove_dir_all(entry.path());
            }
            let Ok(name) = text.parse::<VolumeName>() else { continue };
            match Volume::load(&directories, name.clone(), programs.clone()) {
                Ok(volume) => {
                    volumes.insert(name, Arc::new(volume));
                }
                Err(e) => {
                    warn!(volume = %name, "left alone: {e}");
                    damaged.insert(name, e.to_string());
                }
            }
        }
        Ok(Self {
            directories,
            programs,
            volumes: Mutex::new(volumes),
            damaged,
            drafts: Mutex::default(),
            claims: Mutex::default(),
        })
    }

    /// All volumes, by name.
    pub fn all(&self) -> Vec<Arc<Volume>> {
        lock(&self.volumes).values().cloned().collect()
    }

    /// One volume.
    ///
    /// # Errors
    /// There is none, or its files are damaged.
    pub fn get(&self, name: &VolumeName) -> Result<Arc<Volume>> {
        lock(&self.volumes).get(name).cloned().ok_or_else(|| match self.damaged.get(name) {
            Some(why) => Error::Failed(format!("volume {name} cannot be used: {why}")),
            None => Error::NotFound(name.to_string()),
        })
    }

    /// Has nobody else claim places until the result is dropped; what was claimed is in a volume's record, or a draft, by then.
    pub fn claim(&self) -> MutexGuard<'_, ()> {
        lock(&self.claims)
    }

    /// What volumes have of the file system.
    pub fn territory(&self) -> Territory {
        let volumes = self.all().into_iter().map(|volume| (volume.spec(), volume.attachment()));
        let drafts: Vec<_> = lock(&self.drafts).values().map(|spec| (spec.clone(), None)).collect();
        Territory::of(&volumes.chain(drafts).collect::<Vec<_>>())
    }

    /// Makes a volume: formats its storage nodes, then enters it.
    ///
    /// # Errors
    /// Why not; nothing is entered then.
    pub fn create(
        &self,
        name: VolumeName,
        shape: Shape,
        nodes: Vec<NodeUrl>,
        progress: &Progress,
    ) -> Result<Arc<Volume>> {
        let Shape { size, stripe, buffer } = shape;
        let nodes = nodes.into_iter().map(|url| NodeSpec { url, uuid: Uuid::new_v4() }).collect();
        let (spec_version, uuid) = (SPEC_VERSION, Uuid::new_v4());
        let spec = VolumeSpec { spec_version, name: name.clone(), uuid, size, stripe, buffer, nodes };
        spec.validate().map_err(|e| Error::BadRequest(e.to_string()))?;
        let paths = VolumePaths::new(&self.directories, &name);
        paths.check_sockets().map_err(Error::BadRequest)?;
        if paths.state.exists() {
            return Err(Error::State(format!(
                "there is a volume {name} already: choose another name or `everdisk volume delete {name}`"
            )));
        }
        let mut draft = Draft::new(self, &spec)?;
        let text = serde_json::to_vec_pretty(&spec).map_err(|e| Error::Failed(e.to_string()))?;
        let file = draft.path.join("volume.json");
        durable::write(&file, &text).doing(|| format!("write {}", file.display()))?;
        progress.step("format the storage nodes");
        let arguments = ["--volume".into(), file.into_os_string(), "--create".into()];
        if let Err(e) = run_well(&self.programs.core(), &arguments, NODES_WITHIN) {
            // A core that ended by itself has undone what it did.
            draft.unclear = matches!(e, Error::Killed(_));
            return Err(e);
        }
        fs::rename(&draft.path, &paths.state).doing(|| format!("make {}", paths.state.display()))?;
        durable::sync_dir(&self.directories.state.join("volumes")).doing(|| "make it durable".to_owned())?;
        let volume = Arc::new(Volume::load(&self.directories, name.clone(), self.programs.clone())?);
        supervise(&volume).doing(|| "start a thread".to_owned())?;
        lock(&self.volumes).insert(name, Arc::clone(&volume));
        Ok(volume)
    }

    /// Makes a detached volume larger.
    ///
    /// # Errors
    /// Why not.
    pub fn resize(&self, name: &VolumeName, size: u64, progress: &Progress) -> Result<Arc<Volume>> {
        let volume = self.get(name)?;
        let _operation = volume.begin("resize")?;
        refuse_attached(&volume, "resized")?;
        let mut spec = volume.spec();
        if size < spec.size {
            return Err(Error::State(format!(
                "volume {name} has {} bytes and can only grow: data would be lost",
                spec.size
            )));
        }
        spec.size = size;
        spec.validate().map_err(|e| Error::BadRequest(e.to_string()))?;
        progress.step("grow the storage nodes");
        let arguments =
            ["--volume".into(), volume.paths.spec().into_os_string(), "--resize".into(), size.to_string().into()];
        run_well(&self.core_of(&volume), &arguments, NODES_WITHIN)?;
        volume.set_spec(spec)?;
        Ok(volume)
    }

    /// Deletes a detached volume, its data first.
    ///
    /// # Errors
    /// Why not; the volume stays then.
    pub fn delete(&self, name: &VolumeName, progress: &Progress) -> Result<()> {
        let volume = self.get(name)?;
        let _operation = volume.begin("delete")?;
        refuse_attached(&volume, "deleted")?;
        progress.step("delete the data");
        let arguments = ["--volume".into(), volume.paths.spec().into_os_string(), "--destroy".into()];
        run_well(&self.core_of(&volume), &arguments, NODES_WITHIN)?;
        volume.deleted.store(true, Ordering::Relaxed);
        lock(&self.volumes).remove(name);
        let state = &volume.paths.state;
        // Out of the way at once; what a crash leaves of it is cleared at the next start.
        let grave = self.directories.state.join("volumes").join(format!("{OLD}{name}"));
        let _ = fs::remove_dir_all(&grave);
        fs::rename(state, &grave).doing(|| format!("remove {}", state.display()))?;
        let _ = durable::sync_dir(&self.directories.state.join("volumes"));
        fs::remove_dir_all(&grave).doing(|| format!("remove {}", grave.display()))?;
        let _ = fs::remove_dir_all(&volume.paths.run);
        Ok(())
    }

    /// The program a volume was last attached with knows its layout best.
    fn core_of(&self, volume: &Volume) -> PathBuf {
        volume.record().current.map_or_else(|| self.programs.core(), |build| build.program)
    }
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
        let arguments = ["--volume".into(), spec.into_os_string(), "--destroy".into()];
        run_well(&programs.core(), &arguments, NODES_WITHIN).map_err(|e| {
            Error::Failed(format!(
                "the creation of a volume was interrupted and cannot be undone: {e}; mend that, or remove {}, which \
                 says what its storage nodes were to be",
                draft.display()
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
            if lock(&catalogue.drafts).contains_key(&name) {
                return Err(Error::State(format!("a volume {name} is being made at this moment")));
            }
            catalogue.territory().refuse_nodes(spec)?;
            lock(&catalogue.drafts).insert(name.clone(), spec.clone());
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
            let _ = fs::remove_dir_all(&self.path);
        } else if let Err(e) = undo_creation(&self.path, &self.catalogue.programs) {
            warn!(volume = %self.name, "{e}");
        }
        lock(&self.catalogue.drafts).remove(&self.name);
    }
}

#[cfg(test)]
mod tests;
