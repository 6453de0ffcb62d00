//! Processes started here that outlive this one: in a group of their own, with a file to write to, so that neither a
//! signal nor a closed pipe reaches them when the control module ends.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, Instant},
};

use crate::{
    process::ProcessId,
    programs::{last_line, spawn as spawn_command},
};

/// The next process that writes to a log longer than this begins the log anew.
const LOG_BYTES_MAX: u64 = 1 << 20;
/// Within this time after the end of a process its exit status is known.
const REAPED_WITHIN: Duration = Duration::from_secs(1);

/// A process that was started here.
#[derive(Clone, Debug)]
pub struct Child {
    /// The process.
    pub id: ProcessId,
    ended: Arc<OnceLock<ExitStatus>>,
    log: PathBuf,
    log_from: u64,
}

impl Child {
    /// Starts `command` with both outputs appended to `log`; `on_end` runs when it has ended.
    ///
    /// # Errors
    /// The operating system's.
    pub fn start(mut command: Command, log: &Path, on_end: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        let file = options.open(log)?;
        if file.metadata()?.len() > LOG_BYTES_MAX {
            file.set_len(0)?;
        }
        let log_from = file.metadata()?.len();
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        let mut child = spawn_command(&mut command)?;
        // Not reaped yet, so its start time can be read even if it has ended.
        let Some(id) = ProcessId::of(child.id()) else {
            // It would run, and nobody would know of it.
            let _ = child.kill().and_then(|()| child.wait());
            return Err(io::Error::other("the start time of the process cannot be read"));
        };
        let ended = Arc::new(OnceLock::new());
        let told = Arc::clone(&ended);
        let reaping = thread::Builder::new().name(format!("reap-{}", id.pid)).spawn(move || {
            // Where SIGCHLD was ignored when this process was started, the kernel keeps no exit status.
            if let Ok(status) = child.wait() {
                told.set(status).expect("a process ends once");
            }
            on_end();
        });
        if let Err(e) = reaping {
            // Here too.
            id.end(Duration::ZERO);
            return Err(e);
        }
        Ok(Self { id, ended, log: log.to_owned(), log_from })
    }

    /// How it ended, once it has.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.ended.get().copied()
    }

    /// The exit status, once it has gone: the reaper may be a moment behind.
    pub fn ended_by_now(&self) -> Option<ExitStatus> {
        let deadline = Instant::now() + REAPED_WITHIN;
        while self.ended().is_none() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        self.ended()
    }

    /// The last line it wrote, or how it ended when it wrote none.
    pub fn last_words(&self) -> String {
        let line = match self.tail() {
            Ok(text) => last_line(&text),
            Err(e) => format!("its log {} cannot be read: {e}", self.log.display()),
        };
        match (line.is_empty(), self.ended()) {
            (false, _) => line,
            (true, Some(status)) => format!("it ended with {status} without a message"),
            (true, None) => "it has said nothing".to_owned(),
        }
    }

    fn tail(&self) -> io::Result<String> {
        let mut file = fs::File::open(&self.log)?;
        let from = self.log_from.max(file.metadata()?.len().saturating_sub(4096));
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(4096).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_end_and_the_last_words_of_a_child_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        fs::write(&log, "somebody else\n").unwrap();
        let (sender, receiver) = mpsc::channel();
        let mut command = Command::new("sh");
        command.args(["-c", "echo fine; echo 'node a is missing' >&2; exit 3"]);
        let child = Child::start(command, &log, move || sender.send(()).unwrap()).unwrap();
        receiver.recv_timeout(Duration::from_secs(5)).unwrap();
        assert_eq!(child.ended().unwrap().code(), Some(3));
        assert_eq!(child.last_words(), "node a is missing");
        assert!(!child.id.alive());

        let child = Child::start(Command::new("false"), &log, || {}).unwrap();
        assert!(child.id.end(Duration::from_secs(5)));
        assert_eq!(child.ended_by_now().unwrap().code(), Some(1));
        assert_eq!(child.last_words(), "it ended with exit status: 1 without a message");
    }
}
