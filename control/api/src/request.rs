//! Requests to the control module.

use std::path::PathBuf;

use everdisk_proto::{
    ids::VolumeName,
    volume::{Bypass, NodeUrl, Timeouts},
};
use everdisk_upgrade::policy::Handover;
use serde::{Deserialize, Serialize};

use crate::frontends::{FileOptions, NbdOptions};

/// Longest request line in bytes, its newline included: 64 storage nodes with paths of 1 KiB fit.
pub const REQUEST_BYTES_MAX: usize = 64 * 1024;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Version of the control module.
    Version,
    /// Make a volume.
    VolumeCreate {
        /// Its name.
        name: VolumeName,
        /// Bytes.
        size: u64,
        /// Stripe unit in bytes.
        stripe: u64,
        /// Bytes of its write buffer; 0: it is always synchronous.
        buffer: u64,
        /// Whether writes may bypass the write buffer.
        #[serde(default)]
        bypass: Bypass,
        /// How long requests wait for storage nodes.
        #[serde(default, skip_serializing_if = "Timeouts::are_usual")]
        timeouts: Timeouts,
        /// Its storage nodes in the order of the layout.
        nodes: Vec<NodeUrl>,
        /// Make their directories too.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        create_dir: bool,
        /// Make it although an export of an NBD server is not empty.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
    },
    /// All volumes in short.
    VolumeList,
    /// One volume's description.
    VolumeShow {
        /// Its name.
        name: VolumeName,
    },
    /// Make a detached volume larger.
    VolumeResize {
        /// Its name.
        name: VolumeName,
        /// Bytes.
        size: u64,
    },
    /// Delete a detached volume and its data.
    VolumeDelete {
        /// Its name.
        name: VolumeName,
        /// Delete it even if storage nodes are missing.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
    },
    /// Put the files of a detached or damaged volume aside, and leave its storage nodes as they are.
    VolumeForget {
        /// Its name.
        name: VolumeName,
    },
    /// Serve a volume at these front ends, one at least.
    Attach {
        /// Its name.
        name: VolumeName,
        /// Mount it on a file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file: Option<FileOptions>,
        /// Await NBD clients there.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        nbd: Vec<NbdOptions>,
    },
    /// Give its front ends up.
    Detach {
        /// Its name.
        name: VolumeName,
        /// Detach it even if a front end is in use, or the data could not be flushed.
        force: bool,
        /// By force: even if data is given up, or users of a front end are cut off.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        yes: bool,
    },
    /// The status of one volume, or of all volumes.
    Status {
        /// None: every volume.
        name: Option<VolumeName>,
    },
    /// Make everything acknowledged durable on the storage nodes.
    Flush {
        /// The volume.
        name: VolumeName,
    },
    /// Hold all I/O.
    Suspend {
        /// The volume.
        name: VolumeName,
        /// I/O goes on by itself after this time.
        lease_ms: u64,
    },
    /// Let I/O go on.
    Resume {
        /// The volume.
        name: VolumeName,
    },
    /// Replace the core.
    Upgrade {
        /// The volume.
        name: VolumeName,
        /// Absolute path of the new program.
        core: PathBuf,
        /// What happens to buffered data.
        handover: Handover,
        /// Time limit for the flush of [`Handover::Flush`].
        flush_limit_ms: u64,
        /// Time limit for drain and probe together.
        pause_budget_ms: u64,
        /// How long the old core stays parked.
        soak_ms: u64,
        /// Only check, and say what would be done.
        plan: bool,
    },
    /// Go back to the core before.
    Rollback {
        /// The volume.
        name: VolumeName,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_tagged_objects_and_strangers_are_refused() {
        let text = r#"{"op":"detach","name":"v","force":true}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert_eq!(request, Request::Detach { name: "v".parse().unwrap(), force: true, yes: false });
        assert_eq!(serde_json::to_string(&request).unwrap(), text);
        let text = r#"{"op":"upgrade","name":"v","core":"/c","handover":"carry","flush_limit_ms":30000,"pause_budget_ms":100,"soak_ms":0,"plan":false}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert!(matches!(request, Request::Upgrade { handover: Handover::Carry, .. }));
        assert_eq!(serde_json::to_string(&request).unwrap(), text);
        let text = r#"{"op":"attach","name":"v","nbd":[{"address":"unix:/run/v.sock","mode":384,"owner":null}]}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        assert!(matches!(&request, Request::Attach { file: None, nbd, .. } if nbd.len() == 1));
        assert_eq!(serde_json::to_string(&request).unwrap(), text);
        for bad in [r#"{"op":"format"}"#, r#"{"op":"detach","name":"../x","force":true}"#, "[]", "{}"] {
            assert!(serde_json::from_str::<Request>(bad).is_err(), "{bad}");
        }
    }
}
