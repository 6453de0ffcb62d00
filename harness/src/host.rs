//! A computing node of its own: directories, a control module, and an end that reports what is left over.
//!
//! ```text
//!  ROOT/run            --run-dir of the control module
//!  ROOT/state          --state-dir
//!  ROOT/bin            copies of the programs, where they are wanted
//!  ROOT/everdiskd.log  what the control module says
//! ```

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    Error, Result,
    interrupt::Interrupt,
    processes,
    programs::{self, CORE_NEXT, FAULTY, PROGRAMS},
    run::{Output, try_run},
    wait::SOON,
};

/// The CLI may take this long: the longest upgrade that fails waits 20 s for its standby.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Interval between two polls.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A computing node. It has to be [`clean`](Host::clean)ed before it is dropped.
#[derive(Debug)]
pub struct Host {
    root: PathBuf,
    /// Put before every command line: a way into a namespace, another user.
    prefix: Vec<String>,
    /// Where its programs are.
    programs: PathBuf,
    is_faulty: bool,
    daemon: Option<Child>,
    daemon_options: Vec<String>,
    /// What is removed in the end; the first is the root.
    directories: Vec<TempDir>,
}

impl Host {
    /// The root alone, a new directory in `base` whose name begins with `name`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(base: &Path, name: &str) -> Result<Self> {
        let directory = directory(base, name)?;
        Ok(Self {
            root: directory.path().to_owned(),
            prefix: Vec::new(),
            programs: programs::directory(),
            is_faulty: false,
            daemon: None,
            daemon_options: Vec::new(),
            directories: vec![directory],
        })
    }

    /// The directory that holds everything.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Another new directory, in `base`, that goes with the host.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn directory_in(&mut self, base: &Path, name: &str) -> Result<PathBuf> {
        let directory = directory(base, name)?;
        let path = directory.path().to_owned();
        self.directories.push(directory);
        Ok(path)
    }

    /// The directory with a volume's sockets and logs.
    pub fn volume_run(&self, name: &str) -> PathBuf {
        self.root.join("run/volumes").join(name)
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.root.join("run/control.sock")
    }

    /// Has everything from now on run behind this prefix.
    pub fn set_prefix(&mut self, prefix: Vec<String>) {
        self.prefix = prefix;
    }

    /// A command as this host's user runs it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let Some((first, rest)) = self.prefix.split_first() else { return Command::new(program) };
        let mut command = Command::new(first);
        command.args(rest).arg(program);
        command
    }

    /// Copies a program to where every user can run it, under this name.
    fn copy(&self, program: &Path, name: &OsStr) -> Result<PathBuf> {
        let directory = self.root.join("bin");
        let target = directory.join(name);
        let copied = fs::create_dir_all(&directory).and_then(|()| fs::copy(program, &target));
        copied.map_err(Error::io(format!("copy {}", program.display())))?;
        Ok(target)
    }

    /// Copies a program to where every user can run it.
    ///
    /// # Errors
    /// The operating system's.
    pub fn copied(&self, program: &Path) -> Result<PathBuf> {
        self.copy(program, program.file_name().expect("a program has a name"))
    }

    /// Runs copies of the programs: those of the build may lie where this host's user cannot go.
    ///
    /// # Errors
    /// One was not built, or cannot be copied.
    pub fn take_programs(&mut self) -> Result<()> {
        for name in PROGRAMS {
            self.copied(&programs::try_program(name)?)?;
        }
        self.programs = self.root.join("bin");
        Ok(())
    }

    /// Has volumes run on the faulty core, so that their storage nodes obey [`Faults`](crate::faults::Faults).
    ///
    /// # Errors
    /// As [`Host::take_programs`].
    pub fn take_faulty_core(&mut self) -> Result<()> {
        self.take_programs()?;
        // The control module starts volumes with the core beside itself.
        self.copy(&programs::try_program(FAULTY[0])?, OsStr::new("everdisk-core"))?;
        self.is_faulty = true;
        Ok(())
    }

    /// A program of this host's, or of the build.
    pub fn program(&self, name: &str) -> PathBuf {
        let copy = self.programs.join(name);
        if copy.is_file() { copy } else { programs::directory().join(name) }
    }

    /// The core of this release that an upgrade on this host goes to.
    pub fn core(&self) -> PathBuf {
        programs::program(if self.is_faulty { FAULTY[0] } else { "everdisk-core" })
    }

    /// The core of another version that an upgrade on this host goes to.
    pub fn core_next(&self) -> PathBuf {
        programs::program(if self.is_faulty { FAULTY[1] } else { CORE_NEXT })
    }

    fn with_directories(&self, program: &str) -> Command {
        let mut command = self.command(self.program(program));
        command.arg("--run-dir").arg(self.root.join("run")).arg("--state-dir").arg(self.root.join("state"));
        command
    }

    /// Options with which the control module is started from now on.
    pub fn set_daemon_options(&mut self, options: &[&str]) {
        self.daemon_options = options.iter().map(|option| (*option).to_owned()).collect();
    }

    /// The command line of `everdiskd` on this host.
    pub fn daemon_command(&self) -> Command {
        let mut command = self.with_directories("everdiskd");
        command.args(&self.daemon_options);
        command
    }

    /// Starts the control module and waits until it answers.
    ///
    /// # Errors
    /// It ends, or does not answer in time, or the operator interrupts it.
    pub fn start_daemon(&mut self, interrupt: &Interrupt) -> Result<()> {
        assert!(self.daemon.is_none(), "everdiskd runs already");
        let log = File::options().create(true).append(true).open(self.root.join("everdiskd.log"));
        let out = log.map_err(Error::io("make a log"))?;
        let err = out.try_clone().map_err(Error::io("make a log"))?;
        let mut command = self.daemon_command();
        command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        self.daemon = Some(command.spawn().map_err(Error::io("start everdiskd"))?);
        let answers = |host: &mut Self| {
            if !host.daemon_runs() {
                return Err(Error::Failed(format!("everdiskd ended\n{}", host.daemon_log())));
            }
            Ok(host.everdisk(&["volume", "list"])?.status.success().then_some(()))
        };
        let up = interrupt.wait_for("everdiskd answers", SOON, POLL_INTERVAL, || answers(self));
        up.map_err(|e| match e {
            Error::Failed(why) => Error::Failed(format!("{why}\n{}", self.daemon_log())),
            other => other,
        })
    }

    /// Whether the control module was started and has not ended.
    pub fn daemon_runs(&mut self) -> bool {
        self.daemon.as_mut().is_some_and(|daemon| daemon.try_wait().is_ok_and(|ended| ended.is_none()))
    }

    /// Process id of the control module.
    pub fn daemon_pid(&self) -> u32 {
        // Behind a prefix the child is the prefix' program, which has become ours by exec.
        self.daemon.as_ref().expect("everdiskd runs").id()
    }

    /// Ends the control module by this signal; whether it did in time.
    pub fn end_daemon(&mut self, by: Signal, limit: Duration) -> bool {
        let mut child = self.daemon.take().expect("everdiskd runs");
        let ended = processes::end(child.id(), by, limit);
        if !ended {
            let _ = child.kill();
        }
        let _ = child.wait();
        ended
    }

    /// What the control module logged.
    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.root.join("everdiskd.log")).unwrap_or_default()
    }

    /// A command line of the CLI.
    pub fn cli<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Command {
        let mut command = self.with_directories("everdisk");
        command.args(arguments);
        command
    }

    /// Runs the CLI.
    ///
    /// # Errors
    /// It cannot be run or does not end. A command that fails is no error here.
    pub fn everdisk<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Result<Output> {
        try_run(self.cli(arguments), COMMAND_LIMIT)
    }

    /// Everything that names this host's directories and was not started just now.
    pub fn processes(&self) -> Vec<processes::Process> {
        self.directories.iter().flat_map(|directory| processes::naming(directory.path())).collect()
    }

    /// Detaches everything and ends the control module; returns what was left over and had to be cleaned. What was told to
    /// end may take `grace` before it counts as left over.
    pub fn clean(&mut self, grace: Duration) -> Vec<String> {
        let mut left = Vec::new();
        if self.daemon_runs() {
            left.extend(self.detach_all());
            if !self.end_daemon(Signal::TERM, grace) {
                left.push("everdiskd did not end on SIGTERM".to_owned());
            }
        } else if self.daemon.take().is_some() {
            left.push("everdiskd had ended by itself".to_owned());
        }
        let deadline = Instant::now() + grace;
        while !self.processes().is_empty() && Instant::now() < deadline {
            thread::sleep(POLL_INTERVAL);
        }
        for process in self.processes() {
            left.push(format!("process {}: {}", process.pid, process.line));
            processes::end(process.pid, Signal::KILL, SOON);
        }
        for directory in &self.directories {
            for mount in processes::mounts_in(directory.path()) {
                left.push(format!("mount {}", mount.display()));
                processes::unmount(&mount);
            }
        }
        left
    }

    /// Removes the directories; returns what could not be, and what is still there.
    pub fn remove(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        for directory in self.directories.drain(..) {
            let path = directory.path().to_owned();
            let still = processes::naming(&path);
            left.extend(still.into_iter().map(|process| format!("process {}: {}", process.pid, process.line)));
            left.extend(processes::mounts_in(&path).into_iter().map(|mount| format!("mount {}", mount.display())));
            if let Err(e) = directory.close() {
                left.push(format!("directory {}: {e}", path.display()));
            }
        }
        left
    }

    fn detach_all(&self) -> Vec<String> {
        let ask = |arguments: &[&str]| match self.everdisk(arguments) {
            Ok(output) if output.status.success() => Ok(output.stdout),
            Ok(output) => Err(format!("{}: {}", output.shown, output.stderr)),
            Err(e) => Err(e.to_string()),
        };
        let list = match ask(&["--json", "volume", "list"]) {
            Ok(list) => list,
            Err(e) => return vec![e],
        };
        let attached = volumes(&list).into_iter().filter(|(_, state)| state != "detached");
        attached.filter_map(|(name, _)| ask(&["detach", &name, "--force", "--yes"]).err()).collect()
    }
}

