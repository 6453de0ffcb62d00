//! A computing node of its own: directories, a control module, and an end at which nothing may be left over.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    processes,
    programs::{self, need_root},
    run::{Output, run},
    volume::Volume,
    wait::{SOON, until},
    watchdog::{self, Watchdog},
};

/// The CLI may take this long unless said otherwise: the longest upgrade that fails waits 20 s for its standby.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// What was told to end may take this long before it counts as left over.
const GRACE: Duration = Duration::from_secs(5);

/// Who the programs of a host run as.
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
    root: PathBuf,
    identity: Identity,
    daemon: Option<Child>,
    programs: Option<PathBuf>,
    is_faulty: bool,
    /// Until everything is cleaned.
    _watchdog: Watchdog,
    daemon_options: Vec<String>,
    _directory: tempfile::TempDir,
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
        host.take_programs();
        let core = host.root.join("bin/everdisk-core");
        fs::copy(programs::core_faulty(), core).expect("put the faulty core in the core's place");
        host.is_faulty = true;
        host.start_daemon();
        host
    }

    /// The directories alone.
    pub fn idle(identity: Identity) -> Self {
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let directory = tempfile::Builder::new().prefix("evd-").tempdir_in(base).expect("a temporary directory");
        let root = directory.path().to_owned();
        // Other users must come as far as the mounted file.
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).expect("open the directory");
        for name in ["run", "state", "nodes", "files"] {
            let path = root.join(name);
            fs::create_dir(&path).expect("make a directory");
            if let Some(uid) = identity.uid {
                std::os::unix::fs::chown(&path, Some(uid), Some(uid)).expect("give a directory away");
            }
        }
        Self {
            _watchdog: Watchdog::over(&root),
            root,
            identity,
            daemon: None,
            programs: None,
            is_faulty: false,
            daemon_options: Vec::new(),
            _directory: directory,
        }
    }

    /// The directory that holds everything.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of a new storage node.
    pub fn node(&self, name: &str) -> PathBuf {
        self.root.join("nodes").join(name)
    }

    /// A path to attach a volume to.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root.join("files").join(name)
    }

    /// The directory with a volume's sockets and logs.
    pub fn volume_run(&self, name: &str) -> PathBuf {
        self.root.join("run/volumes").join(name)
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.root.join("run/control.sock")
    }

    /// A command as this host's user runs it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let Some((first, rest)) = self.identity.prefix.split_first() else { return Command::new(program) };
        let mut command = Command::new(first);
        command.args(rest).arg(program);
        command
    }

    /// Options with which the control module is started from now on.
    pub fn set_daemon_options(&mut self, options: &[&str]) {
        self.daemon_options = options.iter().map(|option| (*option).to_owned()).collect();
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

    /// Has everything from now on run behind this prefix.
    pub fn set_prefix(&mut self, prefix: Vec<String>) {
        self.identity.prefix = prefix;
    }

    /// Copies a program to where every user can run it.
    pub fn copied(&self, program: &Path) -> PathBuf {
        let directory = self.root.join("bin");
        fs::create_dir_all(&directory).expect("make a directory");
        let target = directory.join(program.file_name().expect("a name"));
        fs::copy(program, &target).expect("copy a program");
        target
    }

    /// Runs copies of the programs: those of the build may lie where this host's user cannot go.
    pub fn take_programs(&mut self) {
        for name in ["everdisk", "everdiskd", "everdisk-interface", "everdisk-core"] {
            self.copied(&programs::program(name));
        }
        self.programs = Some(self.root.join("bin"));
    }

    fn program(&self, name: &str) -> PathBuf {
        self.programs.as_ref().map_or_else(|| programs::program(name), |directory| directory.join(name))
    }

    /// The core of this release that an upgrade on this host goes to.
    pub fn core(&self) -> PathBuf {
        if self.is_faulty { programs::core_faulty() } else { programs::core() }
    }

    /// The core of another version that an upgrade on this host goes to.
    pub fn core_next(&self) -> PathBuf {
        if self.is_faulty { programs::core_faulty_next() } else { programs::core_next() }
    }

    fn directories(&self, command: &mut Command) {
        command.arg("--run-dir").arg(self.root.join("run")).arg("--state-dir").arg(self.root.join("state"));
    }

    /// The command line of `everdiskd` on this host.
    pub fn daemon_command(&self) -> Command {
        let mut command = self.command(self.program("everdiskd"));
        self.directories(&mut command);
        command.args(&self.daemon_options);
        command
    }

    /// Starts the control module and waits until it answers.
    pub fn start_daemon(&mut self) {
        assert!(self.daemon.is_none(), "everdiskd runs already");
        let log = File::options().create(true).append(true).open(self.root.join("everdiskd.log")).expect("a log");
        let mut command = self.daemon_command();
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log).process_group(0);
        let mut child = command.spawn().expect("start everdiskd");
        until("everdiskd answers", || {
            let ended = child.try_wait().expect("ask for everdiskd");
            assert!(ended.is_none(), "everdiskd ended: {ended:?}\n{}", self.daemon_log());
            self.everdisk(&["volume", "list"]).status.success().then_some(())
        });
        self.daemon = Some(child);
    }

    /// Process id of the control module.
    pub fn daemon_pid(&self) -> u32 {
        let child = self.daemon.as_ref().expect("everdiskd runs");
        // Behind a prefix the child is the prefix' program, which has become ours by exec.
        child.id()
    }

    /// kill -9 of the control module.
    pub fn kill_daemon(&mut self) {
        let mut child = self.daemon.take().expect("everdiskd runs");
        child.kill().expect("kill everdiskd");
        child.wait().expect("wait for everdiskd");
    }

    /// Ends the control module politely.
    pub fn stop_daemon(&mut self) {
        let mut child = self.daemon.take().expect("everdiskd runs");
        assert!(processes::terminate(child.id(), SOON), "everdiskd does not end on SIGTERM");
        child.wait().expect("wait for everdiskd");
    }

    /// What the control module logged.
    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.root.join("everdiskd.log")).unwrap_or_default()
    }

    /// A command line of the CLI.
    pub fn cli(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(self.program("everdisk"));
        self.directories(&mut command);
        command.args(arguments);
        command
    }

    /// Runs the CLI.
    pub fn everdisk(&self, arguments: &[&str]) -> Output {
        run(self.cli(arguments), COMMAND_LIMIT)
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

    /// Everything that names this host's directories and was not started by the test just now.
    pub fn processes(&self) -> Vec<processes::Process> {
        processes::naming(&self.root)
    }

    /// Detaches everything and ends the control module; returns what was left over and had to be cleaned.
    fn clean(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        let runs = self.daemon.as_mut().is_some_and(|daemon| daemon.try_wait().is_ok_and(|ended| ended.is_none()));
        if runs {
            left.extend(self.detach_all());
        }
        if let Some(mut daemon) = self.daemon.take() {
            if !runs {
                left.push("everdiskd had ended by itself".to_owned());
            } else if !processes::terminate(daemon.id(), GRACE) {
                left.push("everdiskd did not end on SIGTERM".to_owned());
                let _ = daemon.kill();
            }
            let _ = daemon.wait();
        }
        let deadline = Instant::now() + GRACE;
        while !self.processes().is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        for process in self.processes() {
            left.push(format!("process {}: {}", process.pid, process.line));
            processes::kill(process.pid);
        }
        for mount in processes::mounts_in(&self.root) {
            left.push(format!("mount {mount}"));
            let flags = rustix::mount::UnmountFlags::DETACH | rustix::mount::UnmountFlags::NOFOLLOW;
            let _ = rustix::mount::unmount(&mount, flags);
        }
        left
    }

    fn detach_all(&self) -> Vec<String> {
        let ask = |arguments: &[&str]| {
            let output = run(self.cli(arguments), COMMAND_LIMIT);
            if output.status.success() {
                Ok(output.stdout)
            } else {
                Err(format!("{}: {}", output.shown, output.stderr))
            }
        };
        let list = match ask(&["--json", "volume", "list"]) {
            Ok(list) => list,
            Err(e) => return vec![e],
        };
        let mut left = Vec::new();
        for line in names(&list) {
            if line.1 != "detached"
                && let Err(e) = ask(&["detach", &line.0, "--force", "--yes"])
            {
                left.push(e);
            }
        }
        left
    }
}

/// Names and states in the output of `volume list`: one array, or one object a line.
fn names(text: &str) -> Vec<(String, String)> {
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

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", watchdog::logs(&self.root));
        }
        let left = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.clean()));
        let left = left.unwrap_or_else(|_| vec!["the cleaning itself failed".to_owned()]);
        if thread::panicking() {
            eprintln!("cleaned: {left:?}");
        } else {
            assert!(left.is_empty(), "the test left behind: {left:#?}\n{}", watchdog::logs(&self.root));
        }
    }
}
