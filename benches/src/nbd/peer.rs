//! The peers of the NBD front end: other servers of the protocol, each with a raw image of its own and its own defaults.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use everdisk_harness::{interrupt::Interrupt, nbd::Address, processes, run::try_run};
use rustix::process::Signal;

use super::target;
use crate::{Error, Result, fio::Target, host::VOLUME};

/// A server takes clients, and ends, within this time.
const WITHIN: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// nbdkit with its plugin `file`; 16 threads.
    Nbdkit,
    /// The same, and its filter `delay`: every read and write takes 1 ms longer.
    NbdkitDelayed,
    /// qemu-nbd, for up to 8 clients; cache writeback, aio threads.
    QemuNbd,
    /// nbd-server; 4 threads, simple replies only.
    NbdServer,
}

impl Kind {
    /// All that are as quick as they can be.
    pub const ALL: [Self; 3] = [Self::Nbdkit, Self::QemuNbd, Self::NbdServer];

    /// For tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nbdkit => "nbdkit file",
            Self::NbdkitDelayed => "nbdkit file, delayed",
            Self::QemuNbd => "qemu-nbd",
            Self::NbdServer => "nbd-server",
        }
    }

    /// The program.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Nbdkit | Self::NbdkitDelayed => "nbdkit",
            Self::QemuNbd => "qemu-nbd",
            Self::NbdServer => "nbd-server",
        }
    }

    /// What is run; further files of it are beside the image.
    fn command(self, image: &Path, address: &Address) -> Result<Command> {
        match self {
            Self::Nbdkit | Self::NbdkitDelayed => {
                let mut command = Command::new(self.program());
                command.args(["--foreground", "--exit-with-parent"]);
                match address {
                    Address::Unix(path) => command.arg("-U").arg(path),
                    Address::Tcp(to) => command.args(["-i", &to.ip().to_string(), "-p", &to.port().to_string()]),
                };
                if self == Self::NbdkitDelayed {
                    command.arg("--filter=delay");
                }
                command.arg("file").arg(image);
                if self == Self::NbdkitDelayed {
                    command.args(["rdelay=1ms", "wdelay=1ms"]);
                }
                Ok(command)
            }
            Self::QemuNbd => {
                let mut command = Command::new(self.program());
                command.args(["--persistent", "--format=raw", "--shared=8", "--export-name", VOLUME]);
                match address {
                    Address::Unix(path) => command.arg("--socket").arg(path),
                    Address::Tcp(to) => {
                        command.args(["--bind", &to.ip().to_string(), "--port", &to.port().to_string()])
                    }
                };
                command.arg(image);
                Ok(command)
            }
            Self::NbdServer => {
                let place = match address {
                    Address::Unix(path) => format!("unixsock = {}", path.display()),
                    Address::Tcp(to) => format!("listenaddr = {}\nport = {}", to.ip(), to.port()),
                };
                let text = format!("[generic]\n{place}\n[{VOLUME}]\nexportname = {}\n", image.display());
                let file = image.with_extension("conf");
                fs::write(&file, text).map_err(Error::io(format!("write {}", file.display())))?;
                let mut command = Command::new(self.program());
                command.arg("-C").arg(file).arg("-p").arg(image.with_extension("pid"));
                Ok(command)
            }
        }
    }
}

/// A server that runs.
#[derive(Debug)]
pub struct Peer {
    running: Running,
    target: Target,
}

#[derive(Debug)]
enum Running {
    Child(Child),
    /// nbd-server takes more than one client only as a daemon.
    Daemon(u32),
}

impl Peer {
    /// Makes a raw image at `image` and serves it at `address`; what else the server needs is beside the image.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(interrupt: &Interrupt, kind: Kind, image: &Path, bytes: u64, address: &Address) -> Result<Self> {
        let made = File::create(image).and_then(|image| image.set_len(bytes));
        made.map_err(Error::io(format!("make the image of {}", kind.name())))?;
        let mut command = kind.command(image, address)?;
        let running = match kind {
            Kind::Nbdkit | Kind::NbdkitDelayed | Kind::QemuNbd => {
                command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
                Running::Child(command.spawn().map_err(Error::io(format!("start {}", kind.name())))?)
            }
            Kind::NbdServer => Running::Daemon(daemon(interrupt, kind.name(), command, &image.with_extension("pid"))?),
        };
        let mut peer = Self { running, target: target(address) };
        interrupt.wait_for(&format!("{} takes clients", kind.name()), WITHIN, POLL_INTERVAL, || {
            if let Running::Child(child) = &mut peer.running
                && let Ok(Some(status)) = child.try_wait()
            {
                return Err(Error::Failed(format!("{} ended with {status}", kind.name())));
            }
            Ok(address.answers().then_some(()))
        })?;
        Ok(peer)
    }

    /// For fio.
    pub const fn target(&self) -> &Target {
        &self.target
    }
}

/// Starts a daemon and waits until it has told its process id.
fn daemon(interrupt: &Interrupt, name: &str, command: Command, pid_file: &Path) -> Result<u32> {
    let _ = fs::remove_file(pid_file);
    let ended = try_run(command, WITHIN)?;
    if !ended.status.success() {
        return Err(Error::Failed(format!("{name}: {}", ended.complaint())));
    }
    interrupt.wait_for(&format!("{name} tells its process id"), WITHIN, POLL_INTERVAL, || {
        Ok(fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse().ok()))
    })
}

impl Drop for Peer {
    fn drop(&mut self) {
        match &mut self.running {
            Running::Child(child) => {
                processes::end_child(child, WITHIN);
            }
            Running::Daemon(pid) => {
                if !processes::terminate(*pid, WITHIN) {
                    processes::signal(*pid, Signal::KILL);
                }
            }
        }
    }
}
