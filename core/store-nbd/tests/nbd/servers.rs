//! Real servers, started and ended by the tests.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use everdisk_harness::{
    processes,
    programs::need,
    wait::{until, until_true},
};
use everdisk_proto::nbd::NbdAddress;
use everdisk_store_nbd::{Address, Client, Config, Tls};
use rustix::process::Signal;
use tempfile::TempDir;

/// A server, and the directory with its image and its socket.
pub(crate) struct Server {
    child: Option<Child>,
    /// nbd-server takes more than one client only as a daemon.
    daemon: Option<u32>,
    line: Vec<String>,
    pub(crate) address: Address,
    directory: TempDir,
}

impl Server {
    fn new(line: impl FnOnce(&Path) -> Vec<String>, server: Option<NbdAddress>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = server.unwrap_or_else(|| NbdAddress::Unix(directory.path().join("socket")));
        let line = line(directory.path());
        let address = Address { server, export: String::new(), tls: Tls::Off };
        Self { child: None, daemon: None, line, address, directory }
    }

    /// nbdkit on a UNIX socket; `@` in an argument stands for the directory.
    pub(crate) fn nbdkit(arguments: &[&str]) -> Self {
        need("nbdkit");
        let line = |directory: &Path| {
            let fixed = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", "@/socket"];
            fill(directory, fixed.iter().chain(arguments))
        };
        Self::new(line, None).started()
    }

    /// nbdkit on a TCP port.
    pub(crate) fn nbdkit_tcp(arguments: &[&str]) -> Self {
        need("nbdkit");
        let port = free_port();
        let line = |directory: &Path| {
            let port = port.to_string();
            let fixed = ["nbdkit", "--foreground", "--exit-with-parent", "--ipaddr", "127.0.0.1", "--port", &port];
            fill(directory, fixed.iter().chain(arguments))
        };
        Self::new(line, Some(NbdAddress::Tcp { host: "127.0.0.1".into(), port })).started()
    }

    /// nbdkit that serves a file of this size.
    pub(crate) fn nbdkit_file(size: u64, arguments: &[&str]) -> Self {
        need("nbdkit");
        let line = |directory: &Path| {
            image(directory, size);
            let fixed = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", "@/socket"];
            // Parameters of filters stand behind the plugin.
            let (options, parameters): (Vec<&str>, Vec<&str>) =
                arguments.iter().partition(|part| part.starts_with('-'));
            fill(directory, fixed.iter().chain(&options).chain(&["file", "@/image"]).chain(&parameters))
        };
        Self::new(line, None).started()
    }

    /// qemu-nbd that serves a raw file of this size.
    pub(crate) fn qemu_nbd(size: u64) -> Self {
        need("qemu-nbd");
        let line = |directory: &Path| {
            image(directory, size);
            let all = ["qemu-nbd", "--persistent", "--shared=8", "--format=raw", "--discard=unmap"];
            fill(directory, all.iter().chain(&["--socket=@/socket", "@/image"]))
        };
        Self::new(line, None).started()
    }

    /// qemu-nbd in front of the export of another server.
    pub(crate) fn qemu_nbd_on(disk: &Self) -> Self {
        need("qemu-nbd");
        let NbdAddress::Unix(socket) = &disk.address.server else { unreachable!("it is on a UNIX socket") };
        let disk = format!("nbd+unix:///?socket={}", socket.display());
        let all = ["qemu-nbd", "--persistent", "--shared=8", "--format=raw", "--socket=@/socket", &disk];
        Self::new(|directory| fill(directory, all.iter()), None).started()
    }

    /// nbd-server that serves a file of this size.
    pub(crate) fn nbd_server(size: u64) -> Self {
        need("nbd-server");
        let line = |directory: &Path| {
            image(directory, size);
            let text = "[generic]\nunixsock = @/socket\n[disk]\nexportname = @/image\nfilesize = %\nflush = true\nfua = true\ntrim = true\n";
            let text = text.replace('@', &directory.display().to_string()).replace('%', &size.to_string());
            fs::write(directory.join("config"), text).unwrap();
            fill(directory, ["nbd-server", "-C", "@/config", "-p", "@/pid"].iter())
        };
        let mut server = Self::new(line, None);
        server.address.export = "disk".into();
        server.start();
        server.child.take().unwrap().wait().unwrap();
        let pid = until("nbd-server notes its process", || {
            fs::read_to_string(server.directory.path().join("pid")).ok()?.trim().parse().ok()
        });
        server.daemon = Some(pid);
        server
    }

    fn started(mut self) -> Self {
        self.start();
        self
    }

    /// Starts it (again).
    pub(crate) fn start(&mut self) {
        let line = self.line.clone();
        self.start_with(&line);
    }

    /// Starts it with another command line.
    pub(crate) fn start_with(&mut self, line: &[String]) {
        assert!(self.child.is_none(), "it runs");
        if let NbdAddress::Unix(path) = &self.address.server {
            // nbdkit and qemu-nbd leave it when they are killed.
            let _ = fs::remove_file(path);
        }
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().unwrap());
        until_true("the server listens", || match &self.address.server {
            NbdAddress::Unix(path) => UnixStream::connect(path).is_ok(),
            NbdAddress::Tcp { host, port } => TcpStream::connect((host.as_str(), *port)).is_ok(),
        });
    }

    /// Its command line.
    pub(crate) fn line(&self) -> Vec<String> {
        self.line.clone()
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        processes::kill(child.id());
        child.wait().unwrap();
    }

    /// Asks it to end.
    pub(crate) fn terminate(&mut self) {
        let mut child = self.child.take().unwrap();
        processes::end_child(&mut child, crate::kit::LIMIT);
    }

    /// The file that it serves.
    pub(crate) fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    pub(crate) fn client(&self, config: Config) -> Client {
        Client::connect(self.address.clone(), config).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(daemon) = self.daemon {
            processes::signal(daemon, Signal::TERM);
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The default export of a server.
pub(crate) fn parse(server: &str) -> Address {
    Address { server: server.parse().unwrap(), export: String::new(), tls: Tls::Off }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn image(directory: &Path, size: u64) {
    fs::File::create(directory.join("image")).unwrap().set_len(size).unwrap();
}

fn fill<'a>(directory: &Path, line: impl Iterator<Item = &'a &'a str>) -> Vec<String> {
    line.map(|part| part.replace('@', &directory.display().to_string())).collect()
}
