//! Children under a deadline. What they print is passed through; every process they start bears a mark in its
//! environment, so that those which outlive them can be found and ended.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::TaskError;
use crate::tally::Tally;
use crate::workspace::words;

const MARK: &str = "EVERDISK_XTASK_RUN";
const POLL: Duration = Duration::from_millis(50);
/// How long the output of a child that has ended may still trickle in, and how long its processes may take to end.
const GRACE: Duration = Duration::from_secs(5);

/// How a child ended, and what it counted.
#[derive(Debug)]
pub(crate) struct Ended {
    /// `None`: killed at the deadline.
    pub(crate) status: Option<ExitStatus>,
    pub(crate) tally: Tally,
    /// Processes of Everdisk that the child left behind, as "name (pid)"; they have been killed.
    pub(crate) left_behind: Vec<String>,
}

impl Ended {
    pub(crate) fn is_success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// How it ended, for the person at the terminal.
    pub(crate) fn outcome(&self) -> String {
        match self.status {
            Some(status) if status.success() => "ok".to_owned(),
            Some(status) => format!("failed ({status})"),
            None => "killed at its deadline".to_owned(),
        }
    }
}

/// What becomes of the child's stdout.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stdout {
    /// It is ours: progress bars and colours stay.
    Inherited,
    /// Passed on line by line, and test results are counted.
    Counted,
}

/// Runs `command` until it ends or `deadline` comes.
///
/// # Errors
/// The child cannot be started or waited for. A child that fails is no error here.
pub(crate) fn run(command: &mut Command, deadline: Instant, stdout: Stdout) -> Result<Ended, TaskError> {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let shown = format!("{} {}", program.display(), words(command));
    println!("\n==> {shown}");
    let mark = new_mark();
    command.env(MARK, with_outer_marks(&mark)).stdin(Stdio::null());
    if stdout == Stdout::Counted {
        command.stdout(Stdio::piped());
    }
    let mut child = command.spawn().map_err(TaskError::io(format!("start {shown}")))?;
    let results = child.stdout.take().map(pass_on);

    let status = loop {
        if let Some(status) = child.try_wait().map_err(TaskError::io(format!("wait for {shown}")))? {
            break Some(status);
        }
        if Instant::now() >= deadline {
            // SIGKILL to everything that bears the mark, the child first, so that it starts no more.
            child.kill().map_err(TaskError::io(format!("kill {shown}")))?;
            end_marked(&mark, |_| true);
            child.wait().map_err(TaskError::io(format!("wait for {shown}")))?;
            break None;
        }
        thread::sleep(POLL);
    };
    // Before the output is awaited: a process that is left holds the pipe open.
    let left_behind = end_marked(&mark, |name| name.starts_with("everdisk"));
    let tally = results.and_then(|results| results.recv_timeout(GRACE).ok()).unwrap_or_default();
    Ok(Ended { status, tally, left_behind })
}

/// Copies lines to our stdout; the count arrives when the pipe is closed.
fn pass_on(stdout: ChildStdout) -> mpsc::Receiver<Tally> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut tally = Tally::default();
        let mut lines = BufReader::new(stdout);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line);
            tally.read(&text);
            // Not written to stdout directly: a test's results must not show up among those of the tests of xtask.
            print!("{text}");
            line.clear();
        }
        // The receiver may have given up waiting.
        let _ = sender.send(tally);
    });
    receiver
}

/// A mark of our own. A task may run within a task, so its children bear the outer marks as well.
fn new_mark() -> String {
    let nanos = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
    format!("{}-{nanos}", std::process::id())
}

fn with_outer_marks(mark: &str) -> String {
    std::env::var(MARK).map_or_else(|_| mark.to_owned(), |outer| format!("{outer},{mark}"))
}

/// Ends the processes that bear the mark and whose name is `wanted`: leaves them a moment to end by themselves, then
/// kills, until none is left or the grace is over. Returns those that had to be killed.
fn end_marked(mark: &str, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let marked = || marked_processes(mark).into_iter().filter(|(_, name)| wanted(name)).collect::<Vec<_>>();
    let begun = Instant::now();
    while begun.elapsed() < GRACE / 5 && !marked().is_empty() {
        thread::sleep(POLL);
    }
    let mut killed = Vec::new();
    while begun.elapsed() < GRACE {
        let left = marked();
        if left.is_empty() {
            break;
        }
        for (pid, name) in left {
            let label = format!("{name} ({})", pid.as_raw_nonzero());
            // It may have ended by now.
            let _ = kill_process(pid, Signal::KILL);
            if !killed.contains(&label) {
                killed.push(label);
            }
        }
        thread::sleep(POLL);
    }
    killed
}

/// Every living process whose environment has the mark, with its name.
fn marked_processes(mark: &str) -> Vec<(Pid, String)> {
    let is_marked = |variable: &[u8]| {
        let variable = String::from_utf8_lossy(variable);
        let marks = variable.strip_prefix(MARK).and_then(|rest| rest.strip_prefix('='));
        marks.is_some_and(|marks| marks.split(',').any(|one| one == mark))
    };
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pid_of = |name: &OsStr| name.to_str()?.parse().ok().and_then(Pid::from_raw);
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = pid_of(&entry.file_name())?;
            // Empty for a zombie, unreadable for other people's processes: neither is ours to end.
            let environment = std::fs::read(entry.path().join("environ")).ok()?;
            environment.split(|&byte| byte == 0).any(is_marked).then_some(())?;
            let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            Some((pid, name.trim_end().to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn within(secs: u64) -> Instant {
        Instant::now() + Duration::from_secs(secs)
    }

    #[test]
    fn output_is_counted_and_status_told() {
        let script = "echo 'test result: ok. 4 passed; 1 failed; 0 ignored;'; exit 3";
        let ended = run(&mut shell(script), within(20), Stdout::Counted).unwrap();
        assert_eq!(ended.tally, Tally { passed: 4, failed: 1, ignored: 0 });
        assert!(!ended.is_success());
        assert!(ended.outcome().contains('3'), "{}", ended.outcome());
    }

    #[test]
    fn a_child_is_killed_at_its_deadline_with_all_it_started() {
        let begun = Instant::now();
        let ended = run(&mut shell("setsid sleep 61 & sleep 62"), within(1), Stdout::Counted).unwrap();
        assert!(ended.status.is_none());
        // Had one survived, the pipe would have stayed open for another grace.
        assert!(begun.elapsed() < Duration::from_secs(1) + GRACE, "took {:?}", begun.elapsed());
    }

    #[test]
    fn a_process_left_behind_is_ended_and_named() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("everdisk-stray");
        std::fs::copy("/bin/sleep", &program).unwrap();
        // Not before it bears its own name: until then it is a shell.
        let named = "while read name < /proc/$!/comm && [ $name = sh ]; do :; done";
        let script = format!("{} 63 & {named}; exit 0", program.display());
        let ended = run(&mut shell(&script), within(20), Stdout::Counted).unwrap();
        assert!(ended.is_success());
        assert_eq!(ended.left_behind.len(), 1, "{:?}", ended.left_behind);
        assert!(ended.left_behind[0].starts_with("everdisk-stray"));
    }
}
