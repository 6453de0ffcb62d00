//! One volume as the control module has it: its description, its record, and the operation that may act on it now.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use everdisk_api::{directories::Directories, operation::OperationName};
use everdisk_proto::{identity::Build, ids::VolumeName, node::NodeState, volume::VolumeSpec};
use parking_lot::{Condvar, Mutex};
use tracing::warn;
use uuid::Uuid;

use crate::{
    child::Child,
    durable,
    error::{Doing, Error, Result},
    paths::VolumePaths,
    peers::{Core, Interface},
    process::ProcessId,
    programs::Programs,
    record::{Attachment, VolumeRecord},
};

/// A volume.
#[derive(Debug)]
pub struct Volume {
    /// Its name.
    pub name: VolumeName,
    /// Its files.
    pub paths: VolumePaths,
    /// The programs it is run with.
    pub programs: Programs,
    interface_socket: PathBuf,
    spec: Mutex<VolumeSpec>,
    record: Mutex<VolumeRecord>,
    operation: Mutex<Option<Running>>,
    /// Signalled when an operation ends.
    ended: Condvar,
    /// Held by the supervisor for each of its passes, and by every operation that must not run beside a pass.
    pub hands: Mutex<()>,
    kicked: Mutex<bool>,
    kick: Condvar,
    /// The operator wants the old core back.
    pub rollback_wanted: AtomicBool,
    /// Why the volume does not serve, as the supervisor sees it.
    trouble: Mutex<Option<String>>,
    /// What the operator must know although the volume may serve.
    warning: Mutex<Option<String>>,
    /// Why there is no standby, as the supervisor sees it.
    standby_trouble: Mutex<Option<String>>,
    /// Why the record could not be written the last time.
    record_trouble: Mutex<Option<String>>,
    /// Cores that do not answer, and since when.
    pub silent: Mutex<HashMap<u32, Instant>>,
    /// Storage nodes that are not in step, as a core found them that serves no longer, perhaps.
    pub nodes: Mutex<HashMap<Uuid, KnownNode>>,
    /// The number of the FUSE connection of a file that a detach has unmounted and found in use elsewhere.
    pub served_elsewhere: Mutex<Option<u32>>,
    /// Since when there has always been something in the write buffer, as far as it was seen.
    unflushed_since: Mutex<Option<SystemTime>>,
    /// The processes that were started by this one: how they end is known.
    children: Mutex<Vec<Child>>,
    /// The volume was deleted: its supervisor ends.
    pub deleted: AtomicBool,
}

/// Once the list has this many processes, ended ones are dropped from it.
const CHILDREN_KEPT: usize = 32;

/// What a core has found out about a storage node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownNode {
    /// Process id of the core.
    pub core: u32,
    /// Its state, which is not [`NodeState::InStep`].
    pub state: NodeState,
    /// The error.
    pub error: Option<String>,
}

/// An operation that has the volume.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// Its name.
    pub name: OperationName,
    /// Since when.
    pub since: Instant,
}

/// Reads a volume's description.
///
/// # Errors
/// It is missing or damaged.
pub fn read_spec(paths: &VolumePaths, name: &VolumeName) -> Result<VolumeSpec> {
    let file = paths.spec();
    let damaged = |why: String| Error::Failed(format!("{} is damaged: {why}", file.display()));
    let text = durable::read(&file)
        .doing(|| format!("read {}", file.display()))?
        .ok_or_else(|| Error::NotFound(name.to_string()))?;
    let spec: VolumeSpec = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
    spec.validate().map_err(|e| damaged(e.to_string()))?;
    if spec.name == *name { Ok(spec) } else { Err(damaged(format!("it is that of volume {}", spec.name))) }
}

impl Volume {
    /// Reads a volume's files.
    ///
    /// # Errors
    /// They are missing or damaged.
    pub fn load(directories: &Directories, name: VolumeName, programs: Programs) -> Result<Self> {
        let paths = VolumePaths::new(directories, &name);
        let spec = read_spec(&paths, &name)?;
        let mut record = VolumeRecord::load(&paths.record())?;
        let home = paths.home();
        if record.attachment.as_ref().is_some_and(|attachment| attachment.home.is_some() && attachment.home != home) {
            warn!(volume = %name, "the state directory is a copy: the attachment in it belongs to the original");
            record.attachment = None;
        }
        Ok(Self {
            name,
            interface_socket: paths.interface_socket(),
            paths,
            programs,
            spec: Mutex::new(spec),
            record: Mutex::new(record),
            operation: Mutex::new(None),
            ended: Condvar::new(),
            hands: Mutex::new(()),
            kicked: Mutex::new(false),
            kick: Condvar::new(),
            rollback_wanted: AtomicBool::new(false),
            trouble: Mutex::new(None),
            warning: Mutex::new(None),
            standby_trouble: Mutex::new(None),
            record_trouble: Mutex::new(None),
            silent: Mutex::default(),
            nodes: Mutex::default(),
            served_elsewhere: Mutex::new(None),
            unflushed_since: Mutex::new(None),
            children: Mutex::new(Vec::new()),
            deleted: AtomicBool::new(false),
        })
    }

