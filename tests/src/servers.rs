//! NBD servers of others, for storage nodes: nbdkit, qemu-nbd and nbd-server, each with an export in memory.

use std::{
    fs,
    io::ErrorKind,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use everdisk_harness::{Error, pass, programs::need};
use tempfile::TempDir;

use crate::{
    processes::{self, Frozen},
    wait::{SOON, until_true},
    watchdog::Watchdog,
};

/// A program that serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// nbdkit with its file plugin, which has no names: any export is the same one.
    Nbdkit,
    /// qemu-nbd, which knows the export `disk` only.
    QemuNbd,
    /// nbd-server with the export `disk`. It has a process for each connection.
    NbdServer,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Nbdkit, Self::QemuNbd, Self::NbdServer];

    /// Its program.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Nbdkit => "nbdkit",
            Self::QemuNbd => "qemu-nbd",
            Self::NbdServer => "nbd-server",
        }
    }
}

/// A server on a UNIX socket with one export, `disk`. Make it before the host whose volume uses it, so that it goes after it.
#[derive(Debug)]
pub struct Server {
    kind: Kind,
    /// Clients can only read.
    read_only: bool,
    /// None: it has gone, or is a daemon.
    children: Vec<Child>,
    directory: TempDir,
    /// Until all its processes have ended.
    _watchdog: Watchdog,
}

impl Server {
    /// A server whose export has this many bytes, all of them zero.
    pub fn new(kind: Kind, bytes: u64) -> Self {
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let directory = pass(TempDir::with_prefix_in("evd-nbd-", base).map_err(Error::io("make a directory")));
        let watchdog = Watchdog::over(directory.path());
        let mut server = Self { kind, read_only: false, children: Vec::new(), directory, _watchdog: watchdog };
        server.set_len(bytes);
        server.start();
        server
    }

    /// Starts it again, for readers only.
    pub fn make_read_only(&mut self) {
        self.kill();
        self.read_only = true;
        self.start();
    }

    /// The file that it exports.
    pub fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// The socket that it listens at.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// Its export, as a storage node.
    pub fn node(&self) -> String {
        self.export("disk")
    }

    /// An export of this name.
    pub fn export(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }

    /// Gives the export this many bytes. A server that runs goes on with what it had.
    pub fn set_len(&self, bytes: u64) {
        let file = fs::File::options().create(true).write(true).truncate(false).open(self.image());
        pass(file.and_then(|file| file.set_len(bytes)).map_err(Error::io("make an image")));
    }

    /// Of nbdkit: starts another process on the same file, whose writes take this many seconds. Clients that connect from now on
    /// reach that one; a connection stays with the process that it has.
    pub fn writes_take(&mut self, seconds: u32) {
        assert_eq!(self.kind, Kind::Nbdkit, "the others have no such filter");
        let beside = self.directory.path().join("beside");
        let (socket, image) = (beside.display(), self.image());
        let mut command = Command::new(self.kind.program());
        command.args(["--foreground", "--exit-with-parent", "--filter=delay"]).arg(format!("--unix={socket}"));
        command.arg("file").arg(format!("file={}", image.display())).arg(format!("delay-write={seconds}"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.children.push(pass(command.spawn().map_err(Error::io("start nbdkit"))));
        until_true("the other process listens", || UnixStream::connect(&beside).is_ok());
        pass(fs::rename(&beside, self.socket()).map_err(Error::io("put its socket in place")));
    }

    /// Starts it (again), and waits until it listens.
    pub fn start(&mut self) {
        need(self.kind.program());
        assert_eq!(self.processes(), [0; 0], "it runs");
        // nbdkit and qemu-nbd leave it when they are killed.
        let removed = fs::remove_file(self.socket());
        assert!(
            removed.is_ok() || removed.is_err_and(|e| e.kind() == ErrorKind::NotFound),
            "the socket can be removed"
        );
        let mut command = pass(self.command().map_err(Error::io("describe the export to nbd-server")));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = pass(command.spawn().map_err(Error::io(format!("start {}", self.kind.program()))));
        if self.kind == Kind::NbdServer {
            // It takes several clients only as a daemon.
            pass(child.wait().map(drop).map_err(Error::io("wait for nbd-server")));
        } else {
            self.children.push(child);
        }
        until_true("the server listens", || UnixStream::connect(self.socket()).is_ok());
    }

    fn command(&self) -> std::io::Result<Command> {
        let (socket, image) = (self.socket(), self.image());
        let (socket, image) = (socket.display(), image.display());
        let mut command = Command::new(self.kind.program());
        match self.kind {
            Kind::Nbdkit => {
                command.args(["--foreground", "--exit-with-parent"]).arg(format!("--unix={socket}"));
                command.args(self.read_only.then_some("--readonly")).arg("file").arg(format!("file={image}"))
            }
            Kind::QemuNbd => {
                let fixed = ["--persistent", "--shared=0", "--format=raw", "--discard=unmap", "--export-name=disk"];
                command.args(fixed).args(self.read_only.then_some("--read-only"));
                command.arg(format!("--socket={socket}")).arg(format!("{image}"))
            }
            Kind::NbdServer => {
                let config = self.directory.path().join("config");
                let text = format!(
                    "[generic]\nunixsock = {socket}\n[disk]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n\
                     readonly = {}\n",
                    self.read_only
                );
                fs::write(&config, text)?;
                command.arg("-C").arg(config).arg("-p").arg(self.directory.path().join("pid"))
            }
        };
        Ok(command)
    }

    /// Its processes.
    pub fn processes(&self) -> Vec<u32> {
        // Other programs may name its socket.
        let own = |process: &processes::Process| process.line.starts_with(self.kind.program());
        processes::naming(self.directory.path()).into_iter().filter(own).map(|process| process.pid).collect()
    }

    /// kill -9 of all its processes.
    pub fn kill(&mut self) {
        // nbd-server has a new process for a connection that is made at this moment.
        until_true("the server has gone", || {
            let processes = self.processes();
            processes::kill_together(&processes);
            processes.is_empty()
        });
        self.reap();
    }

    /// It stands still, connections that are made then too, until the result is dropped.
    pub fn freeze(&self) -> Vec<Frozen> {
        self.processes().into_iter().map(processes::freeze).collect()
    }

    fn reap(&mut self) {
        for mut child in self.children.drain(..) {
            let _ = child.wait();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for pid in self.processes() {
            processes::end(pid, rustix::process::Signal::KILL, SOON);
        }
        self.reap();
    }
}

/// Exports of the three servers, each of this many bytes.
pub fn one_of_each(bytes: u64) -> [Server; 3] {
    Kind::ALL.map(|kind| Server::new(kind, bytes))
}
