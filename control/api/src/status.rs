//! What `status` and the volume commands show.

use std::path::Path;

use everdisk_proto::{
    frame::{NbdStatus, NodeStatus},
    nbd::NbdAddress,
    node::NodeState,
    version::VersionRange,
    volume::{Timeouts, VolumeSpec},
};
use everdisk_upgrade::{policy::Handover, report::Report};
use serde::{Deserialize, Serialize};

/// State of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// I/O is executed.
    Serving,
    /// I/O is held by the operator's command.
    Suspended,
    /// An upgrade or a rollback runs; I/O goes on.
    Upgrading,
    /// A core or the interface has died and is being replaced.
    Recovering,
    /// No front end.
    Detached,
    /// Core and interface are gone: attach again, or detach.
    Failed,
}

impl State {
    /// As in the JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Suspended => "suspended",
            Self::Upgrading => "upgrading",
            Self::Recovering => "recovering",
            Self::Detached => "detached",
            Self::Failed => "failed",
        }
    }
}

/// How well a volume is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Nothing is wrong.
    #[default]
    Ok,
    /// I/O goes on, but there is a problem.
    Degraded,
    /// I/O does not go on.
    Failed,
}

impl Health {
    /// As in the JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
        }
    }
}

/// When a write is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WriteMode {
    /// Once it is buffered.
    WriteBack,
    /// Once the storage nodes have it.
    Synchronous,
    /// A mode of a later version.
    #[serde(other)]
    Unknown,
}

impl WriteMode {
    /// As in the JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::WriteBack => "write-back",
            Self::Synchronous => "synchronous",
            Self::Unknown => "unknown",
        }
    }
}

/// How applications reach a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrontendKind {
    /// As a file.
    File,
    /// As an NBD export.
    Nbd,
    /// By something of a later version.
    #[serde(other)]
    Unknown,
}

impl FrontendKind {
    /// As in the JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Nbd => "nbd",
            Self::Unknown => "unknown",
        }
    }
}

/// Everything about a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: State,
    /// How well it is.
    #[serde(default)]
    pub health: Health,
    /// What is wrong, one sentence each.
    #[serde(default)]
    pub problems: Vec<String>,
    /// Bytes.
    pub size: u64,
    /// When a write is acknowledged.
    pub mode: WriteMode,
    /// Generation in force; 0 when detached.
    pub generation: u64,
    /// The core that serves.
    pub core: Option<Program>,
    /// A core that is ready to take over.
    pub standby: Option<Program>,
    /// The interface.
    pub interface: Option<Program>,
    /// The control module.
    #[serde(default)]
    pub daemon: Option<Program>,
    /// ABI of the volume's segment; none when detached, and while the interface does not answer.
    #[serde(default)]
    pub segment_abi: Option<u32>,
    /// Where applications reach the volume.
    pub frontends: Vec<Frontend>,
    /// Acknowledged bytes that are not on the storage nodes yet.
    pub buffered_bytes: u64,
    /// Bytes that the write buffer holds at most; 0 when the volume has none.
    pub buffer_bytes: u64,
    /// How long requests wait for storage nodes.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// Ranges of the volume whose buffered data was found damaged: they cannot be read until they are written anew.
    pub damaged_ranges: u32,
    /// Requests being executed.
    pub in_flight: u32,
    /// Requests that the kernel has and that are not answered.
    pub waiting: Option<u64>,
    /// The storage nodes.
    pub nodes: Vec<Node>,
    /// The last upgrade that ended.
    pub last_upgrade: Option<Report>,
    /// Deaths of a serving core that were survived since the attach.
    pub crashes_survived: u64,
    /// Until a suspension ends by itself.
    pub lease_ms: Option<u64>,
    /// The operation that runs.
    pub operation: Option<String>,
    /// Every core that runs for the volume.
    pub cores: Vec<Program>,
    /// The reason for a state that is not the normal one.
    pub reason: Option<String>,
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Process id.
    pub pid: u32,
    /// Version of its program.
    pub version: String,
    /// ABI versions of the segments that it works with; none where an interface of ABI 3 or before does not tell.
    #[serde(default)]
    pub abi: Option<VersionRange>,
    /// SHA-256 of its program; none where an earlier control module did not record it.
    #[serde(default)]
    pub build: Option<String>,
}

/// Where applications reach a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frontend {
    /// What it is.
    pub kind: FrontendKind,
    /// Path of the file; `unix:PATH` or `tcp:HOST:PORT`.
    pub address: String,
    /// Of `nbd`: clients that are connected. This and the following are missing while the interface does not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
    /// Of `nbd`: connections that were taken since the attach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted: Option<u64>,
    /// Of `nbd`: times that an established connection went on in another core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub carried: Option<u64>,
    /// Of `nbd`: connections that were closed because it was unknown where in their streams a core had ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<u64>,
}

