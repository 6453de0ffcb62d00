//! What a detach by force gives up: announced before, confirmed by the operator, and logged as a loss. Also the message when a process does not
//! end although it was killed.

use std::{fs, time::Duration};

use everdisk_proto::volume::VolumeSpec;
use everdisk_telemetry::event;
use tracing::{error, warn};

use crate::{
    error::{Error, Result},
    process::ProcessId,
    stuck,
    volume::Volume,
};

/// Whether the operator wants it by force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// Only if nothing is lost and no user is cut off.
    No,
    /// By force, as far as that gives nothing up.
    Asked,
    /// By force, whatever is given up.
    Agreed,
}

impl Force {
    /// As it is asked for.
    pub const fn new(force: bool, yes: bool) -> Self {
        match (force, yes) {
            (false, _) => Self::No,
            (true, false) => Self::Asked,
            (true, true) => Self::Agreed,
        }
    }
}

/// What is at stake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stake {
    /// Acknowledged bytes that are on no storage node; none: unknown.
    pub bytes: Option<u64>,
    /// The oldest of them may be so old.
    pub age: Option<Duration>,
    /// Why they could not be sent.
    pub why: Option<String>,
    /// The users that would be cut off.
    pub users: Option<String>,
}

impl Stake {
    /// Why it is unknown what is in the write buffer.
    pub fn unknown(why: &str) -> Self {
        Self { bytes: None, age: None, why: Some(why.to_owned()), users: None }
    }

    /// What is in the write buffer now, and could not be sent for this reason; `users` would be cut off.
    pub fn now(volume: &Volume, why: Option<String>, users: Option<String>) -> Self {
        let status = volume.interface().status().ok();
        // What passed the buffer by, or is lost, is in no amount.
        let known =
            |buffered: u64, lost: u32| Some(buffered).filter(|bytes| lost == 0 && (*bytes > 0 || why.is_none()));
        let bytes = status.and_then(|status| {
            status.buffer.map_or_else(|| known(0, 0), |buffer| known(buffer.buffered_bytes, buffer.damaged_ranges))
        });
        let age = volume.findings.unflushed_since().and_then(|since| since.elapsed().ok());
        Self { bytes, age, why, users }
    }

    /// Goes on where the operator has agreed, or nothing is at stake.
    ///
    /// # Errors
    /// [`Error::GivesUp`] says what it is.
    pub fn permit(&self, volume: &Volume, force: Force) -> Result<()> {
        if force == Force::Agreed || (self.bytes == Some(0) && self.users.is_none()) {
            return Ok(());
        }
        let data = (self.bytes != Some(0)).then(|| format!("gives up {}", self.data()));
        let users = self.users.as_ref().map(|users| format!("cuts off its users ({users})"));
        let given_up = data.into_iter().chain(users).collect::<Vec<_>>().join(", and ");
        Err(Error::GivesUp(format!("to detach volume {} by force {given_up}: say --yes to do it", volume.name)))
    }

    fn data(&self) -> String {
        let why = self.why.as_ref().map_or(String::new(), |why| format!(" ({why})"));
        let age = self.age.map_or(String::new(), |age| format!(" and at most {} s old", age.as_secs() + 1));
        match self.bytes {
            Some(bytes) => format!("{} that were acknowledged, are on no storage node yet{age}{why}", amount(bytes)),
            None => format!(
                "what was acknowledged and is on no storage node yet, of which nobody can tell how much it is{why}"
            ),
        }
    }

    /// Logs that it was given up. Returns the number of bytes.
    pub fn lost(&self, volume: &Volume) -> Option<u64> {
        if let Some(users) = &self.users {
            warn!(volume = %volume.name, "the users of the volume were cut off by a forced detach: {users}");
        }
        if self.bytes != Some(0) {
            let bytes = self.bytes.map_or_else(|| "unknown".to_owned(), |bytes| bytes.to_string());
            error!(event = event::DATA_GIVEN_UP, volume = %volume.name, bytes, "a forced detach gave up {}", self.data());
        }
        self.bytes
    }
}

