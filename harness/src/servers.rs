//! NBD servers of others, for storage nodes: started, killed, started again.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use everdisk_proto::{
    nbd::NbdAddress,
    volume::{NbdExport, NodeUrl},
};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::{
    processes,
    programs::need,
    wait::{until, until_true},
};

/// Limit on the end of a server that was asked to end.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

/// A server, and the directory with its image and its socket. It ends on drop.
#[derive(Debug)]
pub struct Server {
    child: Option<Child>,
    /// nbd-server takes more than one client only as a daemon.
    daemon: Option<u32>,
    line: Vec<String>,
    export: NbdExport,
    directory: TempDir,
}

impl Server {
    fn new(line: impl FnOnce(&Path) -> Vec<String>, server: Option<NbdAddress>) -> Self {
        let directory = tempfile::tempdir().expect("make a directory for a server");
        let server = server.unwrap_or_else(|| NbdAddress::Unix(directory.path().join("socket")));
        let line = line(directory.path());
        Self { child: None, daemon: None, line, export: NbdExport { server, name: String::new() }, directory }
    }

    /// nbdkit on a UNIX socket; `@` in an argument stands for the directory.
    pub fn nbdkit(arguments: &[&str]) -> Self {
        need("nbdkit");
        let line = |directory: &Path| {
            let fixed = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", "@/socket"];
            fill(directory, fixed.iter().chain(arguments))
        };
        Self::new(line, None).started()
    }

    /// nbdkit on a TCP port.
    pub fn nbdkit_tcp(arguments: &[&str]) -> Self {
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
    pub fn nbdkit_file(size: u64, arguments: &[&str]) -> Self {
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
    pub fn qemu_nbd(size: u64) -> Self {
        Self::qemu(size, &["--format=raw", "@/image"])
    }

    /// The same with a minimum block of 4096 bytes.
    pub fn qemu_nbd_of_4096(size: u64) -> Self {
        let options =
            "driver=blkdebug,align=4096,discard=unmap,image.driver=file,image.filename=@/image,image.discard=unmap";
        Self::qemu(size, &["--image-opts", options])
    }

    fn qemu(size: u64, image_is: &[&str]) -> Self {
        need("qemu-nbd");
        let line = |directory: &Path| {
            image(directory, size);
            let all = ["qemu-nbd", "--persistent", "--shared=8", "--discard=unmap", "--socket=@/socket"];
            fill(directory, all.iter().chain(image_is))
        };
        Self::new(line, None).started()
    }

    /// qemu-nbd in front of the export of another server, which is on a UNIX socket.
    pub fn qemu_nbd_on(disk: &Self) -> Self {
        need("qemu-nbd");
        let disk = disk.url().to_string();
        let all = ["qemu-nbd", "--persistent", "--shared=8", "--format=raw", "--socket=@/socket", &disk];
        Self::new(|directory| fill(directory, all.iter()), None).started()
    }

    /// nbd-server that serves a file of this size.
    pub fn nbd_server(size: u64) -> Self {
        Self::nbd_server_with(size, "flush = true\nfua = true\ntrim = true\n")
    }

    /// The same with these lines in its configuration.
    pub fn nbd_server_with(size: u64, lines: &str) -> Self {
        need("nbd-server");
        let line = |directory: &Path| {
            image(directory, size);
            let text = "[generic]\nunixsock = @/socket\n[disk]\nexportname = @/image\nfilesize = %\n";
            let text = text.replace('@', &directory.display().to_string()).replace('%', &size.to_string());
            fs::write(directory.join("config"), text + lines).expect("write the server's configuration");
            fill(directory, ["nbd-server", "-C", "@/config", "-p", "@/pid"].iter())
        };
        let mut server = Self::new(line, None);
        server.export.name = "disk".into();
        server.start();
        server.child.take().expect("it was started").wait().expect("it becomes a daemon");
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
    pub fn start(&mut self) {
        let line = self.line.clone();
        self.start_with(&line);
    }

    /// Starts it with another command line.
    pub fn start_with(&mut self, line: &[String]) {
        assert!(self.child.is_none(), "it runs");
        if let NbdAddress::Unix(path) = &self.export.server {
            // nbdkit and qemu-nbd leave it when they are killed.
            let _ = fs::remove_file(path);
        }
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().expect("start a server"));
        until_true("the server listens", || match &self.export.server {
            NbdAddress::Unix(path) => UnixStream::connect(path).is_ok(),
            NbdAddress::Tcp { host, port } => TcpStream::connect((host.as_str(), *port)).is_ok(),
        });
    }

    /// Its command line.
    pub fn line(&self) -> Vec<String> {
        self.line.clone()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        processes::kill(child.id());
        child.wait().expect("it was killed");
    }

    /// Asks it to end.
    pub fn terminate(&mut self) {
        let mut child = self.child.take().expect("it runs");
        assert!(processes::end_child(&mut child, ENDS_WITHIN), "a server that is asked to end does not");
    }

    /// The file that it serves.
    pub fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// What it exports.
    pub const fn export(&self) -> &NbdExport {
        &self.export
    }

    /// The address of a storage node there.
    pub fn url(&self) -> NodeUrl {
        NodeUrl::Nbd(self.export.clone())
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

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its number").port()
}

fn image(directory: &Path, size: u64) {
    let file = fs::File::create(directory.join("image")).expect("make an image");
    file.set_len(size).expect("give it its size");
}

fn fill<'a>(directory: &Path, line: impl Iterator<Item = &'a &'a str>) -> Vec<String> {
    line.map(|part| part.replace('@', &directory.display().to_string())).collect()
}
