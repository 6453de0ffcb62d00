//! A host of its own for a demo or a measurement, with one volume; all cleared away in the end.

use std::{
    env,
    ffi::OsStr,
    fs,
    ops::Deref,
    path::{Path, PathBuf},
    time::Duration,
};

use everdisk_harness::{
    faults::Faults,
    host::{self, logs},
    interrupt::Interrupt,
    nbd::Address,
    programs::{self, CORE_NEXT, FAULTY, PROGRAMS},
    run::Output,
};
use everdisk_testkit::fault_store::Counts;
use serde_json::Value;

use crate::{Error, Result, fio::Target, interface::Interface};

/// The volume of every host here.
pub const VOLUME: &str = "v";
/// `everdiskd` ends, and what it started, within this time.
const ENDED_WITHIN: Duration = Duration::from_secs(10);
/// Lines of a log that are shown when something went wrong.
const LOG_LINES: usize = 8;

/// The host.
#[derive(Debug)]
pub struct Host {
    host: host::Host,
    /// Where the storage nodes are.
    nodes: PathBuf,
    /// What commands its storage nodes.
    faults: Faults,
    /// Ends everything early.
    pub interrupt: Interrupt,
}

impl Deref for Host {
    type Target = host::Host;
    fn deref(&self) -> &host::Host {
        &self.host
    }
}

/// Where an NBD server awaits clients.
#[derive(Clone, Debug)]
pub struct NbdAddresses {
    /// Its UNIX socket.
    pub unix: Address,
    /// Its TCP port.
    pub tcp: Address,
}

/// What an operator's command gave.
#[derive(Debug)]
pub struct Said {
    /// The object it printed.
    pub json: Value,
    /// Whether it ended with status 0.
    pub done: bool,
    /// What it complained about.
    pub complaint: String,
}

impl Host {
    /// Makes the directories, the storage nodes' below `nodes_in` when given, and starts `everdiskd`.
    ///
    /// # Errors
    /// A program is missing, or `everdiskd` does not come up.
    pub fn start(interrupt: &Interrupt, nodes_in: Option<&Path>) -> Result<Self> {
        let mut host = Self::idle(interrupt, nodes_in)?;
        host.host.start_daemon(interrupt)?;
        Ok(host)
    }

    /// As [`Host::start`], and its storage nodes obey [`Host::fault`]. Upgrades of it go to [`FAULTY`] cores.
    ///
    /// # Errors
    /// As [`Host::start`].
    pub fn faulty(interrupt: &Interrupt, nodes_in: Option<&Path>) -> Result<Self> {
        let mut host = Self::idle(interrupt, nodes_in)?;
        host.host.take_faulty_core()?;
        host.host.start_daemon(interrupt)?;
        Ok(host)
    }

    /// The directories alone.
    fn idle(interrupt: &Interrupt, nodes_in: Option<&Path>) -> Result<Self> {
        for name in PROGRAMS.into_iter().chain([CORE_NEXT]).chain(FAULTY) {
            programs::try_program(name)?;
        }
        let mut host = host::Host::new(&env::temp_dir(), "everdisk-")?;
        let nodes = match nodes_in {
            Some(base) => host.directory_in(base, "everdisk-")?,
            None => host.root().to_owned(),
        };
        Ok(Self { host, nodes, faults: Faults::of(Vec::new()), interrupt: interrupt.clone() })
    }

    /// A path in the working directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// A path where the storage nodes are.
    pub fn node(&self, name: &str) -> PathBuf {
        self.nodes.join(name)
    }

    /// The file the volume is attached to.
    pub fn file(&self) -> PathBuf {
        self.path("volume.img")
    }

    /// The same for fio.
    pub fn target(&self) -> Target {
        Target::direct(self.file())
    }

    /// The volume's interface.
    pub fn interface(&self) -> Interface {
        Interface::new(self.volume_run(VOLUME).join("interface.sock"))
    }

    /// Runs `everdisk --json ARGUMENTS`.
    ///
    /// # Errors
    /// It cannot be run or does not end. A command that fails is no error here.
    pub fn everdisk<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<Said> {
        let words: Vec<&OsStr> =
            [OsStr::new("--json")].into_iter().chain(arguments.iter().map(AsRef::as_ref)).collect();
        let ended = self.host.everdisk(&words)?;
        let complaint = if ended.status.success() { String::new() } else { ended.complaint() };
        Ok(Said { json: last_object(&ended), done: ended.status.success(), complaint })
    }

    /// As [`Host::everdisk`], and the command has to succeed.
    ///
    /// # Errors
    /// Also its complaint.
    pub fn do_everdisk<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<Value> {
        let said = self.everdisk(arguments)?;
        if said.done {
            return Ok(said.json);
        }
        let words: Vec<_> = arguments.iter().map(|a| a.as_ref().to_string_lossy()).collect();
        Err(Error::Failed(format!("everdisk {}: {}\n{}", words.join(" "), said.complaint, self.log())))
    }

