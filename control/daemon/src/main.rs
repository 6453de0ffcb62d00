//! `everdiskd`: the control module in the foreground.
#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode, sync::LazyLock, time::Duration};

use clap::Parser;
use everdisk_api::{directories::Directories, quantity};
use everdisk_proto::identity::{Component, Identity};

/// What `--version` says after the name of the program.
static VERSION: LazyLock<String> = LazyLock::new(|| Identity::current(Component::Control).details());

/// The control module of Everdisk: starts, watches and upgrades the volumes of this host.
#[derive(Debug, Parser)]
#[command(version = VERSION.as_str())]
struct Arguments {
    /// Sockets and logs [default: /run/everdisk as root, else $XDG_RUNTIME_DIR/everdisk]
    #[arg(long, value_name = "DIR", env = "EVERDISK_RUN_DIR")]
    run_dir: Option<PathBuf>,
    /// Volumes and journals [default: /var/lib/everdisk as root, else $XDG_STATE_HOME/everdisk]
    #[arg(long, value_name = "DIR", env = "EVERDISK_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// A core that serves, does nothing and does not answer for this long while requests wait is killed, and the standby takes over;
    /// at least 1s. Of volumes that are attached already it is the one they were attached with
    #[arg(long, value_name = "TIME", value_parser = quantity::hang_limit, default_value = "10s")]
    hang_limit: Duration,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    everdisk_telemetry::init();
    let root = rustix::process::geteuid().is_root();
    let ended = match Directories::resolve(arguments.run_dir, arguments.state_dir, root) {
        Ok(directories) => everdiskd::run(directories, arguments.hang_limit).map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("everdiskd: {message}");
            ExitCode::FAILURE
        }
    }
}
