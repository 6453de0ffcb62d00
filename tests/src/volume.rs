//! A volume of a host, and what is asked of it.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    host::Host,
    processes, programs,
    run::{Output, Running},
    status::{Report, Status},
    wait::SOON,
};

/// The stripe of the volumes that a host creates.
pub const STRIPE: usize = 64 << 10;

/// The first `size` bytes of a volume whose storage nodes hold these bytes.
pub fn striped(nodes: &[Vec<u8>], size: usize) -> Vec<u8> {
    let stripe = |n: usize| &nodes[n % nodes.len()][n / nodes.len() * STRIPE..][..STRIPE];
    let mut bytes: Vec<u8> = (0..size.div_ceil(STRIPE)).flat_map(|n| stripe(n).iter().copied()).collect();
    bytes.truncate(size);
    bytes
}

/// A volume.
#[derive(Clone, Debug)]
pub struct Volume<'a> {
    /// Its host.
    pub host: &'a Host,
    /// Its name.
    pub name: String,
    /// The file it is attached to.
    pub path: PathBuf,
}

impl<'a> Volume<'a> {
    /// A volume that exists.
    pub fn new(host: &'a Host, name: &str) -> Self {
        Self { host, name: name.to_owned(), path: host.file(&format!("{name}.img")) }
    }

    /// The directory of its n-th storage node.
    pub fn node(&self, index: usize) -> PathBuf {
        self.host.node(&format!("{}-{index}", self.name))
    }

    fn path_text(&self) -> &str {
        self.path.to_str().expect("a path in UTF-8")
    }

    /// Tries to attach it.
    pub fn try_attach(&self, options: &[&str]) -> Output {
        let mut arguments = vec!["attach", &self.name, "--file", self.path_text()];
        arguments.extend(options);
        self.host.everdisk(&arguments)
    }

    /// Attaches it and waits for its standby.
    pub fn attach(&self, options: &[&str]) {
        self.try_attach(options).ok();
        self.settled();
    }

    /// Detaches it.
    pub fn detach(&self) {
        self.host.everdisk(&["detach", &self.name]).ok();
        assert_eq!(processes::mount_on(&self.path), None, "{} is still mounted", self.path.display());
        assert_eq!(self.processes(), [], "processes of {} live on", self.name);
    }

    /// Its interface and cores, by their command lines.
    pub fn processes(&self) -> Vec<processes::Process> {
        processes::naming(&self.host.root().join("state/volumes").join(&self.name).join("volume.json"))
    }

    /// How it stands.
    pub fn status(&self) -> Status {
        Status(self.host.json(&["status", &self.name]))
    }

    /// Waits until it serves and has a standby, as a quiet volume does.
    pub fn settled(&self) -> Status {
        self.wait("a serving core and a standby", |status| {
            status.state() == "serving" && status.core().is_some() && status.standby().is_some()
        })
    }

    /// Waits until its status is as wanted.
    pub fn wait(&self, what: &str, wanted: impl FnMut(&Status) -> bool) -> Status {
        self.wait_within(SOON, what, wanted)
    }

    /// Waits at most `limit` until its status is as wanted.
    pub fn wait_within(&self, limit: Duration, what: &str, mut wanted: impl FnMut(&Status) -> bool) -> Status {
        let deadline = Instant::now() + limit;
        loop {
            let status = self.status();
            if wanted(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "waited {limit:?} in vain for: {what}, at last:\n{status:?}");
        }
    }

    /// Starts an upgrade and does not wait for it.
    pub fn upgrading(&self, core: &Path, options: &[&str]) -> Running {
        Running::start(self.host.cli(&self.upgrade_arguments(core, options)))
    }

    fn upgrade_arguments<'b>(&'b self, core: &'b Path, options: &[&'b str]) -> Vec<&'b str> {
        let core = core.to_str().expect("a path in UTF-8");
        let mut arguments = vec!["--json", "upgrade", &self.name, "--core", core];
        arguments.extend(options);
        arguments
    }

    /// Tries to upgrade it.
    pub fn try_upgrade(&self, core: &Path, options: &[&str]) -> Output {
        self.host.everdisk(&self.upgrade_arguments(core, options))
    }

    /// Upgrades it without a soak; has to be committed.
    pub fn upgrade(&self, core: &Path) -> Report {
        let output = self.try_upgrade(core, &["--soak", "0s"]);
        let report = report(&output);
        assert_eq!((output.code(), report.outcome()), (0, "committed"), "{report:?}\n{}", output.stderr);
        report
    }

    /// Upgrades it by this hand-over policy without a soak; has to be committed, and by this policy.
    pub fn upgrade_by(&self, handover: &str, core: &Path) -> Report {
        let output = self.try_upgrade(core, &["--soak", "0s", "--handover", handover]);
        let report = report(&output);
        let found = (output.code(), report.outcome(), report.0["handover"].as_str());
        assert_eq!(found, (0, "committed", Some(handover)), "{report:?}\n{}", output.stderr);
        report
    }

    /// The core of the other version than the one that serves.
    pub fn other_core(&self) -> PathBuf {
        if self.status().version() == programs::VERSION { self.host.core_next() } else { self.host.core() }
    }

    /// Upgrades it to the other version; has to be committed.
    pub fn turn(&self) -> Report {
        self.upgrade(&self.other_core())
    }

    /// Tries an upgrade that has to fail with this outcome and a message that says every one of `words`.
    pub fn upgrade_fails(&self, core: &Path, options: &[&str], outcome: &str, words: &[&str]) -> Report {
        let output = self.try_upgrade(core, options);
        let report = report(&output);
        assert_eq!(report.outcome(), outcome, "{report:?}\n{}", output.stderr);
        output.refused(1, words);
        report
    }

    /// Opens its file for reading and writing.
    pub fn open(&self) -> File {
        File::options().read(true).write(true).open(&self.path).expect("open the volume's file")
    }

    /// Opens it with these flags beside O_RDWR.
    pub fn open_with(&self, flags: rustix::fs::OFlags) -> std::io::Result<File> {
        let flags = i32::try_from(flags.bits()).expect("open flags");
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(&self.path)
    }

    /// Suspends, resumes and so on: a command with the volume's name.
    pub fn ask(&self, command: &str, options: &[&str]) -> Output {
        let mut arguments = vec![command, self.name.as_str()];
        arguments.extend(options);
        self.host.everdisk(&arguments)
    }

    /// kill -9 of the core that serves, and waits until another one does.
    pub fn kill_core(&self) -> Status {
        let before = self.status();
        let pid = before.core().expect("a core serves");
        processes::kill(pid);
        self.wait("another core after a kill", |status| status.serves() && status.core() != Some(pid))
    }

    /// Which core the open file says serves it.
    pub fn version_by(&self, file: &File) -> String {
        let mut value = [0; 128];
        let len = rustix::fs::fgetxattr(file, "user.everdisk.core", &mut value[..]).expect("the core's version");
        String::from_utf8_lossy(&value[..len]).into_owned()
    }
}

/// The report that an upgrade printed.
pub fn report(output: &Output) -> Report {
    let last = output.stdout.lines().rev().find(|line| line.starts_with('{'));
    let value: Option<Value> = last.and_then(|line| serde_json::from_str(line).ok());
    Report(value.unwrap_or_else(|| panic!("{} printed no report: {}{}", output.shown, output.stdout, output.stderr)))
}