impl Frontend {
    /// A file.
    pub fn file(path: &Path) -> Self {
        Self::new(FrontendKind::File, path.display().to_string())
    }

    /// An address for NBD clients, of which nothing else is known.
    pub fn nbd(address: &NbdAddress) -> Self {
        Self::new(FrontendKind::Nbd, address.to_string())
    }

    fn new(kind: FrontendKind, address: String) -> Self {
        Self { kind, address, connections: None, accepted: None, carried: None, broken: None }
    }
}

impl From<&NbdStatus> for Frontend {
    fn from(seen: &NbdStatus) -> Self {
        Self {
            connections: Some(seen.connections),
            accepted: Some(seen.accepted),
            carried: Some(seen.carried),
            broken: Some(seen.broken),
            ..Self::nbd(&seen.address)
        }
    }
}

/// A storage node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its address.
    pub url: String,
    /// Its identity.
    pub uuid: uuid::Uuid,
    /// Its state; unknown while no core can be asked.
    pub state: NodeState,
    /// Bytes it lacks.
    pub missed_bytes: u64,
    /// The last error, in words.
    pub error: Option<String>,
}

impl From<NodeStatus> for Node {
    fn from(node: NodeStatus) -> Self {
        Self { url: node.url, uuid: node.uuid, state: node.state, missed_bytes: 0, error: node.error }
    }
}

/// A line of `volume list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeLine {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Its state.
    pub state: State,
    /// Number of storage nodes.
    pub nodes: usize,
    /// Why it cannot be used, where its files are damaged; then nothing else is known of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// `volume show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeDescription {
    /// As it was created.
    #[serde(flatten)]
    pub spec: VolumeSpec,
    /// Its state.
    pub state: State,
    /// Version of the core that it is attached with; none before the first attach.
    pub core_version: Option<String>,
    /// Version that `rollback` goes back to.
    pub previous_core_version: Option<String>,
}

/// What `upgrade --plan` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradePlan {
    /// The volume.
    pub volume: String,
    /// Version of the core that serves.
    pub from: String,
    /// Version of the new one.
    pub to: String,
    /// Hand-over policy.
    pub handover: Handover,
    /// What was checked.
    pub checks: Vec<String>,
    /// What would be done.
    pub steps: Vec<PlannedStep>,
}

/// A step of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedStep {
    /// Its name.
    pub step: String,
    /// How long it may take, ms.
    pub deadline_ms: u64,
    /// Whether it can be undone.
    pub reversible: bool,
    /// What undoes it.
    pub undo: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_kinds_have_the_agreed_names_and_those_of_a_later_version_are_unknown() {
        let text = |name: &str| format!("\"{name}\"");
        for mode in [WriteMode::WriteBack, WriteMode::Synchronous, WriteMode::Unknown] {
            assert_eq!(serde_json::to_string(&mode).unwrap(), text(mode.name()));
            assert_eq!(serde_json::from_str::<WriteMode>(&text(mode.name())).unwrap(), mode);
        }
        for kind in [FrontendKind::File, FrontendKind::Nbd, FrontendKind::Unknown] {
            assert_eq!(serde_json::to_string(&kind).unwrap(), text(kind.name()));
            assert_eq!(serde_json::from_str::<FrontendKind>(&text(kind.name())).unwrap(), kind);
        }
        assert_eq!(serde_json::from_str::<WriteMode>("\"write-around\"").unwrap(), WriteMode::Unknown);
        assert_eq!(serde_json::from_str::<FrontendKind>("\"ublk\"").unwrap(), FrontendKind::Unknown);
    }

    #[test]
    fn front_ends_have_the_agreed_form() {
        let shown = |frontend: &Frontend| serde_json::to_string(frontend).unwrap();
        assert_eq!(shown(&Frontend::file(Path::new("/srv/v.img"))), r#"{"kind":"file","address":"/srv/v.img"}"#);
        let address: NbdAddress = "unix:/run/v.sock".parse().unwrap();
        assert_eq!(shown(&Frontend::nbd(&address)), r#"{"kind":"nbd","address":"unix:/run/v.sock"}"#);
        let seen =
            Frontend::from(&NbdStatus { address, bound: None, connections: 1, accepted: 4, carried: 2, broken: 0 });
        let text = r#"{"kind":"nbd","address":"unix:/run/v.sock","connections":1,"accepted":4,"carried":2,"broken":0}"#;
        assert_eq!(shown(&seen), text);
        assert_eq!(serde_json::from_str::<Frontend>(text).unwrap(), seen);
    }
}
