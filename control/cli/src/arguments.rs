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

/// What `--version` says after the name of the program.
static VERSION: LazyLock<String> = LazyLock::new(|| Identity::current(Component::Control).details());

/// Block volumes whose client software is upgraded while applications use them
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
        /// A core that serves, does nothing and does not answer for this long while requests wait is killed, and the standby takes
        /// over; at least 1s. Volumes that are attached already keep theirs
        #[arg(long, value_name = "TIME", value_parser = quantity::hang_limit, default_value = "10s")]
        hang_limit: Duration,
    },
    /// Make, show, grow and delete volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Serve a volume as a file, to NBD clients, or both
    Attach(Attach),
    /// Flush a volume and close its front ends; refuses while its file is in use anywhere on this machine (open, mapped, mounted elsewhere,
    /// under a loop device) or NBD clients are connected
    Detach {
        /// The volume
        name: VolumeName,
        /// Discard what cannot be flushed, and cut off the users of the volume. Prints what would be lost, and asks first
        #[arg(long)]
        force: bool,
        /// With --force: do not ask
        #[arg(long, requires = "force")]
        yes: bool,
    },
    /// Show how a volume, or every volume, stands
    Status {
        /// The volume; every volume when it is left out
        name: Option<VolumeName>,
    },
    /// Say what is wrong with a volume, or with any: exit status 0 when nothing is, 1 when I/O still goes on, 2 when it does
    /// not, or when the control module does not answer
    Health {
        /// The volume; every volume when it is left out
        name: Option<VolumeName>,
    },
    /// Make everything acknowledged durable on the storage nodes
    Flush {
        /// The volume
        name: VolumeName,
    },
    /// Hold all I/O of a volume until `resume`, or until the lease ends
    Suspend {
        /// The volume
        name: VolumeName,
        /// I/O goes on by itself after this time, at most 100s
        #[arg(long, value_name = "TIME", value_parser = quantity::lease, default_value = "30s")]
        lease: Duration,
    },
    /// Let I/O go on
    Resume {
        /// The volume
        name: VolumeName,
    },
    /// Replace the core of a volume while it is in use
    Upgrade(Upgrade),
    /// Go back to the build before the last committed upgrade, once; stops an upgrade that soaks
    Rollback {
        /// The volume
        name: VolumeName,
    },
    /// Say what this machine can and cannot do, and how to mend it
    Doctor,
    /// Show the versions of this command and of the running control module
    Version,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make a volume and format its storage nodes
    Create(Create),
    /// List all volumes
    List,
    /// Show a volume's description
    Show {
        /// The volume
        name: VolumeName,
    },
    /// Make a detached volume larger
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
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Although storage nodes are not there: what lies on them stays
        #[arg(long)]
        force: bool,
    },
    /// Forget a detached or damaged volume: its files in the state directory are put aside, its storage nodes stay as they are
    Forget {
        /// The volume
        name: VolumeName,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Its name
    pub(crate) name: VolumeName,
    /// Its size, such as 10G (powers of 1024)
    #[arg(long, value_parser = quantity::volume_size)]
    pub(crate) size: u64,
    /// A storage node, such as dir:/srv/a; repeat it to stripe over several
    #[arg(long = "node", value_name = "URL", required = true)]
    pub(crate) nodes: Vec<NodeUrl>,
    /// Make the directories of the storage nodes too; `volume delete` removes those again
    #[arg(long)]
    pub(crate) create_dir: bool,
    /// Stripe unit
    #[arg(long, value_parser = quantity::stripe, default_value = "4M")]
    pub(crate) stripe: u64,
    /// Copies of the data; only 1 in this version
    #[arg(long, default_value_t = 1, value_parser = one_copy)]
    pub(crate) replicas: u32,
    /// Write buffer, from 2M to 1G; 0: every write goes through to the storage nodes before it is acknowledged
    #[arg(long, value_name = "SIZE", value_parser = quantity::buffer, default_value = "64M")]
    pub(crate) buffer: u64,
    /// Whether writes may pass the write buffer by where the storage nodes are as quick: auto, or never. Never is for nodes that tell of
    /// a failed write late or not at all (thin disks, NFS): nothing is then acknowledged from their page cache alone
    #[arg(long, value_name = "WHEN", value_parser = bypass, default_value = "auto")]
    pub(crate) bypass: Bypass,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("front ends").args(["file", "nbd"]).required(true).multiple(true), after_help = EXAMPLES)]
