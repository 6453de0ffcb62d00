//! Programs under a deadline. Each has a process group of its own: a Ctrl-C at the terminal is for us to deal with.

use std::{
    ffi::OsStr,
    io::Read,
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use everdisk_sys::{link::wait_readable, process::pidfd};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::{Error, Result, pass, processes};

/// What a program that has ended left.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command line, for messages.
    pub shown: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

impl Output {
    /// The exit status; −1 after a signal.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// The last line of its stderr, or its status when it said nothing.
    pub fn complaint(&self) -> String {
        let line = self.stderr.lines().rev().map(str::trim).find(|line| !line.is_empty());
        line.map_or_else(|| self.status.to_string(), str::to_owned)
    }

    /// Fails unless the program succeeded; gives its stdout.
    pub fn ok(self) -> String {
        assert!(self.status.success(), "{} ended with {}\n{}{}", self.shown, self.status, self.stdout, self.stderr);
        self.stdout
    }

    /// Fails unless the program ended with `code` and stderr says every one of `words`. A failure is one clear line,
    /// the last one; before it there may be lines of progress (not with `--json`).
    pub fn refused(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(
            self.code(),
            code,
            "{}: {}\nstdout: {}\nstderr: {}",
            self.shown,
            self.status,
            self.stdout,
            self.stderr
        );
        for word in words {
            assert!(self.stderr.contains(word), "{}: stderr lacks {word:?}: {}", self.shown, self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}: {}", self.shown, self.stderr);
        if code == 1 {
            let (progress, last) = self.stderr.trim_end().rsplit_once('\n').unwrap_or(("", &self.stderr));
            assert!(last.starts_with("everdisk"), "{}: the last line says what failed: {}", self.shown, self.stderr);
            let quiet = progress.is_empty() || !self.shown.contains("--json");
            let told = progress.lines().all(|line| line.contains(" s  "));
            assert!(quiet && told, "{}: one line is wanted: {}", self.shown, self.stderr);
        }
        self
    }
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// A program that runs; killed with everything it started when it is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    shown: String,
    began: Instant,
    stdout: mpsc::Receiver<String>,
    stderr: mpsc::Receiver<String>,
}

impl Running {
    /// Starts it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn try_start(mut command: Command) -> Result<Self> {
        let shown = show(&command);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().map_err(Error::io(format!("start {shown}")))?;
        let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
        Ok(Self { child, shown, began: Instant::now(), stdout, stderr })
    }

    /// Starts it.
    pub fn start(command: Command) -> Self {
        pass(Self::try_start(command))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_some())
    }

    /// Waits for its end; `limit` counts from its start.
    ///
    /// # Errors
    /// It did not end, and was killed.
    pub fn try_end(self, limit: Duration) -> Result<Output> {
        let left = limit.saturating_sub(self.began.elapsed());
        self.end_after(left)
    }

    /// Waits for its end; at the deadline it is killed and the test fails.
    pub fn end(self, limit: Duration) -> Output {
        pass(self.try_end(limit))
    }

    /// Asks it to end by a signal and waits for `limit` at most.
    ///
    /// # Errors
    /// As [`Running::try_end`].
    pub fn stop(mut self, signal: Signal, limit: Duration) -> Result<Output> {
        if !self.has_ended() {
            processes::signal(self.pid(), signal);
        }
        self.end_after(limit)
    }

    fn end_after(mut self, limit: Duration) -> Result<Output> {
        let watch = format!("wait for {}", self.shown);
        // A child that was waited for has no process id any more.
        let ended = self.has_ended() || {
            let handle = pidfd(self.child.id()).map_err(Error::io(watch.clone()))?;
            wait_readable(handle.as_fd(), limit).map_err(Error::io(watch))?
        };
        if !ended {
            self.kill();
        }
        let status = self.child.wait().map_err(Error::io(format!("wait for {}", self.shown)))?;
        let hear = |pipe: &mpsc::Receiver<String>| pipe.recv_timeout(Duration::from_secs(2)).unwrap_or_default();
        let output = Output {
            shown: self.shown.clone(),
            status,
            stdout: hear(&self.stdout),
            stderr: hear(&self.stderr),
            took: self.began.elapsed(),
        };
        if ended {
            return Ok(output);
        }
        let Output { shown, stdout, stderr, .. } = output;
        Err(Error::Failed(format!("{shown} did not end within {limit:?} and was killed\n{stdout}{stderr}")))
    }

    fn kill(&mut self) {
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended() {
            self.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs a command to its end.
///
/// # Errors
/// It cannot be started, or did not end and was killed. A program that fails is no error here.
pub fn try_run(command: Command, limit: Duration) -> Result<Output> {
    Running::try_start(command)?.try_end(limit)
}

/// Runs a command to its end; at the deadline it is killed and the test fails.
pub fn run(command: Command, limit: Duration) -> Output {
    pass(try_run(command, limit))
}

/// Runs a foreign program that has to succeed, within a minute.
pub fn sh<A: AsRef<OsStr>>(program: &str, arguments: &[A]) -> String {
    crate::programs::need(program);
    let mut command = Command::new(program);
    command.args(arguments);
    run(command, Duration::from_secs(60)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_whose_end_was_seen_can_be_waited_for_and_stopped() {
        for stop in [false, true] {
            let mut running = Running::start(Command::new("true"));
            crate::wait::until_true("it has ended", || running.has_ended());
            let (limit, signal) = (Duration::from_secs(20), Signal::TERM);
            let output = if stop { running.stop(signal, limit) } else { running.try_end(limit) };
            assert!(output.unwrap().status.success());
        }
    }
}
