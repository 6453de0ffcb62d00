//! A host of its own for a demo or a measurement: directories, `everdiskd`, the operator's commands; all cleared away in
//! the end.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use everdisk_api::{client, directories::Directories, request::Request};
use everdisk_proto::volume::NodeUrl;
use everdisk_testkit::fault_store::{Counts, counts, fault_file};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    Error, Result,
    command::{self, Ended},
    fio::Target,
    interface::Interface,
    interrupt::Interrupt,
    nbd::Address,
    residue,
};

/// The volume of every host here.
pub const VOLUME: &str = "v";
/// An operator's command ends within this time.
const COMMAND_WITHIN: Duration = Duration::from_secs(60);
/// `everdiskd` answers, and ends, within this time.
const DAEMON_WITHIN: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(20);
/// Lines of a log that are shown when something went wrong.
const LOG_LINES: usize = 8;
/// What a host runs.
const PROGRAMS: [&str; 4] = ["everdisk", "everdiskd", "everdisk-interface", "everdisk-core"];
/// The cores whose storage nodes obey fault files, of this version and of another one.
pub const FAULTY: [&str; 2] = ["everdisk-core-faulty", "everdisk-core-faulty-next"];

/// The host.
#[derive(Debug)]
pub struct Host {
    /// Where the programs of the build are, and copies that are run in their place.
    programs: PathBuf,
    copies: Option<PathBuf>,
    directories: Directories,
    daemon: Option<Child>,
    /// Where the storage nodes are, and the rest.
    nodes: Option<TempDir>,
    work: Option<TempDir>,
    /// Whether a volume may be attached.
    attached: bool,
    /// The files that command its storage nodes.
    fault_files: Vec<PathBuf>,
    /// Ends everything early.
    pub interrupt: Interrupt,
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
        host.start_daemon()?;
        Ok(host)
    }

    /// As [`Host::start`], and its storage nodes obey [`Host::fault`]. Upgrades of it go to [`FAULTY`] cores.
    ///
    /// # Errors
    /// As [`Host::start`].
    pub fn faulty(interrupt: &Interrupt, nodes_in: Option<&Path>) -> Result<Self> {
        let mut host = Self::idle(interrupt, nodes_in)?;
        let copies = host.path("bin");
        let copy = |name: &str, to: &str| {
            let from = host.programs.join(name);
            fs::copy(&from, copies.join(to)).map_err(Error::io(format!("copy {}", from.display())))
        };
        fs::create_dir(&copies).map_err(Error::io("make a directory"))?;
        for name in PROGRAMS {
            copy(name, name)?;
        }
        // The control module starts volumes with the core beside itself.
        copy(FAULTY[0], "everdisk-core")?;
        host.copies = Some(copies);
        host.start_daemon()?;
        Ok(host)
    }

    /// The directories alone.
    fn idle(interrupt: &Interrupt, nodes_in: Option<&Path>) -> Result<Self> {
        let own = env::current_exe().map_err(Error::io("find the directory of the programs"))?;
        let programs = own.parent().unwrap_or(Path::new("/")).to_owned();
        for name in PROGRAMS.into_iter().chain(["everdisk-core-next"]).chain(FAULTY) {
            if !programs.join(name).is_file() {
                let all = "-p everdisk -p everdiskd -p everdisk-interface -p everdisk-core -p everdisk-tests";
                return Err(Error::Failed(format!(
                    "{} is not there: `cargo build --release --bins {all}` first",
                    programs.join(name).display()
                )));
            }
        }
        let make = |within: Option<&Path>| {
            let mut builder = tempfile::Builder::new();
            builder.prefix("everdisk-");
            within.map_or_else(|| builder.tempdir(), |dir| builder.tempdir_in(dir))
        };
        let work = make(None).map_err(Error::io("make a temporary directory"))?;
        let nodes = nodes_in.map(|dir| make(Some(dir))).transpose().map_err(Error::io("make a temporary directory"))?;
        let directories = Directories { run: work.path().join("run"), state: work.path().join("state") };
        Ok(Self {
            programs,
            copies: None,
            directories,
            daemon: None,
            nodes,
            work: Some(work),
            attached: false,
            fault_files: Vec::new(),
            interrupt: interrupt.clone(),
        })
    }

    fn start_daemon(&mut self) -> Result<()> {
        let log = self.work().join("everdiskd.log");
        let out = File::create(&log).map_err(Error::io("make a log"))?;
        let err = out.try_clone().map_err(Error::io("make a log"))?;
        let mut command = Command::new(self.program("everdiskd"));
        command.arg("--run-dir").arg(&self.directories.run).arg("--state-dir").arg(&self.directories.state);
        command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        self.daemon = Some(command.spawn().map_err(Error::io("start everdiskd"))?);
        let socket = self.directories.control_socket();
        let up = self.interrupt.clone().wait_for("everdiskd listens", DAEMON_WITHIN, LOOK, || {
            Ok(client::ask(&socket, &Request::Version, |_| {}).ok())
        });
        up.map(drop).map_err(|e| match e {
            Error::Failed(why) => Error::Failed(format!("{why}\n{}", self.log())),
            other => other,
        })
    }

    fn work(&self) -> &Path {
        self.work.as_ref().map_or(Path::new("/nonexistent"), TempDir::path)
    }

    /// A path in the working directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.work().join(name)
    }

    /// A path where the storage nodes are.
    pub fn node(&self, name: &str) -> PathBuf {
        self.nodes.as_ref().map_or_else(|| self.path(name), |dir| dir.path().join(name))
    }

    /// One of Everdisk's programs.
    pub fn program(&self, name: &str) -> PathBuf {
        let copied = self.copies.as_ref().map(|copies| copies.join(name)).filter(|copy| copy.is_file());
        copied.unwrap_or_else(|| self.programs.join(name))
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
        Interface::new(self.directories.run.join("volumes").join(VOLUME).join("interface.sock"))
    }

    /// Runs `everdisk --json ARGUMENTS`.
    ///
    /// # Errors
    /// It cannot be run or does not end. A command that fails is no error here.
    pub fn everdisk<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<Said> {
        let mut command = Command::new(self.program("everdisk"));
        command.arg("--run-dir").arg(&self.directories.run).arg("--state-dir").arg(&self.directories.state);
        command.arg("--json").args(arguments);
        let ended = command::run(&mut command, COMMAND_WITHIN)?;
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
        for index in 0..nodes {
            let path = self.node(&format!("node-{index}"));
            fs::create_dir(&path).map_err(Error::io("make a storage node"))?;
            create.extend(["--node".to_owned(), format!("dir:{}", path.display())]);
            self.fault_files.push(fault_file(&NodeUrl::Dir(path)));
        }
        create.extend(options.iter().map(|option| (*option).to_owned()));
        self.do_everdisk(&create).map(drop)
    }

    /// Attaches the volume to its file, and to other front ends.
    fn attach_to(&mut self, others: &[String]) -> Result<()> {
        self.attached = true;
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
        for file in &self.fault_files {
            // In one step: no core may read half of it.
            let aside = file.with_extension("aside");
            let written = fs::write(&aside, text).and_then(|()| fs::rename(&aside, file));
            written.map_err(Error::io("command a storage node"))?;
        }
        Ok(())
    }

    /// Every storage node works well again.
    pub fn heal(&self) {
        for file in &self.fault_files {
            let _ = fs::remove_file(file);
        }
    }

    /// What all cores together did so far to all storage nodes together; of a [`Host::faulty`].
    pub fn counts(&self) -> Counts {
        let each = self.fault_files.iter().flat_map(|file| counts(file));
        each.fold(Counts::default(), |sum, (_, counts)| sum + counts)
    }

    /// The last lines of the logs, for messages.
    pub fn log(&self) -> String {
        let run = self.directories.run.join("volumes").join(VOLUME);
        let mut logs = vec![self.path("everdiskd.log")];
        logs.extend(fs::read_dir(run).into_iter().flatten().flatten().map(|entry| entry.path()));
        let mut out = String::new();
        for path in logs.iter().filter(|path| path.extension().is_some_and(|e| e == "log")) {
            let text = fs::read_to_string(path).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            for line in lines.iter().skip(lines.len().saturating_sub(LOG_LINES)) {
                out += &format!("  {}: {line}\n", path.file_name().unwrap_or_default().display());
            }
        }
        out
    }

    /// Clears everything away; returns what could not be, or would not go by itself.
    pub fn end(mut self) -> Vec<String> {
        self.clear()
    }

    fn directories_made(&self) -> Vec<PathBuf> {
        [&self.work, &self.nodes].into_iter().flatten().map(|dir| dir.path().to_owned()).collect()
    }

    fn clear(&mut self) -> Vec<String> {
        let made = self.directories_made();
        if made.is_empty() {
            return Vec::new();
        }
        let mut trouble = Vec::new();
        // Nothing ends as long as it hangs.
        self.heal();
        if std::mem::take(&mut self.attached) {
            match self.everdisk(&["detach", VOLUME, "--force", "--yes"]) {
                Ok(said) if said.done => {}
                Ok(said) => trouble.push(format!("detach: {}", said.complaint)),
                Err(e) => trouble.push(format!("detach: {e}")),
            }
        }
        if let Some(mut daemon) = self.daemon.take()
            && !end(&mut daemon)
        {
            trouble.push("everdiskd did not end by itself".to_owned());
        }
        trouble.extend(residue::remove(&made));
        for dir in [self.work.take(), self.nodes.take()].into_iter().flatten() {
            if let Err(e) = dir.close() {
                trouble.push(format!("a directory could not be removed: {e}"));
            }
        }
        trouble.extend(residue::list(&made));
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

/// Ends a child politely, then not; whether politely was enough.
pub fn end(child: &mut Child) -> bool {
    residue::kill(child.id(), Signal::TERM);
    let deadline = Instant::now() + DAEMON_WITHIN;
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return true;
        }
        std::thread::sleep(LOOK);
    }
    let _ = child.kill();
    let _ = child.wait();
    false
}

/// The object that a command printed: all of its output or the last line that is one.
fn last_object(ended: &Ended) -> Value {
    let objects = || ended.stdout.lines().rev().filter_map(|line| serde_json::from_str(line).ok());
    serde_json::from_str(&ended.stdout).ok().or_else(|| objects().next()).unwrap_or(Value::Null)
}
