//! fio: jobs to their end, and one in the background that writes down the latency of each I/O.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

pub use everdisk_harness::fio::Target;
use everdisk_harness::{
    fio::jobs,
    run::{Output, Running, try_run},
};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{Error, Result, load::Io};

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

fn base(target: &Target, job: Job) -> Command {
    let mut command = target.fio("job");
    command.arg("--norandommap").arg(format!("--rw={}", job.pattern)).arg(format!("--bs={}", job.block));
    command.arg(format!("--iodepth={}", job.depth));
    command
}

/// Writes `bytes` bytes of noise to the whole of `target`.
///
/// # Errors
/// fio's.
pub fn prefill(target: &Target, bytes: u64) -> Result<()> {
    let mut command = base(target, Job { pattern: "write", block: "1M", depth: 4 });
    command.arg(format!("--size={bytes}")).arg("--refill_buffers=1");
    parse(&try_run(command, GRACE * 2)?).map(drop)
}

/// Runs a job for `seconds`, after half a second that does not count.
///
/// # Errors
/// fio's, an I/O error among them.
pub fn measure(target: &Target, bytes: u64, job: Job, seconds: u64) -> Result<Measured> {
    let mut command = base(target, job);
    command.arg(format!("--size={bytes}")).args(["--time_based", "--ramp_time=500ms"]);
    command.arg(format!("--runtime={seconds}"));
    Ok(measured(&parse(&try_run(command, Duration::from_secs(seconds) + GRACE)?)?))
}

/// Runs a job for `io_bytes` of I/O or `seconds`, whichever is over first; all of it counts.
///
/// # Errors
/// fio's, an I/O error among them.
pub fn burst(target: &Target, bytes: u64, job: Job, io_bytes: u64, seconds: u64) -> Result<Measured> {
    let mut command = base(target, job);
    command.arg(format!("--size={bytes}")).arg(format!("--io_size={io_bytes}"));
    command.arg(format!("--runtime={seconds}"));
    Ok(measured(&parse(&try_run(command, Duration::from_secs(seconds) + GRACE)?)?))
}

/// Has a random job touch each block of the first `bytes` once.
///
/// # Errors
/// fio's, an I/O error among them.
pub fn cover(target: &Target, bytes: u64, job: Job) -> Result<Measured> {
    let mut command = base(target, job);
    command.arg(format!("--size={bytes}")).arg("--norandommap=0");
    Ok(measured(&parse(&try_run(command, GRACE * 2)?)?))
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
fn parse(ended: &Output) -> Result<Value> {
    let job = only(jobs(ended)?);
    if ended.status.success() { Ok(job) } else { Err(Error::Failed(format!("fio: {}", ended.complaint()))) }
}

fn only(jobs: Vec<Value>) -> Value {
    jobs.into_iter().next().expect("fio was given a job")
}

/// A job in the background.
#[derive(Debug)]
pub struct Background {
    fio: Running,
    log: PathBuf,
}

impl Background {
    /// Starts a job that goes on until it is stopped and notes every I/O; its files begin with `prefix`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(target: &Target, bytes: u64, job: Job, prefix: &Path) -> Result<Self> {
        let mut command = base(target, job);
        command.arg(format!("--size={bytes}")).args(["--time_based", "--runtime=3600"]);
        command.args(["--disable_clat=1", "--disable_slat=1"]).arg(format!("--write_lat_log={}", prefix.display()));
        Ok(Self { fio: Running::try_start(command)?, log: PathBuf::from(format!("{}_lat.1.log", prefix.display())) })
    }

    /// Ends it and reads its log. The times are those of fio's own clock, whole milliseconds since it began; an I/O is
    /// noted when it ends.
    ///
    /// # Errors
    /// fio's, an I/O error among them.
    pub fn finish(self) -> Result<Vec<Io>> {
        stop(self.fio)?;
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

/// Ends a job that goes on until it is stopped; what it says of itself. Ended by a signal it still reports the first error
/// that any I/O had.
fn stop(fio: Running) -> Result<Value> {
    jobs(&fio.stop(Signal::INT, GRACE)?).map(only)
}

/// An NBD client in the background that writes, reads back and verifies. fio never reconnects: a server that drops its connection
/// has failed it.
#[derive(Debug)]
pub struct Verifying(Running);

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
        command.arg("--thinktime=200us");
        Ok(Self(Running::try_start(command)?))
    }

    /// Ends it; the number of its reads and writes.
    ///
    /// # Errors
    /// fio's: an I/O error, data that is not what was written, a connection that was dropped.
    pub fn finish(self) -> Result<[u64; 2]> {
        let job = stop(self.0)?;
        Ok(["read", "write"]
            .map(|side| job.pointer(&format!("/{side}/total_ios")).and_then(Value::as_u64).unwrap_or(0)))
    }
}