    /// The description.
    pub fn spec(&self) -> VolumeSpec {
        self.spec.lock().clone()
    }

    /// Replaces the description, durably.
    ///
    /// # Errors
    /// The operating system's.
    pub fn set_spec(&self, spec: VolumeSpec) -> Result<()> {
        let text = serde_json::to_vec_pretty(&spec).map_err(|e| Error::Failed(e.to_string()))?;
        durable::write(&self.paths.spec(), &text).doing(|| "write the volume's description".to_owned())?;
        *self.spec.lock() = spec;
        Ok(())
    }

    /// The record.
    pub fn record(&self) -> VolumeRecord {
        self.record.lock().clone()
    }

    /// Changes the record, durably, or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn update<T>(&self, change: impl FnOnce(&mut VolumeRecord) -> T) -> Result<T> {
        let mut record = self.record.lock();
        let mut changed = record.clone();
        let result = change(&mut changed);
        if changed != *record {
            self.note_record(changed.save(&self.paths.record()))?;
            *record = changed;
        }
        Ok(result)
    }

    fn note_record(&self, saved: Result<()>) -> Result<()> {
        *self.record_trouble.lock() = saved.as_ref().err().map(ToString::to_string);
        saved
    }

    /// Why the record could not be written the last time.
    pub fn record_trouble(&self) -> Option<String> {
        self.record_trouble.lock().clone()
    }

    /// Checks whether the record can be written again.
    pub fn retry_record(&self) {
        if self.record_trouble().is_some() {
            let _ = self.rewrite_record();
        }
    }

    /// Writes the record once more as it is: what a failed [`Volume::update`] left in its place is not known.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn rewrite_record(&self) -> Result<()> {
        let record = self.record.lock();
        self.note_record(record.save(&self.paths.record()))
    }

    /// As [`Volume::update`], for the attachment.
    ///
    /// # Errors
    /// There is none, or it cannot be written.
    pub fn update_attachment<T>(&self, change: impl FnOnce(&mut Attachment) -> T) -> Result<T> {
        self.update(|record| record.attachment.as_mut().map(change))?.ok_or_else(|| self.not_attached())
    }

    /// The attachment of this boot.
    pub fn attachment(&self) -> Option<Attachment> {
        self.record().attachment.filter(Attachment::of_this_boot)
    }

    /// The attachment of this boot, which has to be there.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn attached(&self) -> Result<Attachment> {
        self.attachment().ok_or_else(|| self.not_attached())
    }

    fn not_attached(&self) -> Error {
        Error::State(format!(
            "volume {0} is not attached: `everdisk attach {0} --file PATH` or --nbd ADDRESS",
            self.name
        ))
    }

    /// The core program in use.
    ///
    /// # Errors
    /// There is none yet.
    pub fn current(&self) -> Result<Build> {
        self.record().current.ok_or_else(|| self.not_attached())
    }

    /// Its interface.
    pub fn interface(&self) -> Interface<'_> {
        Interface(&self.interface_socket)
    }

    /// Asks one of its cores.
    pub fn with_core<T>(&self, pid: u32, ask: impl FnOnce(Core<'_>) -> T) -> T {
        ask(Core(&self.paths.core_socket(pid)))
    }

    /// Takes the volume for an operation.
    ///
    /// # Errors
    /// [`Error::Busy`].
    pub fn begin(self: &Arc<Self>, name: OperationName) -> Result<Operation> {
        let mut operation = self.operation.lock();
        if let Some(running) = *operation {
            return Err(Error::Busy {
                volume: self.name.to_string(),
                operation: running.name.text(),
                seconds: running.since.elapsed().as_secs(),
            });
        }
        if self.deleted.load(Ordering::Relaxed) {
            return Err(Error::NotFound(self.name.to_string()));
        }
        // Here, before any other thread sees the operation: a wish that comes for it later is not lost.
        self.rollback_wanted.store(false, Ordering::Relaxed);
        *operation = Some(Running { name, since: Instant::now() });
        Ok(Operation { volume: Arc::clone(self) })
    }

    /// The operation that has the volume.
    pub fn running(&self) -> Option<Running> {
        *self.operation.lock()
    }

    /// Waits until the operation `name` has ended.
    pub fn wait_end_of(&self, name: OperationName) {
        let mut operation = self.operation.lock();
        while operation.is_some_and(|running| running.name == name) {
            self.ended.wait_for(&mut operation, Duration::from_millis(200));
        }
    }

    /// Has the supervisor make its next pass at once.
    pub fn kick(&self) {
        *self.kicked.lock() = true;
        self.kick.notify_all();
    }

    /// The supervisor waits here.
    pub fn wait_kick(&self, limit: Duration) {
        let mut kicked = self.kicked.lock();
        self.kick.wait_while_for(&mut kicked, |kicked| !*kicked, limit);
        *kicked = false;
    }

    /// Why the volume does not serve.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().clone()
    }

    /// Says why, or that there is no trouble.
    pub fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock() = trouble;
    }

    /// Why there is no standby.
    pub fn standby_trouble(&self) -> Option<String> {
        self.standby_trouble.lock().clone()
    }

    /// Says why, or that there is one.
    pub fn set_standby_trouble(&self, trouble: Option<String>) {
        *self.standby_trouble.lock() = trouble;
    }

    /// What the operator must know although the volume may serve.
    pub fn warning(&self) -> Option<String> {
        self.warning.lock().clone()
    }

    /// Says it, or that there is nothing.
    pub fn set_warning(&self, warning: Option<String>) {
        *self.warning.lock() = warning;
    }

    /// Since when there has always been something in the write buffer: what was written before is on the storage nodes.
    pub fn unflushed_since(&self) -> Option<SystemTime> {
        *self.unflushed_since.lock()
    }

    /// Notes the number of bytes that are in the write buffer now.
    pub fn saw_buffered(&self, bytes: u64) {
        let mut since = self.unflushed_since.lock();
        *since = (bytes > 0).then(|| since.unwrap_or_else(SystemTime::now));
    }

    /// Keeps a process that was started. How it ended is asked a moment after its end: of those that have ended the last few are kept.
    pub fn keep_child(&self, child: &Child) {
        let mut children = self.children.lock();
        while children.len() >= CHILDREN_KEPT
            && let Some(oldest) = children.iter().position(|kept| kept.ended().is_some())
        {
            children.remove(oldest);
        }
        children.push(child.clone());
    }

    /// A process that was started by this one.
    pub fn child(&self, process: ProcessId) -> Option<Child> {
        self.children.lock().iter().find(|child| child.id == process).cloned()
    }
}

