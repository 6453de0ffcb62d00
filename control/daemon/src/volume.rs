//! One volume as the control module has it.

mod children;
mod files;
mod findings;
mod operations;
mod supervision;

use std::{path::PathBuf, sync::Arc};

use everdisk_api::{directories::Directories, operation::OperationName};
use everdisk_proto::{identity::Build, ids::VolumeName, volume::VolumeSpec};
use tracing::warn;

use self::{children::Children, files::Files, findings::Findings, operations::Operations, supervision::Supervision};
pub use self::{files::read_spec, operations::Running};
use crate::{
    error::{Doing, Error, Result},
    paths::VolumePaths,
    peers::{Core, Interface},
    programs::Programs,
    record::{Attachment, VolumeRecord},
};

/// A volume.
#[derive(Debug)]
pub struct Volume {
    /// Its name.
    pub name: VolumeName,
    /// Where its files are.
    pub paths: VolumePaths,
    /// The programs it is run with.
    pub programs: Programs,
    /// Its description and its record.
    pub files: Files,
    /// The operation that has it.
    pub operations: Operations,
    /// The hands of its supervisor.
    pub supervision: Supervision,
    /// What was observed of it.
    pub findings: Findings,
    /// Its processes that were started by this one.
    pub children: Children,
    interface_socket: PathBuf,
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
        let of = record.attachment.as_ref().and_then(|attachment| attachment.home);
        // Where there is nothing to compare, nothing is asked that could fail.
        let home = of.map(|_| paths.home()).transpose().doing(|| format!("examine {}", paths.state.display()))?;
        if of != home {
            warn!(volume = %name, "the state directory is a copy: the attachment in it belongs to the original");
            record.attachment = None;
        }
        Ok(Self {
            name,
            programs,
            files: Files::new(&paths, spec, record),
            operations: Operations::default(),
            supervision: Supervision::default(),
            findings: Findings::default(),
            children: Children::default(),
            interface_socket: paths.interface_socket(),
            paths,
        })
    }

    /// The description.
    pub fn spec(&self) -> VolumeSpec {
        self.files.spec()
    }

    /// Replaces the description, durably.
    ///
    /// # Errors
    /// The operating system's.
    pub fn set_spec(&self, spec: VolumeSpec) -> Result<()> {
        self.files.set_spec(spec)
    }

    /// The record.
    pub fn record(&self) -> VolumeRecord {
        self.files.record()
    }

    /// Changes the record, durably, or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn update<T>(&self, change: impl FnOnce(&mut VolumeRecord) -> T) -> Result<T> {
        self.files.update(change)
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
        self.operations.begin(&self.name, name)?;
        Ok(Operation { volume: Arc::clone(self) })
    }
}

/// The volume is taken while this lives.
#[derive(Debug)]
pub struct Operation {
    volume: Arc<Volume>,
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.volume.operations.end();
        self.volume.supervision.kick();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use super::*;
    use crate::durable;

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
        attachment.home = Some(volume.paths.home().unwrap());
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
