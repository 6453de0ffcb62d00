//! `state.json`: what the control module remembers of a volume. Everything else it asks the processes.

use std::path::PathBuf;

use everdisk_api::LastUpgrade;
use everdisk_proto::{
    file_id::FileId,
    frame::{FileAttach, NbdListen, NbdStatus},
    identity::Build,
};
use serde::{Deserialize, Serialize};

use crate::{
    durable,
    error::{Doing, Error, Result},
    nodes::NodesRecord,
    process::{ProcessId, boot_id},
};

/// Version of the file that is written. Since version 2 it has the interface's program, and the component of each program.
pub const RECORD_VERSION: u32 = 2;
/// The oldest version that is read.
const RECORD_VERSION_MIN: u32 = 1;

/// The file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// [`RECORD_VERSION`].
    pub record_version: u32,
    /// The core program in use; none before the first attach.
    pub current: Option<Build>,
    /// The one before.
    pub previous: Option<Build>,
    /// The interface program in use; none before the first attach, and after one by a control module of record version 1.
    #[serde(default)]
    pub interface: Option<Build>,
    /// While attached.
    pub attachment: Option<Attachment>,
    /// The last upgrade that ended.
    pub last_upgrade: Option<LastUpgrade>,
    /// What is known of an upgrade that has switched and not ended.
    pub unfinished: Option<LastUpgrade>,
    /// Work on the storage nodes.
    #[serde(default, skip_serializing_if = "NodesRecord::is_empty")]
    pub nodes: NodesRecord,
}

/// An attach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The boot it was made in; in another one nothing of it is left.
    pub boot_id: String,
    /// Where it is.
    pub phase: Phase,
    /// The file front end.
    pub file: Option<FileAttach>,
    /// Where NBD clients are awaited.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nbd: Vec<NbdListen>,
    /// The file was made for it.
    pub created_file: bool,
    /// The interface.
    pub interface: Option<ProcessId>,
    /// Every core that was started and was not seen gone.
    pub cores: Vec<KnownCore>,
    /// Cores started so far.
    pub started: u64,
    /// The directory in which this record was written: a copy of the record gives no right to end these processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<FileId>,
}

/// Where an attach is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Under way.
    Attaching,
    /// Done.
    Attached,
    /// On its way out.
    Detaching,
}

/// A core that was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownCore {
    /// The process.
    pub process: ProcessId,
    /// Its program.
    pub program: PathBuf,
    /// SHA-256 of it; none where a control module of record version 1 started it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

impl Default for VolumeRecord {
    fn default() -> Self {
        Self {
            record_version: RECORD_VERSION,
            current: None,
            previous: None,
            interface: None,
            attachment: None,
            last_upgrade: None,
            unfinished: None,
            nodes: NodesRecord::default(),
        }
    }
}

impl Attachment {
    /// Where applications reach the volume, for people.
    pub fn places(&self) -> String {
        let file = self.file.iter().map(|file| file.path.display().to_string());
        file.chain(self.nbd.iter().map(|nbd| nbd.address.to_string())).collect::<Vec<_>>().join(", ")
    }

    /// The options of `everdisk attach` that name these places.
    pub fn options(&self) -> String {
        let file = self.file.iter().map(|file| format!("--file {}", file.path.display()));
        file.chain(self.nbd.iter().map(|nbd| format!("--nbd {}", nbd.address))).collect::<Vec<_>>().join(" ")
    }

    /// Its front ends are open, NBD as the interface says.
    pub fn opened(&mut self, seen: &[NbdStatus]) {
        self.phase = Phase::Attached;
        if seen.len() == self.nbd.len() {
            for (nbd, seen) in self.nbd.iter_mut().zip(seen) {
                nbd.address.clone_from(&seen.address);
                nbd.bound = seen.bound;
            }
        }
    }

    /// Whether it was made in this boot.
    pub fn of_this_boot(&self) -> bool {
        self.boot_id == boot_id()
    }

    /// Whether it is under way.
    pub fn is_being_made(&self) -> bool {
        self.phase == Phase::Attaching
    }

    /// Whether a process of it runs.
    pub fn lives(&self) -> bool {
        self.interface_alive() || self.live_cores().next().is_some()
    }

    /// Whether the interface runs.
    pub fn interface_alive(&self) -> bool {
        self.interface.is_some_and(ProcessId::alive)
    }

    /// Every process that was started and was not seen gone.
    pub fn processes(&self) -> Vec<ProcessId> {
        self.interface.into_iter().chain(self.cores.iter().map(|core| core.process)).collect()
    }

    /// The cores that run.
    pub fn live_cores(&self) -> impl Iterator<Item = &KnownCore> {
        self.cores.iter().filter(|core| core.process.alive())
    }

    /// The program of a core.
    pub fn program_of(&self, pid: u32) -> Option<&PathBuf> {
        self.cores.iter().find(|core| core.process.pid == pid).map(|core| &core.program)
    }
}