/// The volume is taken while this lives.
#[derive(Debug)]
pub struct Operation {
    volume: Arc<Volume>,
}

impl Drop for Operation {
    fn drop(&mut self) {
        *self.volume.operation.lock() = None;
        self.volume.ended.notify_all();
        self.volume.kick();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use super::*;

    /// A volume in `root` with one storage node.
    pub(crate) fn volume(root: &Path) -> Arc<Volume> {
        let directories = Directories { run: root.join("run"), state: root.join("state") };
        let name: VolumeName = "v".parse().unwrap();
        let paths = VolumePaths::new(&directories, &name);
        durable::make_dir(&paths.state).unwrap();
        paths.make_run().unwrap();
        let text = include_str!("../../../proto/golden/volume-v1.json");
        durable::write(&paths.spec(), text.as_bytes()).unwrap();
        let programs = Programs::find().unwrap();
        Arc::new(Volume::load(&directories, name, programs).unwrap())
    }

    /// A copy of a state directory gives no right to end what the original serves.
    #[test]
    fn an_attachment_in_a_copied_state_directory_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let mut attachment = crate::record::tests::attachment();
        attachment.home = volume.paths.home();
        volume.update(|record| record.attachment = Some(attachment)).unwrap();
        let load = |root: &Path| {
            let directories = Directories { run: root.join("run"), state: root.join("state") };
            Volume::load(&directories, volume.name.clone(), volume.programs.clone()).unwrap().record().attachment
        };
        assert!(load(dir.path()).is_some());
        let copy = dir.path().join("copy");
        let state = copy.join("state/volumes/v");
        durable::make_dir(&state).unwrap();
        for file in ["volume.json", "state.json"] {
            std::fs::copy(volume.paths.state.join(file), state.join(file)).unwrap();
        }
        assert_eq!(load(&copy), None);
    }

    #[test]
    fn one_operation_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let first = volume.begin(OperationName::Upgrade).unwrap();
        let refused = volume.begin(OperationName::Detach).unwrap_err().to_string();
        assert!(refused.contains("another operation is running on v: upgrade since 0 s"), "{refused}");
        drop(first);
        assert!(volume.begin(OperationName::Detach).is_ok());
    }

    #[test]
    fn a_volume_without_an_attachment_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        assert!(volume.attached().unwrap_err().to_string().contains("everdisk attach v --file"));
        assert!(volume.update_attachment(|_| ()).is_err());
        volume.update(|record| record.last_upgrade = None).unwrap();
        assert!(!volume.paths.record().exists(), "nothing changed, nothing written");
    }
}