pub(crate) struct Attach {
    /// The volume
    pub(crate) name: VolumeName,
    /// Mount it on this file, which is made if need be. Beside --nbd it cannot be mapped shared (mmap fails with ENODEV)
    #[arg(long, value_name = "PATH")]
    pub(crate) file: Option<PathBuf>,
    /// Serve it to NBD clients at unix:PATH or tcp:HOST:PORT (an IPv6 host in brackets; port 0 lets the system choose); at
    /// most 8 times, and beside --file. TCP is neither encrypted nor authenticated: stay on loopback, or use a tunnel
    #[arg(long, value_name = "ADDRESS", value_parser = nbd_address)]
    pub(crate) nbd: Vec<NbdAddress>,
    /// Let users other than the file's owner in, as far as --mode permits
    #[arg(long, requires = "file")]
    pub(crate) allow_other: bool,
    /// Permission bits of the file and of UNIX sockets, octal; who may write to a socket may connect
    #[arg(long, value_parser = mode, default_value = "0600")]
    pub(crate) mode: u32,
    /// Owner of the file and of UNIX sockets, by numbers [default: who runs the control module]
    #[arg(long, value_name = "UID:GID", value_parser = owner)]
    pub(crate) owner: Option<(u32, u32)>,
}

#[derive(Debug, Args)]
pub(crate) struct Upgrade {
    /// The volume
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) name: Option<VolumeName>,
    /// Every attached volume, one after the other; stops at the first failure
    #[arg(long)]
    pub(crate) all: bool,
    /// The new everdisk-core
    #[arg(long, value_name = "FILE", required_unless_present = "package", conflicts_with = "package")]
    pub(crate) core: Option<PathBuf>,
    /// An upgrade package; not in this version
    #[arg(long, value_name = "FILE", value_parser = no_package)]
    pub(crate) package: Option<PathBuf>,
    /// What becomes of buffered data: flush sends it to the storage nodes first, carry hands it over as it is; overlap is
    /// not in this version
    #[arg(long, default_value = "flush", value_parser = handover)]
    pub(crate) handover: Handover,
    /// By flush: when the storage nodes take longer, what is left is carried over, or the upgrade is aborted
    #[arg(long, value_name = "TIME", value_parser = quantity::duration, default_value = "30s")]
    pub(crate) flush_limit: Duration,
    /// The gate returns to the old core when drain and probe take longer, at most 5s
    #[arg(long, value_name = "TIME", value_parser = quantity::pause_budget, default_value = "100ms")]
    pub(crate) pause_budget: Duration,
    /// How long the old core stays parked while the new one is watched
    #[arg(long, value_name = "TIME", value_parser = quantity::duration, default_value = "10s")]
    pub(crate) soak: Duration,
    /// Only check, and say what would be done
    #[arg(long)]
    pub(crate) plan: bool,
}

/// An address for NBD clients, a relative path made absolute.
fn nbd_address(text: &str) -> Result<NbdAddress, String> {
    let relative = text.strip_prefix("unix:").filter(|path| !path.is_empty() && !path.starts_with('/'));
    let Some(relative) = relative else { return text.parse().map_err(|e: BadNbdAddress| e.to_string()) };
    let path = path::absolute(relative).map_err(|e| format!("cannot find {relative}: {e}"))?;
    let path = path.to_str().ok_or_else(|| format!("the path of {relative} is no UTF-8 text"))?;
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
    bits.ok_or_else(|| format!("{text:?} are no permission bits: write them in octal, such as 0640"))
}

fn owner(text: &str) -> Result<(u32, u32), String> {
    let pair = text.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    pair.ok_or_else(|| format!("{text:?} is no owner: write user and group id as numbers, such as 1000:1000"))
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