fn directory(base: &Path, name: &str) -> Result<TempDir> {
    TempDir::with_prefix_in(name, base).map_err(Error::io("make a temporary directory"))
}

/// Names and states in the output of `volume list`: one array, or one object a line.
fn volumes(text: &str) -> Vec<(String, String)> {
    let values: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let lines = values.iter().flat_map(|value| match value {
        Value::Array(lines) => lines.clone(),
        Value::Object(map) => match map.get("volumes") {
            Some(Value::Array(lines)) => lines.clone(),
            _ => vec![value.clone()],
        },
        _ => Vec::new(),
    });
    let of = |line: &Value, key: &str| line[key].as_str().map(str::to_owned);
    lines.filter_map(|line| Some((of(&line, "name")?, of(&line, "state")?))).collect()
}

/// The last lines of every log of the host in `root`.
pub fn logs(root: &Path, lines: usize) -> String {
    let mut files: Vec<PathBuf> = vec![root.join("everdiskd.log")];
    for volume in fs::read_dir(root.join("run/volumes")).into_iter().flatten().flatten() {
        let logs = fs::read_dir(volume.path()).into_iter().flatten().flatten().map(|entry| entry.path());
        files.extend(logs.filter(|path| path.extension().is_some_and(|e| e == "log")));
    }
    let mut text = String::new();
    for file in files {
        let content = fs::read_to_string(&file).unwrap_or_default();
        let all: Vec<&str> = content.lines().collect();
        let _ = writeln!(text, "--- {}\n{}", file.display(), all[all.len().saturating_sub(lines)..].join("\n"));
    }
    text
}
