//! A limit on every end-to-end test: one that hangs is named, shown, and ended.
//!
//! A thread cannot be ended from outside. So when the limit is over, the processes of the test's host are killed: then what the
//! test waits for fails, and it ends with an error of its own. Where that does not help, the whole run is ended, with the
//! test's name; before that it would have hung without a word.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::Path,
    sync::mpsc::{self, RecvTimeoutError::Timeout},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{host::logs, processes};

/// What a test may take on a slow and busy machine; the longest takes about a minute on a quiet one. A soak test goes on for
/// longer by what it was asked to (EVERDISK_SOAK_SECS).
const LIMIT: Duration = Duration::from_secs(5 * 60);
/// What a test whose processes were killed may take to end.
const GRACE: Duration = Duration::from_secs(90);
/// What killing may take.
const KILLED_WITHIN: Duration = Duration::from_secs(5);
/// Lines of each log that are shown.
pub const LOG_LINES: usize = 25;
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
                logs(&root, LOG_LINES)
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
        for process in left {
            processes::signal(process.pid, Signal::KILL);
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
    let threads = processes::of(pid).and_then(|process| process.tasks());
    for thread in threads.into_iter().flatten().flatten() {
        let (name, state) = thread.stat().map_or_else(|_| (String::new(), '?'), |stat| (stat.comm, stat.state));
        let stack = fs::read_to_string(format!("/proc/{pid}/task/{}/stack", thread.tid)).unwrap_or_default();
        let frames = stack.lines().filter_map(|line| line.split_whitespace().nth(1)).take(6);
        let frames = frames.collect::<Vec<_>>().join(" < ");
        let _ = writeln!(text, "{} {name} {state}  {frames}", thread.tid);
    }
    text
}
