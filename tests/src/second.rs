//! A second control module on the same computing node, with directories of its own choice.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::{
    host::Host,
    processes, programs,
    run::{Output, run},
    wait::until,
};

const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// It; killed when it is dropped. Its volumes are to be detached before.
#[derive(Debug)]
pub struct Second {
    run: PathBuf,
    state: PathBuf,
    daemon: Child,
}

impl Second {
    /// Starts it with these directories under the host's root and waits until it answers.
    pub fn start(host: &Host, run_dir: &str, state_dir: &str) -> Self {
        let (run, state) = (host.root().join(run_dir), host.root().join(state_dir));
        let mut command = Command::new(programs::program("everdiskd"));
        command.arg("--run-dir").arg(&run).arg("--state-dir").arg(&state);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut second = Self { run, state, daemon: command.spawn().expect("start everdiskd") };
        until("the second everdiskd answers", || {
            let ended = second.daemon.try_wait().expect("ask for everdiskd");
            assert!(ended.is_none(), "the second everdiskd ended: {ended:?}");
            second.everdisk(&["volume", "list"]).status.success().then_some(())
        });
        second
    }

    /// A command line of the CLI that asks it.
    pub fn cli(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(programs::program("everdisk"));
        command.arg("--run-dir").arg(&self.run).arg("--state-dir").arg(&self.state).args(arguments);
        command
    }

    /// Runs the CLI with it.
    pub fn everdisk(&self, arguments: &[&str]) -> Output {
        run(self.cli(arguments), COMMAND_LIMIT)
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        processes::kill(self.daemon.id());
        let _ = self.daemon.wait();
    }
}

/// Copies a state directory, as a backup does.
pub fn copy_state(host: &Host, to: &str) -> PathBuf {
    let copy = host.root().join(to);
    let (from, to): (&Path, &Path) = (&host.root().join("state"), &copy);
    crate::run::sh("cp", &["-a".as_ref(), from.as_os_str(), to.as_os_str()]);
    copy
}
