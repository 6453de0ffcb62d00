//! A limit on every end-to-end test: one that hangs is named, shown, and ended.
//!
//! A thread cannot be ended from outside. So when the limit is over, the processes of the test's host are killed: then what the
//! test waits for fails, and it ends with an error of its own. Where that does not help, the whole run is ended, with the
//! test's name; before that it would have hung without a word.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError::Timeout},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::processes;

/// What a test may take on a slow and busy machine; the longest takes about a minute on a quiet one. A soak test goes on for
/// longer by what it was asked to (EVERDISK_SOAK_SECS).
const LIMIT: Duration = Duration::from_secs(5 * 60);
/// What a test whose processes were killed may take to end.
const GRACE: Duration = Duration::from_secs(90);
/// What killing may take.
const KILLED_WITHIN: Duration = Duration::from_secs(5);
/// Exit status of a run of tests that has failed.
const FAILED: i32 = 101;

/// Watches over a test until it is dropped.
#[derive(Debug)]
pub struct Watchdog {
    /// Closed when it is dropped.
    _alive: mpsc::Sender<()>,
}

impl Watchdog {
    /// Over the test that calls it, with a host in `root`.
    pub fn over(root: &Path) -> Self {
        let soak = std::env::var("EVERDISK_SOAK_SECS").ok().and_then(|text| text.parse().ok());
        Self::with_limits(root, LIMIT + Duration::from_secs(soak.unwrap_or(60)), GRACE)
    }

    /// With other limits.
    pub fn with_limits(root: &Path, limit: Duration, grace: Duration) -> Self {
        let (alive, ended) = mpsc::channel();
        let test = thread::current().name().unwrap_or("without a name").to_owned();
        let root = root.to_owned();
        let watch = move || {
            if ended.recv_timeout(limit) != Err(Timeout) {
                return;
            }
            say(&format!(
                "the test {test} has not ended within {limit:?}: its processes are killed\n{}{}",
                stacks(&root),
                logs(&root)
            ));
            end_processes(&root);
            if ended.recv_timeout(grace) == Err(Timeout) {
                let own = threads("this", std::process::id());
                say(&format!("the test {test} hangs without its processes too: the run ends here\n{own}"));
                std::process::exit(FAILED);
            }
        };
        thread::Builder::new().name("watchdog".to_owned()).spawn(watch).expect("start a thread");
        Self { _alive: alive }
    }
}

/// Not `eprintln`: what a test prints is kept back until it has ended.
fn say(text: &str) {
    let _ = std::io::stderr().write_all(format!("\n{text}\n").as_bytes());
}

fn end_processes(root: &Path) {
    let deadline = Instant::now() + KILLED_WITHIN;
    loop {
        let left = processes::naming(root);
        if left.is_empty() || Instant::now() > deadline {
            return;
        }
        for pid in left.into_iter().filter_map(|process| i32::try_from(process.pid).ok().and_then(Pid::from_raw)) {
            let _ = kill_process(pid, Signal::KILL);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Where every thread of this process and of the host's is in the kernel.
fn stacks(root: &Path) -> String {
    let own = threads("the tests", std::process::id());
    let others = processes::naming(root).into_iter().map(|process| threads(&process.line, process.pid));
    own + &others.collect::<String>()
}

fn threads(what: &str, pid: u32) -> String {
    let mut text = format!("--- process {pid}: {what}\n");
    for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        let (name, stat, stack) = (read("comm"), read("stat"), read("stack"));
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('?');
        let frames = stack.lines().filter_map(|line| line.split_whitespace().nth(1)).take(6);
        let frames = frames.collect::<Vec<_>>().join(" < ");
        let _ = writeln!(text, "{} {} {state}  {frames}", thread.file_name().display(), name.trim_end());
    }
    text
}

/// The last lines of every log of a host.
pub fn logs(root: &Path) -> String {
    let mut files: Vec<PathBuf> = vec![root.join("everdiskd.log")];
    for volume in fs::read_dir(root.join("run/volumes")).into_iter().flatten().flatten() {
        let logs = fs::read_dir(volume.path()).into_iter().flatten().flatten().map(|entry| entry.path());
        files.extend(logs.filter(|path| path.extension().is_some_and(|e| e == "log")));
    }
    let mut text = String::new();
    for file in files {
        let content = fs::read_to_string(&file).unwrap_or_default();
        let lines: Vec<&str> = content.lines().collect();
        let _ = writeln!(text, "--- {}\n{}", file.display(), lines[lines.len().saturating_sub(25)..].join("\n"));
    }
    text
}
