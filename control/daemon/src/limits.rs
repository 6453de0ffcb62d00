//! The resource limits that the processes of a volume need. They inherit the limits of this process, which has raised them
//! as far as it may. A limit that is too low is reported before anything is started.

use everdisk_proto::{
    limits::{BLOCK, REQUEST_BYTES_MAX},
    volume::VolumeSpec,
};
use everdisk_sys::process::{descriptors, file_bytes, lockable_bytes};

use crate::error::{Error, Result};

/// The buffers for a request and its reply, of one channel: a core has at least one, and locks it into memory.
const LOCKED_BYTES: u64 = 2 * (REQUEST_BYTES_MAX as u64 + BLOCK);
/// Descriptors that a core with its storage nodes, and a few clients, needs.
const DESCRIPTORS: u64 = 256;

/// What this process may have; `None`: any amount.
#[derive(Clone, Copy, Debug)]
struct Limits {
    locked: Option<u64>,
    descriptors: Option<u64>,
    file: Option<u64>,
}

/// Whether a volume can be served within the limits of this process.
///
/// # Errors
/// Which is too low, by how much, and how to raise it.
pub fn check(spec: &VolumeSpec, has_file: bool) -> Result<()> {
    let limits = Limits { locked: lockable_bytes(), descriptors: descriptors(), file: file_bytes() };
    limits.check(spec, has_file).map_err(|why| {
        Error::State(format!(
            "volume {} cannot be served within the limits of everdiskd: {why}, and start everdiskd again",
            spec.name
        ))
    })
}

impl Limits {
    fn check(self, spec: &VolumeSpec, has_file: bool) -> Result<(), String> {
        let lacks = |limit: Option<u64>, needed: u64| limit.filter(|limit| *limit < needed);
        if let Some(limit) = lacks(self.locked, LOCKED_BYTES).filter(|_| has_file) {
            return Err(format!(
                "RLIMIT_MEMLOCK lets a core lock {limit} bytes of memory and {LOCKED_BYTES} are needed; raise it (LimitMEMLOCK=, \
                 ulimit -l), or give everdiskd CAP_IPC_LOCK"
            ));
        }
        if let Some(limit) = lacks(self.descriptors, DESCRIPTORS) {
            return Err(format!(
                "RLIMIT_NOFILE lets a process have {limit} descriptors and {DESCRIPTORS} are needed; raise it (LimitNOFILE=, ulimit -n)"
            ));
        }
        let needed = longest_file(spec);
        if let Some(limit) = lacks(self.file, needed) {
            return Err(format!(
                "RLIMIT_FSIZE lets a file have {limit} bytes and {needed} are needed; raise it (LimitFSIZE=, ulimit -f)"
            ));
        }
        Ok(())
    }
}

/// The data of a storage node, or the write buffer, whichever is longer.
fn longest_file(spec: &VolumeSpec) -> u64 {
    let nodes = u64::try_from(spec.nodes.len()).expect("a volume has few nodes");
    let stripes = spec.size.div_ceil(spec.stripe).div_ceil(nodes);
    // A volume of one node is not striped: its file is as long as it is.
    let data = stripes.saturating_mul(spec.stripe).min(spec.size);
    data.max(spec.buffer.saturating_mul(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_is_named_and_what_is_not_limited_is_enough() {
        let spec: VolumeSpec = serde_json::from_str(include_str!("../../../proto/golden/volume-v1.json")).unwrap();
        let enough = Limits { locked: None, descriptors: None, file: None };
        assert_eq!(enough.check(&spec, true), Ok(()));
        let refused = |limits: Limits, word: &str| {
            let why = limits.check(&spec, true).unwrap_err();
            assert!(why.contains(word), "{why}");
        };
        refused(Limits { locked: Some(65536), ..enough }, "RLIMIT_MEMLOCK");
        refused(Limits { descriptors: Some(64), ..enough }, "RLIMIT_NOFILE");
        refused(Limits { file: Some(1 << 20), ..enough }, "RLIMIT_FSIZE");
        assert_eq!(Limits { locked: Some(0), ..enough }.check(&spec, false), Ok(()), "NBD locks nothing that it needs");
    }
}
