//! fio: jobs to their end, and one in the background that writes down the latency of each I/O.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    Error, Result,
    command::{self, Ended},
    load::Io,
    residue,
};

/// Beyond its run time a job takes at most this long.
const GRACE: Duration = Duration::from_secs(60);

/// A job.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// `randread`, `randwrite`, `read`, `write`, `randrw`.
    pub pattern: &'static str,
    /// `4k`, `1M`.
    pub block: &'static str,
    /// Queue depth.
    pub depth: u32,
}

/// What a job measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// I/Os per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes: f64,
    /// Mean, median and 99th percentile of the completion latency, ns.
    pub latency: [f64; 3],
}

impl Measured {
    /// For the JSON.
    pub fn json(self) -> Value {
        let [mean, p50, p99] = self.latency;
        json!({"iops": self.iops, "bytes_per_s": self.bytes, "mean_ns": mean, "p50_ns": p50, "p99_ns": p99})
    }
}

/// What a job does its I/O to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A file, by libaio.
    File {
        /// Where it is.
        path: PathBuf,
        /// Past the page cache, by O_DIRECT.
        direct: bool,
    },
    /// An NBD server, by libnbd.
    Nbd {
        /// Where it is: `nbd+unix:///NAME?socket=PATH` or `nbd://HOST:PORT/NAME`.
        uri: String,
    },
}

impl Target {
    /// A file past the page cache.
    pub const fn direct(path: PathBuf) -> Self {
        Self::File { path, direct: true }
    }
}

fn base(target: &Target, job: Job) -> Command {
    let mut command = Command::new("fio");
    command.args(["--name=job", "--norandommap"]);
    match target {
        Target::File { path, direct } => command
            .arg("--ioengine=libaio")
            .arg(format!("--filename={}", path.display()))
            .arg(format!("--direct={}", u8::from(*direct))),
        Target::Nbd { uri } => command.arg("--ioengine=nbd").arg(format!("--uri={uri}")),
    };
    command.arg(format!("--rw={}", job.pattern)).arg(format!("--bs={}", job.block));
    command.arg(format!("--iodepth={}", job.depth));
    command
}

/// Writes `bytes` bytes of noise to the whole of `target`.
///
/// # Errors
/// fio's.
pub fn prefill(target: &Target, bytes: u64) -> Result<()> {
    let mut command = base(target, Job { pattern: "write", block: "1M", depth: 4 });
    command.arg(format!("--size={bytes}")).arg("--refill_buffers=1").arg("--output-format=json");
    parse(&command::run(&mut command, GRACE * 2)?).map(drop)
}

/// Runs a job for `seconds`, after half a second that does not count.
///
/// # Errors
/// fio's, an I/O error among them.
pub fn measure(target: &Target, bytes: u64, job: Job, seconds: u64) -> Result<Measured> {
    let mut command = base(target, job);
    command.arg(format!("--size={bytes}")).args(["--time_based", "--ramp_time=500ms", "--output-format=json"]);
    command.arg(format!("--runtime={seconds}"));
    Ok(measured(&parse(&command::run(&mut command, Duration::from_secs(seconds) + GRACE)?)?))
}

/// Runs a job for `io_bytes` of I/O or `seconds`, whichever is over first; all of it counts.
///
/// # Errors
/// fio's, an I/O error among them.
pub fn burst(target: &Target, bytes: u64, job: Job, io_bytes: u64, seconds: u64) -> Result<Measured> {
    let mut command = base(target, job);
    command.arg(format!("--size={bytes}")).arg(format!("--io_size={io_bytes}")).arg("--output-format=json");
    command.arg(format!("--runtime={seconds}"));
    Ok(measured(&parse(&command::run(&mut command, Duration::from_secs(seconds) + GRACE)?)?))
}

/// Has a random job touch each block of the first `bytes` once.
///
/// # Errors
/// fio's, an I/O error among them.
pub fn cover(target: &Target, bytes: u64, job: Job) -> Result<Measured> {
    let mut command = base(target, job);
    command.arg(format!("--size={bytes}")).args(["--norandommap=0", "--output-format=json"]);
    Ok(measured(&parse(&command::run(&mut command, GRACE * 2)?)?))
}

fn measured(job: &Value) -> Measured {
    let mut all = Measured::default();
    for side in ["read", "write"] {
        let number = |path: &str| job.pointer(&format!("/{side}/{path}")).and_then(Value::as_f64).unwrap_or(0.0);
        all.iops += number("iops");
        all.bytes += number("bw_bytes");
        if number("iops") > 0.0 {
            all.latency =
                ["mean", "percentile/50.000000", "percentile/99.000000"].map(|n| number(&format!("clat_ns/{n}")));
        }
    }
    all
}