/// Bytes for people, exact below a MiB.
fn amount(bytes: u64) -> String {
    if bytes < 1 << 20 {
        format!("{bytes} bytes")
    } else {
        format!("{}.{} MiB", bytes >> 20, ((bytes >> 10) & 1023) * 10 / 1024)
    }
}

/// What is said of processes of a volume that were killed and did not end: what they wait for, and what to do about it.
pub fn does_not_end(spec: &VolumeSpec, processes: &[ProcessId]) -> String {
    let mut told: Vec<String> =
        processes.iter().filter(|process| process.alive()).map(|process| stays(spec, process.pid)).collect();
    if told.is_empty() {
        told.push("a process that has just ended".to_owned());
    }
    format!(
        "volume {0}: {1} although killed. Bring the storage node back (thaw, reconnect or unmount -f its file system), or restart the \
         machine; then `everdisk detach {0} --force` again. What is on the storage nodes stays there",
        spec.name,
        told.join(", and ")
    )
}

fn stays(spec: &VolumeSpec, pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let file = stuck::file(pid);
    let node = file.as_ref().and_then(|file| stuck::node(spec, file));
    let waits = match (node, file) {
        (Some(node), Some(file)) => {
            format!(", which waits in the kernel for {} of storage node {node},", file.display())
        }
        (None, Some(file)) => format!(", which waits in the kernel for {},", file.display()),
        _ => {
            let nodes: Vec<String> = spec.nodes.iter().map(|node| node.url.to_string()).collect();
            format!(", which may wait in the kernel for one of the storage nodes {},", nodes.join(", "))
        }
    };
    format!("process {pid} ({}){waits} does not end", name.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fake, volume::tests::volume};

    #[test]
    fn what_is_at_stake_is_said_and_needs_a_yes() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let fake = fake::Interface::start(&volume);
        let nothing = Stake::now(&volume, None, None);
        assert_eq!(nothing.bytes, Some(0));
        nothing.permit(&volume, Force::Asked).unwrap();
        fake.set(|status| status.buffer = Some(fake::buffer(5 << 19)));
        volume.findings.saw_buffered(1);
        let stake = Stake::now(&volume, Some("disk full".to_owned()), Some("process 7 (dd) has it open".to_owned()));
        let asked = stake.permit(&volume, Force::Asked).unwrap_err();
        let words = "to detach volume v by force gives up 2.5 MiB that were acknowledged, are on no storage node yet and at most 1 s old \
                     (disk full), and cuts off its users (process 7 (dd) has it open): say --yes to do it";
        assert_eq!(asked.to_string(), words);
        assert!(everdisk_api::answer::Refusal::from(asked).needs_yes());
        stake.permit(&volume, Force::Agreed).unwrap();
        assert_eq!(stake.lost(&volume), Some(5 << 19));
        let unknown = Stake::unknown("the interface does not answer");
        assert!(unknown.permit(&volume, Force::Asked).unwrap_err().to_string().contains("nobody can tell how much"));
        drop(fake);
        volume.paths.remove_sockets();
        assert_eq!(Stake::now(&volume, None, None).bytes, None);
    }

    #[test]
    fn a_process_that_does_not_end_is_named_with_the_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let own = ProcessId::of(std::process::id()).unwrap();
        let told = does_not_end(&volume.spec(), &[own]);
        assert!(told.contains(&format!("process {} (", own.pid)) && told.contains("dir:/srv/1, dir:/srv/2"), "{told}");
        assert!(told.contains("restart the machine") && !told.contains("delete"), "{told}");
    }

    #[test]
    fn small_amounts_are_exact() {
        assert_eq!(
            (amount(4096), amount(64 << 20), amount((3 << 20) - 1)),
            ("4096 bytes".into(), "64.0 MiB".into(), "2.9 MiB".into())
        );
    }
}
