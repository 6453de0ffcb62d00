//! fio as a load that verifies what it wrote.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use everdisk_harness::{fio, pass};

use crate::{
    programs::need,
    run::{Output, run},
    wait::until,
};

/// One run may take this long.
const RUN_LIMIT: Duration = Duration::from_secs(90);

/// One kind of load: block sizes from 4k to 256k, crc32c, every pass written and then read back and verified.
#[derive(Clone, Debug)]
pub struct Job {
    /// Requests in flight.
    pub depth: u32,
    /// O_DIRECT.
    pub direct: bool,
    /// fio's `--rw`.
    pub pattern: &'static str,
    /// Bytes that one of the two jobs covers.
    pub region: &'static str,
    /// Passes in one run.
    pub loops: u32,
}

impl Job {
    /// Writes, all of them several times over.
    pub const fn writes(depth: u32, direct: bool) -> Self {
        Self { depth, direct, pattern: "randwrite", region: "24m", loops: 6 }
    }

    /// Reads and writes. One pass: with several, fio 3.33 reports false mismatches on any file, one in tmpfs too.
    pub const fn mixed(depth: u32, direct: bool) -> Self {
        Self { depth, direct, pattern: "randrw", region: "96m", loops: 1 }
    }

    /// The four corners of depth × direct.
    pub const fn matrix() -> [Self; 4] {
        [Self::mixed(1, true), Self::writes(32, true), Self::writes(1, false), Self::mixed(32, false)]
    }

    fn command(&self, target: &Target, directory: &Path, seed: u64) -> Command {
        need("fio");
        let mut command = match target {
            Target::File(path) => fio::Target::File { path: path.clone(), direct: self.direct }.fio("verify"),
            Target::Nbd { uri, offset } => {
                let mut command = fio::Target::Nbd { uri: uri.clone() }.fio("verify");
                command.args([format!("--offset={offset}"), format!("--direct={}", u8::from(self.direct))]);
                command
            }
        };
        command.current_dir(directory).args(["--thread", "--numjobs=2"]);
        command.args([format!("--rw={}", self.pattern), format!("--iodepth={}", self.depth)]);
        command.arg(format!("--loops={}", self.loops));
        command.args([format!("--size={}", self.region), format!("--offset_increment={}", self.region)]);
        command.args(["--bsrange=4k-256k", "--serialize_overlap=1", "--randseed"]).arg(seed.to_string());
        command.args(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"]);
        command.args(["--exitall_on_error=1", "--fsync=64"]);
        command
    }
}

/// What a load goes to.
#[derive(Clone, Debug)]
pub enum Target {
    /// A file, from its beginning.
    File(PathBuf),
    /// An NBD export, by a connection for each job. fio never connects again: a connection that is lost is a failure.
    Nbd {
        /// The export.
        uri: String,
        /// Where the load begins: `64m`.
        offset: &'static str,
    },
}

impl Target {
    /// An NBD export, from its beginning.
    pub const fn nbd(uri: String) -> Self {
        Self::Nbd { uri, offset: "0" }
    }
}

impl<P: AsRef<Path> + ?Sized> From<&P> for Target {
    fn from(file: &P) -> Self {
        Self::File(file.as_ref().to_owned())
    }
}

/// Fails unless fio ended well and no job saw an error; returns the I/Os it did.
pub fn check(output: &Output) -> u64 {
    assert!(output.status.success(), "fio: {}\n{}{}", output.status, output.stdout, output.stderr);
    let jobs = pass(fio::jobs(output));
    let ios = |direction: &str| jobs.iter().filter_map(|job| job[direction]["total_ios"].as_u64()).sum::<u64>();
    ios("read") + ios("write")
}

/// fio again and again until it is stopped; every run ends by itself, with its last verification.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    runs: Arc<AtomicU64>,
    thread: Option<JoinHandle<u64>>,
}

impl Load {
    /// Starts it.
    pub fn start(job: &Job, target: impl Into<Target>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let runs = Arc::new(AtomicU64::new(0));
        let (job, target) = (job.clone(), target.into());
        let (stopping, counter) = (Arc::clone(&stop), Arc::clone(&runs));
        let body = move || {
            let directory = tempfile::tempdir().expect("a directory for fio");
            let mut ios = 0;
            while !stopping.load(SeqCst) {
                let seed = counter.load(SeqCst) + 1;
                ios += check(&run(job.command(&target, directory.path(), seed), RUN_LIMIT));
                counter.fetch_add(1, SeqCst);
            }
            ios
        };
        Self { stop, runs, thread: Some(thread::spawn(body)) }
    }

    /// Fails at once when the load has failed.
    pub fn check(&mut self) {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.join();
            panic!("the load ended before it was stopped");
        }
    }

    /// Waits until at least one run was completed, ends the load, and returns the number of I/Os.
    pub fn stop(mut self) -> u64 {
        until("a whole pass of fio", || {
            self.check();
            (self.runs.load(SeqCst) > 0).then_some(())
        });
        self.stop.store(true, SeqCst);
        self.join()
    }

    fn join(&mut self) -> u64 {
        let Some(thread) = self.thread.take() else { return 0 };
        thread.join().unwrap_or_else(|cause| std::panic::resume_unwind(cause))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        // In a test that fails the storage nodes may hang until a `Faults` is dropped, after this.
        if let Some(thread) = self.thread.take().filter(|_| !thread::panicking()) {
            let _ = thread.join();
        }
    }
}