    /// Creates the volume on `nodes` directories and attaches it.
    ///
    /// # Errors
    /// As the commands'.
    pub fn attach(&mut self, size: &str, nodes: usize) -> Result<()> {
        self.attach_with(size, nodes, &[])
    }

    /// As [`Host::attach`], with more options of `volume create`.
    ///
    /// # Errors
    /// As the commands'.
    pub fn attach_with(&mut self, size: &str, nodes: usize, options: &[&str]) -> Result<()> {
        self.create(size, nodes, options)?;
        self.attach_to(&[])
    }

    /// As [`Host::attach_with`], and serves NBD clients, too.
    ///
    /// # Errors
    /// As the commands'.
    pub fn attach_nbd(&mut self, size: &str, nodes: usize, options: &[&str]) -> Result<NbdAddresses> {
        self.create(size, nodes, options)?;
        let socket = self.path("nbd.sock");
        self.attach_to(&[
            "--nbd".into(),
            format!("unix:{}", socket.display()),
            "--nbd".into(),
            "tcp:127.0.0.1:0".into(),
        ])?;
        let status = self.do_everdisk(&["status", VOLUME])?;
        let fronts = status.get("frontends").and_then(Value::as_array).into_iter().flatten();
        let mut addresses = fronts.filter_map(|front| front.get("address")?.as_str()?.strip_prefix("tcp:"));
        let bound = addresses.next().and_then(|address| address.parse().ok());
        let tcp = bound.ok_or_else(|| Error::Failed(format!("no TCP address in {status}")))?;
        Ok(NbdAddresses { unix: Address::Unix(socket), tcp: Address::Tcp(tcp) })
    }

    fn create(&mut self, size: &str, nodes: usize, options: &[&str]) -> Result<()> {
        let mut create: Vec<String> = ["volume", "create", VOLUME, "--size", size].map(str::to_owned).to_vec();
        let paths: Vec<PathBuf> = (0..nodes).map(|index| self.node(&format!("node-{index}"))).collect();
        for path in &paths {
            fs::create_dir(path).map_err(Error::io("make a storage node"))?;
            create.extend(["--node".to_owned(), format!("dir:{}", path.display())]);
        }
        self.faults = Faults::of(paths);
        create.extend(options.iter().map(|option| (*option).to_owned()));
        self.do_everdisk(&create).map(drop)
    }

    /// Attaches the volume to its file, and to other front ends.
    fn attach_to(&self, others: &[String]) -> Result<()> {
        let file = self.file();
        let mut words = vec![OsStr::new("attach"), OsStr::new(VOLUME), OsStr::new("--file"), file.as_os_str()];
        words.extend(others.iter().map(OsStr::new));
        self.do_everdisk(&words).map(drop)
    }

    /// Upgrades the volume to a program, with a soak of 200 ms.
    ///
    /// # Errors
    /// As [`Host::everdisk`].
    pub fn upgrade(&self, program: &Path) -> Result<Said> {
        self.upgrade_with(program, &[])
    }

    /// As [`Host::upgrade`], with more options.
    ///
    /// # Errors
    /// As [`Host::everdisk`].
    pub fn upgrade_with(&self, program: &Path, options: &[&str]) -> Result<Said> {
        let mut words = vec![OsStr::new("upgrade"), OsStr::new(VOLUME), OsStr::new("--core"), program.as_os_str()];
        words.extend(["--soak", "200ms"].iter().chain(options).map(OsStr::new));
        self.everdisk(&words)
    }

    /// What every storage node does from now on, in the language of [`Faults`](everdisk_testkit::fault_store::Faults).
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn fault(&self, text: &str) -> Result<()> {
        self.faults.try_set(text)
    }

    /// Every storage node works well again.
    pub fn heal(&self) {
        self.faults.clear();
    }

    /// What all cores together did so far to all storage nodes together; of a [`Host::faulty`].
    pub fn counts(&self) -> Counts {
        self.faults.counts()
    }

    /// The last lines of the logs, for messages.
    pub fn log(&self) -> String {
        logs(self.root(), LOG_LINES)
    }

    /// Clears everything away; returns what could not be, or would not go by itself.
    pub fn end(mut self) -> Vec<String> {
        self.clear()
    }

    fn clear(&mut self) -> Vec<String> {
        // Nothing ends as long as it hangs.
        self.heal();
        let mut trouble = self.host.clean(ENDED_WITHIN);
        trouble.extend(self.host.remove());
        trouble
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for trouble in self.clear() {
            eprintln!("while clearing away: {trouble}");
        }
    }
}

/// The object that a command printed: all of its output or the last line that is one.
fn last_object(ended: &Output) -> Value {
    let objects = || ended.stdout.lines().rev().filter_map(|line| serde_json::from_str(line).ok());
    serde_json::from_str(&ended.stdout).ok().or_else(|| objects().next()).unwrap_or(Value::Null)
}
