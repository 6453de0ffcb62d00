//! What runs: the control module, the space it has, and its volumes.

use std::path::Path;

use everdisk_api::{
    directories::Directories,
    status::{Health, VolumeStatus},
};
use everdisk_proto::version::PRODUCT;

use super::{Finding, Verdict};
use crate::{commands::daemon_version, health::volumes};

/// With less free space than this, changes of the volumes may fail to be recorded.
const SPACE_MIN: u64 = 64 << 20;

/// One finding for the control module, one for its state directory, one for each problem of a volume.
pub(super) fn findings(directories: Result<Directories, String>) -> Vec<Finding> {
    let directories = match directories {
        Ok(directories) => directories,
        Err(why) => return vec![Finding::fail("directories", why, "give --run-dir and --state-dir")],
    };
    let socket = directories.control_socket();
    let (daemon, answers) = daemon(&socket);
    let mut found = vec![daemon, space(&directories.state)];
    if answers {
        match volumes(&socket, None) {
            Ok(volumes) if volumes.iter().all(|volume| volume.health == Health::Ok) => {
                found.push(Finding::ok("volumes", format!("{}, all well", volumes.len())));
            }
            Ok(volumes) => found.extend(volumes.iter().flat_map(problems)),
            Err(e) => found.push(Finding::fail("volumes", e.to_string(), "see the log of everdiskd")),
        }
    }
    found
}

fn daemon(socket: &Path) -> (Finding, bool) {
    match daemon_version(socket) {
        Ok(version) => {
            if version == PRODUCT {
                return (Finding::ok("everdiskd", format!("runs, version {version}")), true);
            }
            let found = format!("version {version} runs, but this command has version {PRODUCT}");
            (Finding::warn("everdiskd", found, "restart everdiskd; I/O on the volumes goes on"), true)
        }
        Err(e) => {
            (Finding::warn("everdiskd", e.to_string(), "start everdiskd: until then no standby core is started"), false)
        }
    }
}

fn space(state: &Path) -> Finding {
    let Ok(found) = rustix::fs::statvfs(state) else {
        return Finding::ok("state directory", format!("{} is not there yet", state.display()));
    };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if free < SPACE_MIN {
        let found = format!("{} bytes are free in {}", free, state.display());
        return Finding::warn(
            "state directory",
            found,
            "free some space: attach, detach, upgrade and standby cores need it",
        );
    }
    Finding::ok("state directory", format!("{} MiB are free", free >> 20))
}

fn problems(volume: &VolumeStatus) -> Vec<Finding> {
    let verdict = match volume.health {
        Health::Ok => return Vec::new(),
        Health::Degraded => Verdict::Warn,
        Health::Failed => Verdict::Fail,
    };
    let finding = |problem: &String| Finding {
        check: "volume",
        verdict,
        found: format!("{} is {}: {problem}", volume.name, volume.health.name()),
        fix: None,
    };
    volume.problems.iter().map(finding).collect()
}
