//! The command line.

use std::{env, ffi::OsString, path, path::PathBuf, sync::LazyLock, time::Duration};

use clap::{ArgGroup, Args, CommandFactory, Parser, Subcommand, error::ErrorKind};
use everdisk_api::{Handover, frontends::check_set, quantity};
use everdisk_proto::volume::Bypass;
use everdisk_proto::{
    identity::{Component, Identity},
    ids::VolumeName,
    nbd::{BadNbdAddress, NbdAddress},
    volume::NodeUrl,
};

/// Under `attach --help`.
const EXAMPLES: &str = "\
Examples:
  everdisk attach v --file /srv/v.img
  everdisk attach v --nbd unix:/run/v.sock --nbd tcp:localhost:10809
  everdisk attach v --file /srv/v.img --nbd unix:/run/v.sock --mode 0660 --owner 0:107";

/// What `--version` prints after the name of the program.
static VERSION: LazyLock<String> = LazyLock::new(|| Identity::current(Component::Control).details());

/// Serve block volumes, and upgrade the client software while applications use them
#[derive(Debug, Parser)]
#[command(version = VERSION.as_str(), max_term_width = 100)]
pub(crate) struct Arguments {
    /// Sockets and logs [default: /run/everdisk as root, else $XDG_RUNTIME_DIR/everdisk]
    #[arg(long, global = true, value_name = "DIR", env = "EVERDISK_RUN_DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// Volumes and journals [default: /var/lib/everdisk as root, else $XDG_STATE_HOME/everdisk]
    #[arg(long, global = true, value_name = "DIR", env = "EVERDISK_STATE_DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Print JSON: one object, or one a line for lists
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Arguments {
    /// Reads the command line of this program. Wrong usage ends it with exit status 2.
    pub(crate) fn read() -> Self {
        Self::try_read(env::args_os()).unwrap_or_else(|e| e.exit())
    }

    /// Reads a command line, and checks what no option can check alone.
    fn try_read(line: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Self, clap::Error> {
        let arguments = Self::try_parse_from(line)?;
        if let Command::Attach(attach) = &arguments.command {
            check_set(attach.file.is_some(), &attach.nbd).map_err(|why| {
                let mut command = Self::command();
                command.build();
                let attach = command.find_subcommand_mut("attach").cloned();
                attach.unwrap_or(command).error(ErrorKind::ValueValidation, why)
            })?;
        }
        Ok(arguments)
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the control module in the foreground
    Daemon {
        /// Time limit for a hung core, at least 1s. When requests wait and the serving core neither works on one nor answers
        /// for this long, it is killed and a standby takes over. Volumes that are already attached keep their limit
        #[arg(long, value_name = "TIME", value_parser = quantity::hang_limit, default_value = "10s")]
        hang_limit: Duration,
    },
    /// Create, show, grow, delete and forget volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Serve a volume as a file, to NBD clients, or both
    Attach(Attach),
    /// Flush a volume and close its front ends. Refused while NBD clients are connected, or while the file is in use anywhere on
    /// this machine (open, mapped, mounted elsewhere, or under a loop device)
    Detach {
        /// The volume
        name: VolumeName,
        /// Discard the data that cannot be flushed, and cut off the users of the volume. Prints first what would be lost, and asks
        /// for confirmation
        #[arg(long)]
        force: bool,
        /// With --force: do not ask for confirmation
        #[arg(long, requires = "force")]
        yes: bool,
    },
    /// Show the status of one volume, or of all volumes
    Status {
        /// The volume [default: all volumes]
        name: Option<VolumeName>,
    },
    /// List the problems of one volume, or of all volumes. Exit status 0: no problem; 1: problems, but I/O goes on; 2: I/O does
    /// not go on, or the control module does not answer
    Health {
        /// The volume [default: all volumes]
        name: Option<VolumeName>,
    },
    /// Make all acknowledged writes durable on the storage nodes
    Flush {
        /// The volume
        name: VolumeName,
    },
    /// Hold all I/O of a volume until `resume`, or until the lease ends
    Suspend {
        /// The volume
        name: VolumeName,
        /// Time after which I/O goes on even without `resume`, at most 100s
        #[arg(long, value_name = "TIME", value_parser = quantity::lease, default_value = "30s")]
        lease: Duration,
    },
    /// End a suspension: I/O goes on
    Resume {
        /// The volume
        name: VolumeName,
    },
    /// Replace the core of a volume while it is in use
    Upgrade(Upgrade),
    /// Return to the core build that ran before the last committed upgrade. Works once for each upgrade. During the soak of an
    /// upgrade, stops that upgrade and rolls it back
    Rollback {
        /// The volume
        name: VolumeName,
    },
    /// Check what Everdisk needs from this machine, and say how to fix what is missing
    Doctor,
    /// Show the versions of this command and of the running control module
    Version,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume and format its storage nodes
    Create(Create),
    /// List all volumes
    List,
    /// Show a volume's description
    Show {
        /// The volume
        name: VolumeName,
    },
    /// Grow a detached volume
    Resize {
        /// The volume
        name: VolumeName,
        /// The new size, such as 20G
        #[arg(value_parser = quantity::volume_size)]
        size: u64,
    },
    /// Delete a detached volume and its data
    Delete {
        /// The volume
        name: VolumeName,
        /// Do not ask for confirmation
        #[arg(long)]
        yes: bool,
        /// Delete the volume even if storage nodes are missing. The data on the missing nodes stays there
        #[arg(long)]
        force: bool,
    },
    /// Forget a detached or damaged volume. Its files in the state directory are renamed, not removed; its storage nodes stay as
    /// they are
    Forget {
        /// The volume
        name: VolumeName,
        /// Do not ask for confirmation
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Name of the volume
    pub(crate) name: VolumeName,
    /// Size of the volume, such as 10G (powers of 1024)
    #[arg(long, value_parser = quantity::volume_size)]
    pub(crate) size: u64,
    /// A storage node: a directory (dir:/srv/a), or an export of an NBD server (nbd://host/export, nbd://host:port/export,
    /// nbd+unix:///export?socket=/path). Repeat the option to stripe over several nodes
    #[arg(long = "node", value_name = "URL", required = true)]
    pub(crate) nodes: Vec<NodeUrl>,
    /// Also create the directories of the storage nodes. `volume delete` removes directories that were created this way
    #[arg(long)]
    pub(crate) create_dir: bool,
    /// Overwrite an export that is not empty: its data are lost. An export that is a storage node of another volume is still refused
    #[arg(long)]
    pub(crate) force: bool,
    /// Stripe unit: size of the pieces in which the volume is distributed over its nodes
    #[arg(long, value_parser = quantity::stripe, default_value = "4M")]
    pub(crate) stripe: u64,
    /// Copies of the data; only 1 in this version
    #[arg(long, default_value_t = 1, value_parser = one_copy)]
    pub(crate) replicas: u32,
    /// Size of the write buffer, from 2M to 1G. With 0, every write goes through to the storage nodes before it is acknowledged
    #[arg(long, value_name = "SIZE", value_parser = quantity::buffer, default_value = "64M")]
    pub(crate) buffer: u64,
    /// Whether writes may bypass the write buffer: auto, or never. With auto, writes bypass it when the storage nodes are as fast
    /// as the buffer. Use never for nodes that report a failed write late or not at all (thin disks, NFS): no write is then
    /// acknowledged from their page cache alone
    #[arg(long, value_name = "WHEN", value_parser = bypass, default_value = "auto")]
    pub(crate) bypass: Bypass,
    /// A write that finds no room in the write buffer fails when nothing has become durable for this time. So does a write that
    /// waits for the last write of a core before. The kernel warns about applications that wait for more than 120 s
    #[arg(long, value_name = "TIME", value_parser = quantity::duration, default_value = "60s")]
    pub(crate) room_timeout: Duration,
    /// The same while a storage node reports that it is full
    #[arg(long, value_name = "TIME", value_parser = quantity::duration, default_value = "2s")]
    pub(crate) full_node_timeout: Duration,
    /// A flush (fsync) that has not ended after this time fails
    #[arg(long, value_name = "TIME", value_parser = quantity::duration, default_value = "60s")]
    pub(crate) flush_timeout: Duration,
    /// A read, or a write past the buffer, fails with EIO when its storage node has been out of reach for this time
    #[arg(long, value_name = "TIME", value_parser = quantity::duration, default_value = "120s")]
    pub(crate) io_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("front ends").args(["file", "nbd"]).required(true).multiple(true), after_help = EXAMPLES)]
pub(crate) struct Attach {
    /// The volume
    pub(crate) name: VolumeName,
    /// Serve the volume as this file, which is created if it does not exist. Together with --nbd, the file cannot be mapped
    /// shared (mmap fails with ENODEV)
    #[arg(long, value_name = "PATH")]
    pub(crate) file: Option<PathBuf>,
    /// Serve the volume to NBD clients at unix:PATH or tcp:HOST:PORT (an IPv6 host in brackets; port 0 lets the system choose).
    /// May be given up to 8 times, and together with --file. TCP is neither encrypted nor authenticated: stay on loopback, or
    /// use a tunnel
    #[arg(long, value_name = "ADDRESS", value_parser = nbd_address)]
    pub(crate) nbd: Vec<NbdAddress>,
    /// Let users other than the file's owner access the file, as far as --mode permits
    #[arg(long, requires = "file")]
    pub(crate) allow_other: bool,
    /// Permission bits of the file and of UNIX sockets, octal. Write permission on a socket is permission to connect
    #[arg(long, value_parser = mode, default_value = "0600")]
    pub(crate) mode: u32,
    /// Owner of the file and of UNIX sockets, as numeric ids [default: the user and group of the control module]
    #[arg(long, value_name = "UID:GID", value_parser = owner)]
    pub(crate) owner: Option<(u32, u32)>,
}

#[derive(Debug, Args)]
pub(crate) struct Upgrade {
    /// The volume
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) name: Option<VolumeName>,
    /// Upgrade all attached volumes, one after the other; stop at the first failure
    #[arg(long)]
    pub(crate) all: bool,
    /// The new everdisk-core program
    #[arg(long, value_name = "FILE", required_unless_present = "package", conflicts_with = "package")]
    pub(crate) core: Option<PathBuf>,
    /// An upgrade package; not in this version
    #[arg(long, value_name = "FILE", value_parser = no_package)]
    pub(crate) package: Option<PathBuf>,
    /// What happens to buffered data. With flush, it is sent to the storage nodes before the hand-over. With carry, the new core
    /// adopts it as it is. This version has no overlap
    #[arg(long, default_value = "flush", value_parser = handover)]
    pub(crate) handover: Handover,
    /// Time limit for --handover flush. When it is exceeded, the new core adopts the data that is still buffered; if it cannot,
    /// the upgrade is aborted
    #[arg(long, value_name = "TIME", value_parser = quantity::duration, default_value = "30s")]
    pub(crate) flush_limit: Duration,
    /// Time limit for drain and probe together, at most 5s. When it is exceeded, the gate returns to the old core
    #[arg(long, value_name = "TIME", value_parser = quantity::pause_budget, default_value = "100ms")]
    pub(crate) pause_budget: Duration,
    /// How long the old core stays parked after the switch, ready for a rollback, while the new core is watched
    #[arg(long, value_name = "TIME", value_parser = quantity::duration, default_value = "10s")]
    pub(crate) soak: Duration,
    /// Only check the upgrade and print what it would do
    #[arg(long)]
    pub(crate) plan: bool,
}

/// Parses an address for NBD clients and makes a relative path absolute.
fn nbd_address(text: &str) -> Result<NbdAddress, String> {
    let relative = text.strip_prefix("unix:").filter(|path| !path.is_empty() && !path.starts_with('/'));
    let Some(relative) = relative else { return text.parse().map_err(|e: BadNbdAddress| e.to_string()) };
    let path = path::absolute(relative).map_err(|e| format!("cannot find {relative}: {e}"))?;
    let path = path.to_str().ok_or_else(|| format!("the path of {relative} is not valid UTF-8"))?;
    format!("unix:{path}").parse().map_err(|e: BadNbdAddress| e.to_string())
}

fn one_copy(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(1) => Ok(1),
        Ok(_) => Err("copies of the data are not in this version; leave it out".to_owned()),
        Err(e) => Err(format!("{e}")),
    }
}

fn no_package(_: &str) -> Result<PathBuf, String> {
    Err("packages are not in this version; use --core FILE".to_owned())
}

fn handover(text: &str) -> Result<Handover, String> {
    match text {
        "flush" => Ok(Handover::Flush),
        "carry" => Ok(Handover::Carry),
        "overlap" => Err("overlap is not in this version; use flush or carry".to_owned()),
        _ => Err("use flush or carry".to_owned()),
    }
}

fn mode(text: &str) -> Result<u32, String> {
    let bits = u32::from_str_radix(text.strip_prefix("0o").unwrap_or(text), 8).ok().filter(|bits| *bits <= 0o777);
    bits.ok_or_else(|| format!("{text:?} is not a set of permission bits: write them in octal, such as 0640"))
}

fn owner(text: &str) -> Result<(u32, u32), String> {
    let pair = text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    pair.ok_or_else(|| format!("{text:?} is not an owner: write user and group id as numbers, such as 1000:1000"))
}

fn bypass(text: &str) -> Result<Bypass, String> {
    match text {
        "auto" => Ok(Bypass::Auto),
        "never" => Ok(Bypass::Never),
        _ => Err("give auto or never".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use everdisk_proto::limits;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_the_limits() {
        let parse = |line: &str| Arguments::try_parse_from(line.split(' ')).unwrap().command;
        let Command::Volume(VolumeCommand::Create(create)) = parse("everdisk volume create v --size 1G --node dir:/a")
        else {
            panic!("not a volume create");
        };
        assert_eq!((create.buffer, create.stripe), (limits::BUFFER_DEFAULT, limits::STRIPE_DEFAULT));
        let Command::Upgrade(upgrade) = parse("everdisk upgrade v --core /c") else { panic!("not an upgrade") };
        assert_eq!((upgrade.flush_limit, upgrade.handover), (limits::FLUSH_LIMIT_DEFAULT, Handover::Flush));
        assert_eq!(upgrade.pause_budget, limits::PAUSE_BUDGET_DEFAULT);
        let Command::Daemon { hang_limit } = parse("everdisk daemon") else { panic!("not a daemon") };
        assert_eq!(hang_limit, limits::HANG_LIMIT_DEFAULT);
    }

    fn addresses(line: &str) -> Result<Vec<String>, clap::Error> {
        let Command::Attach(attach) = Arguments::try_read(line.split(' '))?.command else { panic!("not an attach") };
        Ok(attach.nbd.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_relative_socket_path_is_made_absolute() {
        let own = env::current_dir().unwrap();
        let expected = [format!("unix:{}", own.join("x/v.sock").display()), "unix:/v".to_owned()];
        assert_eq!(addresses("everdisk attach v --nbd unix:./x/v.sock --nbd unix:/v").unwrap(), expected);
    }

    #[test]
    fn an_address_is_named_once_and_there_are_not_more_than_a_volume_has() {
        let twice = addresses("everdisk attach v --nbd tcp:localhost:1 --nbd tcp:localhost:1").unwrap_err();
        assert!(twice.exit_code() == 2 && twice.to_string().contains("named twice"), "{twice}");
        let line = |n: usize| (0..n).fold("everdisk attach v".to_owned(), |line, n| format!("{line} --nbd unix:/{n}"));
        assert_eq!(addresses(&line(limits::LISTENERS_MAX)).unwrap().len(), limits::LISTENERS_MAX);
        let many = addresses(&line(limits::LISTENERS_MAX + 1)).unwrap_err();
        assert!(many.exit_code() == 2 && many.to_string().contains("at most 8"), "{many}");
    }

    #[test]
    fn commands_of_the_contract_parse_and_wrong_ones_do_not() {
        let parse = |line: &str| Arguments::try_read(line.split(' '));
        for good in [
            "everdisk daemon",
            "everdisk daemon --hang-limit 5s",
            "everdisk health",
            "everdisk health v --json",
            "everdisk --run-dir /r --state-dir /s --json status",
            "everdisk status v --json",
            "everdisk volume create v --size 10G --node dir:/a --node dir:/b --stripe 4M --buffer 0 --replicas 1",
            "everdisk volume create v --size 10G --node dir:/a --buffer 64M",
            "everdisk volume resize v 20G",
            "everdisk volume delete v --yes",
            "everdisk volume delete v --force --yes",
            "everdisk volume forget v",
            "everdisk volume create v --size 1G --node dir:/a --create-dir",
            "everdisk detach v --force --yes",
            "everdisk attach v --file /srv/v --allow-other --mode 0640 --owner 10:20",
            "everdisk volume create v --size 10G --node nbd://host/a --node nbd://[::1]:99/b --node dir:/c --io-timeout 30s",
            "everdisk volume create v --size 10G --node nbd+unix:///?socket=/run/a.sock --force",
            "everdisk attach v --nbd unix:/run/v.sock --mode 0660",
            "everdisk attach v --file f --nbd unix:v.sock --nbd tcp:localhost:10809 --nbd tcp:[::1]:0",
            "everdisk detach v --force",
            "everdisk suspend v --lease 30s",
            "everdisk upgrade v --core /c --handover flush --pause-budget 100ms --soak 10s --plan",
            "everdisk upgrade v --core /c --handover carry",
            "everdisk upgrade v --core /c --flush-limit 5s",
            "everdisk upgrade --all --core /c",
            "everdisk rollback v",
            "everdisk doctor",
            "everdisk version",
        ] {
            assert!(parse(good).is_ok(), "{good}: {}", parse(good).unwrap_err());
        }
        for bad in [
            "everdisk",
            "everdisk volume create v --size 10G",
            "everdisk volume create v --size ten --node dir:/a",
            "everdisk volume create ../v --size 10G --node dir:/a",
            "everdisk volume create v --size 10G --node dir:a",
            "everdisk volume create v --size 10G --node nbd:host/a",
            "everdisk volume create v --size 10G --node nbds://host/a",
            "everdisk volume create v --size 10G --node nbd://host/a --io-timeout 30",
            "everdisk attach v",
            "everdisk attach v --nbd /run/v.sock",
            "everdisk attach v --nbd unix:",
            "everdisk attach v --nbd unix:dir/",
            "everdisk attach v --nbd tcp:10809",
            "everdisk attach v --nbd unix:/run/v.sock --allow-other",
            "everdisk attach v --file /f --mode 9999",
            "everdisk attach v --file /f --owner root",
            "everdisk upgrade v",
            "everdisk upgrade --core /c",
            "everdisk upgrade v --all --core /c",
            "everdisk upgrade v --core /c --handover jump",
            "everdisk upgrade v --core /c --flush-limit 5",
            "everdisk upgrade v --core /c --pause-budget 0",
            "everdisk upgrade v --core /c --pause-budget 6s",
            "everdisk suspend v --lease 5",
            "everdisk daemon --hang-limit 900ms",
            "everdisk suspend v --lease 200s",
            "everdisk suspend v --lease 0s",
            "everdisk detach v --yes",
            "everdisk upgrade v --core /c --handover overlap",
            "everdisk upgrade v --package /p",
            "everdisk volume create v --size 0 --node dir:/a",
            "everdisk volume create v --size 10 --node dir:/a",
            "everdisk volume create v --size 1G --node dir:/a --replicas 2",
            "everdisk volume create v --size 1G --node dir:/a --stripe 1",
            "everdisk volume create v --size 1G --node dir:/a --buffer 4K",
            "everdisk volume resize v 10",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