/// The object of the only job.
fn parse(ended: &Ended) -> Result<Value> {
    let start = ended.stdout.find('{').unwrap_or(0);
    let all: Value = serde_json::from_str(ended.stdout.get(start..).unwrap_or_default())
        .map_err(|e| Error::Failed(format!("fio: {} ({e})", ended.complaint())))?;
    let job = all.pointer("/jobs/0").cloned().unwrap_or(Value::Null);
    match job.get("error").and_then(Value::as_i64) {
        Some(0) if ended.status.success() => Ok(job),
        error => Err(Error::Failed(format!("fio ended with error {error:?}: {}", ended.complaint()))),
    }
}

/// A job in the background.
#[derive(Debug)]
pub struct Background {
    child: Option<Child>,
    log: PathBuf,
}

impl Background {
    /// Starts a job that goes on until it is stopped and notes every I/O; its files begin with `prefix`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(target: &Target, bytes: u64, job: Job, prefix: &Path) -> Result<Self> {
        let mut command = base(target, job);
        command.arg(format!("--size={bytes}")).args(["--time_based", "--runtime=3600", "--output-format=json"]);
        command.args(["--disable_clat=1", "--disable_slat=1"]).arg(format!("--write_lat_log={}", prefix.display()));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let child = command.spawn().map_err(Error::io("start fio"))?;
        Ok(Self { child: Some(child), log: PathBuf::from(format!("{}_lat.1.log", prefix.display())) })
    }

    /// Ends it and reads its log. The times are those of fio's own clock, whole milliseconds since it began; an I/O is
    /// noted when it ends.
    ///
    /// # Errors
    /// fio's, an I/O error among them.
    pub fn finish(mut self) -> Result<Vec<Io>> {
        let Some(child) = self.child.take() else { return Ok(Vec::new()) };
        stop(child)?;
        self.read()
    }

    fn read(&self) -> Result<Vec<Io>> {
        let doing = || format!("read {}", self.log.display());
        let file = File::open(&self.log).map_err(Error::io(doing()))?;
        let mut log = Vec::new();
        for line in BufReader::new(file).lines() {
            let line = line.map_err(Error::io(doing()))?;
            let mut fields = line.split(',').map(|field| field.trim().parse::<u64>());
            if let (Some(Ok(ms)), Some(Ok(latency_ns))) = (fields.next(), fields.next()) {
                log.push(Io { end_ns: ms * 1_000_000, latency_ns });
            }
        }
        let _ = std::fs::remove_file(&self.log);
        Ok(log)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Ends a job that goes on until it is stopped; what it says of itself.
fn stop(mut child: Child) -> Result<Value> {
    residue::kill(child.id(), Signal::INT);
    let deadline = Instant::now() + GRACE;
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let output = child.wait_with_output().map_err(Error::io("wait for fio"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let ended = Ended { status: output.status, stdout: text(&output.stdout), stderr: text(&output.stderr) };
    let start = ended.stdout.find("\n{").unwrap_or(0);
    let all: Value = serde_json::from_str(ended.stdout.get(start..).unwrap_or_default()).unwrap_or_default();
    // Ended by a signal it still reports the first error that any I/O had.
    match all.pointer("/jobs/0/error").and_then(Value::as_i64) {
        Some(0) => Ok(all.pointer("/jobs/0").cloned().unwrap_or_default()),
        error => Err(Error::Failed(format!("fio ended with error {error:?}: {}", ended.complaint()))),
    }
}

/// An NBD client in the background that writes, reads back and verifies. fio never reconnects: whoever drops its connection
/// has failed it.
#[derive(Debug)]
pub struct Verifying {
    child: Option<Child>,
}

impl Verifying {
    /// Starts it on `bytes` bytes from `offset` on.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(target: &Target, offset: u64, bytes: u64) -> Result<Self> {
        let mut command = base(target, Job { pattern: "randrw", block: "4k", depth: 8 });
        command.arg(format!("--offset={offset}")).arg(format!("--size={bytes}"));
        command.args(["--norandommap=0", "--serialize_overlap=1", "--time_based", "--runtime=3600"]);
        command.args(["--verify=crc32c", "--verify_backlog=256", "--verify_fatal=1", "--verify_state_save=0"]);
        // Room for other load beside it.
        command.args(["--thinktime=200us", "--output-format=json"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        Ok(Self { child: Some(command.spawn().map_err(Error::io("start fio"))?) })
    }

    /// Ends it; the number of its reads and writes.
    ///
    /// # Errors
    /// fio's: an I/O error, data that is not what was written, a connection that was dropped.
    pub fn finish(mut self) -> Result<[u64; 2]> {
        let Some(child) = self.child.take() else { return Ok([0, 0]) };
        let job = stop(child)?;
        Ok(["read", "write"]
            .map(|side| job.pointer(&format!("/{side}/total_ios")).and_then(Value::as_u64).unwrap_or(0)))
    }
}

impl Drop for Verifying {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