impl VolumeRecord {
    /// Reads a record; a missing file is an empty one.
    ///
    /// # Errors
    /// The file cannot be read, is damaged or of another version.
    pub fn load(path: &std::path::Path) -> Result<Self> {
        let Some(text) = durable::read(path).doing(|| format!("read {}", path.display()))? else {
            return Ok(Self::default());
        };
        let mut record: Self =
            serde_json::from_str(&text).map_err(|e| Error::Failed(format!("{} is damaged: {e}", path.display())))?;
        if !(RECORD_VERSION_MIN..=RECORD_VERSION).contains(&record.record_version) {
            return Err(Error::Failed(format!(
                "{} has version {}, this program reads {RECORD_VERSION_MIN} to {RECORD_VERSION}",
                path.display(),
                record.record_version
            )));
        }
        // It is written anew as what it is now.
        record.record_version = RECORD_VERSION;
        Ok(record)
    }

    /// Makes the record durable.
    ///
    /// # Errors
    /// The operating system's; the old one stands then.
    pub fn save(&self, path: &std::path::Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::Failed(e.to_string()))?;
        durable::write(path, &text).doing(|| format!("write {}", path.display()))
    }

    /// Digest of the program of a core that was started.
    pub fn digest_of(&self, pid: u32) -> Option<String> {
        let core = self.attachment.as_ref()?.cores.iter().find(|core| core.process.pid == pid)?;
        let on_record = || [&self.current, &self.previous].into_iter().flatten().find(|b| b.program == core.program);
        core.digest.clone().or_else(|| on_record()?.digest.clone())
    }

    /// Version of the current core, for people.
    pub fn current_version(&self) -> String {
        self.current.as_ref().map_or_else(|| "none".to_owned(), |build| build.identity.version.clone())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// As a control module of version 1 wrote it, and one of version 2.
    const GOLDEN_1: &str = include_str!("../golden/state-v1.json");
    const GOLDEN_2: &str = include_str!("../golden/state-v2.json");

    fn read(text: &str) -> VolumeRecord {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        std::fs::write(&path, text).unwrap();
        VolumeRecord::load(&path).unwrap()
    }

    /// An attachment to a file.
    pub(crate) fn attachment() -> Attachment {
        Attachment { cores: Vec::new(), interface: None, ..read(GOLDEN_1).attachment.unwrap() }
    }

    #[test]
    fn golden_record_of_version_2_reads_and_writes_the_same_bytes() {
        let record = read(GOLDEN_2);
        let interface = record.interface.as_ref().unwrap();
        assert_eq!(interface.identity.component, everdisk_proto::identity::Component::Interface);
        assert_eq!(record.digest_of(43).as_deref(), Some("bb"), "as it was started");
        assert_eq!(record.digest_of(42), None, "no core");
        assert_eq!(serde_json::to_string_pretty(&record).unwrap(), GOLDEN_2.trim_end());
    }

    #[test]
    fn golden_record_of_version_1_is_read_and_tells_of_cores_alone() {
        let record = read(GOLDEN_1);
        let attachment = record.attachment.clone().unwrap();
        assert_eq!((attachment.places().as_str(), attachment.options().as_str()), ("/srv/v", "--file /srv/v"));
        assert_eq!((record.record_version, record.interface.as_ref()), (RECORD_VERSION, None));
        assert_eq!(record.digest_of(43).as_deref(), Some("aa"), "of the program on record");
        let mut now = read(GOLDEN_2);
        now.interface = None;
        now.attachment.as_mut().unwrap().cores[0].digest = None;
        assert_eq!(record, now);
    }

    #[test]
    fn every_front_end_is_recorded_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let listen =
            |address: &str| NbdListen { address: address.parse().unwrap(), mode: 0o600, uid: 1, gid: 2, bound: None };
        let record = read(GOLDEN_2);
        let attachment = Attachment {
            file: None,
            nbd: vec![listen("unix:/run/v.sock"), listen("tcp:[::1]:10809")],
            ..record.attachment.clone().unwrap()
        };
        assert_eq!(attachment.places(), "unix:/run/v.sock, tcp:[::1]:10809");
        assert_eq!(attachment.options(), "--nbd unix:/run/v.sock --nbd tcp:[::1]:10809");
        let mut opened = attachment.clone();
        opened.opened(&[]);
        assert_eq!(opened, attachment, "an interface that says nothing changes nothing");
        let seen = |text: &str| NbdStatus {
            address: text.parse().unwrap(),
            bound: None,
            connections: 0,
            accepted: 0,
            carried: 0,
            broken: 0,
        };
        opened.opened(&[seen("unix:/run/v.sock"), seen("tcp:[::1]:4321")]);
        assert_eq!(opened.places(), "unix:/run/v.sock, tcp:[::1]:4321");
        let record = VolumeRecord { attachment: Some(attachment), ..record };
        record.save(&path).unwrap();
        assert_eq!(VolumeRecord::load(&path).unwrap(), record);
    }

    #[test]
    fn a_record_survives_and_a_damaged_or_newer_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        assert_eq!(VolumeRecord::load(&path).unwrap(), VolumeRecord::default());
        VolumeRecord::default().save(&path).unwrap();
        assert_eq!(VolumeRecord::load(&path).unwrap(), VolumeRecord::default());
        std::fs::write(&path, "{").unwrap();
        assert!(VolumeRecord::load(&path).unwrap_err().to_string().contains("damaged"));
        let newer = VolumeRecord { record_version: 3, ..VolumeRecord::default() };
        newer.save(&path).unwrap();
        assert!(VolumeRecord::load(&path).unwrap_err().to_string().contains("version 3"));
    }
}
