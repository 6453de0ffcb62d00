//! A computing node of its own, under a watchdog, and an end at which nothing may be left over.

use std::{
    fs,
    ops::{Deref, DerefMut},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use everdisk_harness::{host, interrupt::Interrupt, pass};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    programs::need_root,
    run::Output,
    volume::Volume,
    wait::SOON,
    watchdog::{LOG_LINES, Watchdog},
};

/// A process that was told to end may take this long before it counts as left over.
const GRACE: Duration = Duration::from_secs(5);

/// The user as which the programs of a host run.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// Put before every command line: a way into a namespace, another user.
    pub prefix: Vec<String>,
    /// Owner of the directories.
    pub uid: Option<u32>,
}

/// A computing node. Dropping it detaches everything, ends the control module, and fails if more was there to clean.
#[derive(Debug)]
pub struct Host {
    host: host::Host,
    /// Until everything is cleaned.
    _watchdog: Watchdog,
}

impl Deref for Host {
    type Target = host::Host;
    fn deref(&self) -> &host::Host {
        &self.host
    }
}

impl DerefMut for Host {
    fn deref_mut(&mut self) -> &mut host::Host {
        &mut self.host
    }
}

impl Host {
    /// Makes the directories and starts the control module.
    pub fn new() -> Self {
        need_root();
        let mut host = Self::idle(Identity::default());
        host.start_daemon();
        host
    }

    /// A host whose volumes run on the faulty core, so that their storage nodes obey a [`Faults`](crate::faults::Faults).
    pub fn faulty() -> Self {
        need_root();
        let mut host = Self::idle(Identity::default());
        pass(host.take_faulty_core());
        host.start_daemon();
        host
    }

    /// The directories alone.
    pub fn idle(identity: Identity) -> Self {
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let mut host = pass(host::Host::new(&base, "evd-"));
        host.set_prefix(identity.prefix);
        // Other users must come as far as the mounted file.
        fs::set_permissions(host.root(), fs::Permissions::from_mode(0o755)).expect("open the directory");
        for name in ["run", "state", "nodes", "files"] {
            let path = host.root().join(name);
            fs::create_dir(&path).expect("make a directory");
            if let Some(uid) = identity.uid {
                std::os::unix::fs::chown(&path, Some(uid), Some(uid)).expect("give a directory away");
            }
        }
        Self { _watchdog: Watchdog::over(host.root()), host }
    }

    /// The directory of a new storage node.
    pub fn node(&self, name: &str) -> PathBuf {
        self.root().join("nodes").join(name)
    }

    /// A path to attach a volume to.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root().join("files").join(name)
    }

    /// What an interface of a volume logged.
    pub fn interface_log(&self, name: &str) -> String {
        fs::read_to_string(self.volume_run(name).join("interface.log")).unwrap_or_default()
    }

    /// Lines of the control module's log that say all of these words.
    pub fn logged(&self, words: &[&str]) -> Vec<String> {
        let log = self.daemon_log();
        let found = log.lines().filter(|line| words.iter().all(|word| line.contains(word)));
        found.map(str::to_owned).collect()
    }

    /// Copies a program to where every user can run it.
    pub fn copied(&self, program: &Path) -> PathBuf {
        pass(self.host.copied(program))
    }

    /// Runs copies of the programs: those of the build may lie where this host's user cannot go.
    pub fn take_programs(&mut self) {
        pass(self.host.take_programs());
    }

    /// Starts the control module and waits until it answers.
    pub fn start_daemon(&mut self) {
        pass(self.host.start_daemon(&Interrupt::default()));
    }

    /// kill -9 of the control module.
    pub fn kill_daemon(&mut self) {
        assert!(self.end_daemon(Signal::KILL, SOON), "everdiskd does not end by SIGKILL");
    }

    /// Ends the control module politely.
    pub fn stop_daemon(&mut self) {
        assert!(self.end_daemon(Signal::TERM, SOON), "everdiskd does not end on SIGTERM");
    }

    /// Runs the CLI.
    pub fn everdisk(&self, arguments: &[&str]) -> Output {
        pass(self.host.everdisk(arguments))
    }

    /// Runs the CLI with `--json`; it has to succeed.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let all: Vec<&str> = std::iter::once("--json").chain(arguments.iter().copied()).collect();
        let text = self.everdisk(&all).ok();
        let line = text.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|e| panic!("everdisk {all:?} printed no JSON ({e}): {text}"))
    }

    /// Creates a volume on `nodes` new directories.
    pub fn create(&self, name: &str, size: &str, nodes: usize) -> Volume<'_> {
        self.create_with(name, size, nodes, &[])
    }

    /// Creates a volume on `nodes` new directories, with these options too: `&["--buffer", "64M"]`.
    pub fn create_with(&self, name: &str, size: &str, nodes: usize, options: &[&str]) -> Volume<'_> {
        let mut arguments = vec!["volume".to_owned(), "create".to_owned(), name.to_owned()];
        arguments.extend(["--size".to_owned(), size.to_owned(), "--stripe".to_owned(), "64K".to_owned()]);
        for index in 0..nodes {
            let url = format!("dir:{}", self.node(&format!("{name}-{index}")).display());
            arguments.extend(["--node".to_owned(), url]);
        }
        arguments.push("--create-dir".to_owned());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(options.iter().copied()).collect();
        self.everdisk(&arguments).ok();
        Volume::new(self, name)
    }

    /// Creates a volume on two directories and attaches it.
    pub fn volume(&self, name: &str, size: &str) -> Volume<'_> {
        let volume = self.create(name, size, 2);
        volume.attach(&[]);
        volume
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", host::logs(self.root(), LOG_LINES));
        }
        let left = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.clean(GRACE)));
        let left = left.unwrap_or_else(|_| vec!["the cleaning itself failed".to_owned()]);
        if thread::panicking() {
            eprintln!("cleaned: {left:?}");
        } else {
            assert!(left.is_empty(), "the test left behind: {left:#?}\n{}", host::logs(self.root(), LOG_LINES));
        }
    }
}
