//! fio: what its load goes to, and its report.

use std::{path::PathBuf, process::Command};

use serde_json::Value;

use crate::{Error, Result, run::Output};

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
    /// An NBD server, by libnbd, a connection for each job. fio never connects again: a connection that is lost is a failure.
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

    /// fio on it, with no more said than where and how. It reports in JSON.
    pub fn fio(&self, job: &str) -> Command {
        let mut command = Command::new("fio");
        command.arg(format!("--name={job}")).arg("--output-format=json");
        match self {
            Self::File { path, direct } => command
                .arg("--ioengine=libaio")
                .arg(format!("--filename={}", path.display()))
                .arg(format!("--direct={}", u8::from(*direct))),
            Self::Nbd { uri } => command.arg("--ioengine=nbd").arg(format!("--uri={uri}")),
        };
        command
    }
}

/// The jobs in fio's report, each without an error.
///
/// # Errors
/// A job had one, or there is no report.
pub fn jobs(output: &Output) -> Result<Vec<Value>> {
    // fio 3.33 prints a plain line before it, one that was ended by a signal several.
    let start = output.stdout.find("\n{").map_or_else(|| output.stdout.find('{').unwrap_or(0), |at| at + 1);
    let told = output.stdout.get(start..).unwrap_or_default();
    let report: Value = serde_json::from_str(told)
        .map_err(|e| Error::Failed(format!("fio: {} ({e}): {}", output.complaint(), output.stdout)))?;
    let jobs = report.get("jobs").and_then(Value::as_array).cloned().unwrap_or_default();
    let error = |job: &Value, key: &str| job.get(key).and_then(Value::as_i64);
    let failed = |job: &&Value| error(job, "error") != Some(0) || error(job, "total_err").unwrap_or(0) != 0;
    match jobs.iter().find(failed) {
        Some(job) => Err(Error::Failed(format!("fio ended with an error: {}\n{job}", output.complaint()))),
        None if jobs.is_empty() => Err(Error::Failed(format!("fio reports no job: {report}"))),
        None => Ok(jobs),
    }
}
