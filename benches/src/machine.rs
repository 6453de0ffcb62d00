//! The machine that the numbers are of, and the memory of its processes.

use std::{fs, process::Command, time::Duration};

use serde_json::{Value, json};

use crate::{Error, Result, command};

fn first_line(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().lines().next().unwrap_or_default().trim().to_owned()
}

fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_once(':').map(|(_, value)| value.trim().to_owned())
}

/// What a program says about its version.
pub fn version(program: &str) -> String {
    // nbd-server knows no other.
    let option = if program == "nbd-server" { "-V" } else { "--version" };
    let ended = command::run(Command::new(program).arg(option), Duration::from_secs(5));
    ended.ok().and_then(|ended| ended.stdout.lines().next().map(str::to_owned)).unwrap_or_else(|| "none".to_owned())
}

/// What it is.
pub fn describe() -> Value {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let seconds = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    json!({
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "cpu": field(&cpuinfo, "model name"),
        "memory": field(&meminfo, "MemTotal"),
        "kernel": first_line("/proc/sys/kernel/osrelease"),
        "fio": version("fio"),
        "peer": version("qemu-storage-daemon"),
        "everdisk": env!("CARGO_PKG_VERSION"),
        "unix_time": seconds,
        "load_average_before": load_average(),
    })
}

/// Load of the machine over the last minute, without ours when asked before we begin.
pub fn load_average() -> f64 {
    first_line("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0)
}

/// One line about it.
pub fn line(machine: &Value) -> String {
    let text = |key: &str| match machine.get(key) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    };
    format!(
        "{} CPUs ({}), {}, Linux {}, {}, peer {}",
        text("cpus"),
        text("cpu"),
        text("memory"),
        text("kernel"),
        text("fio"),
        text("peer")
    )
}

/// CPU time that a process used so far, all its threads together, the kernel's work for it among it.
///
/// # Errors
/// It has gone.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).map_err(Error::io(format!("read {path}")))?;
    // The name may hold anything, a parenthesis too; utime and stime are the fields 14 and 15, the state behind it is 3.
    let behind = stat.rsplit_once(')').map_or("", |(_, behind)| behind);
    let ticks: u64 = behind.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// Memory of a process, KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Resident.
    pub rss: u64,
    /// Resident, pages that others share counted in part.
    pub pss: u64,
    /// Resident and of this process alone.
    pub private: u64,
    /// Locked.
    pub locked: u64,
}

impl Memory {
    /// Of the process `pid`.
    ///
    /// # Errors
    /// It has gone, or is somebody else's.
    pub fn of(pid: u32) -> Result<Self> {
        let read = |file: &str| {
            fs::read_to_string(format!("/proc/{pid}/{file}"))
                .map_err(Error::io(format!("read the memory of process {pid}")))
        };
        let (rollup, status) = (read("smaps_rollup")?, read("status")?);
        let kib = |text: &str, name: &str| {
            let value = field(text, name).unwrap_or_default();
            value.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        Ok(Self {
            rss: kib(&rollup, "Rss:"),
            pss: kib(&rollup, "Pss:"),
            private: kib(&rollup, "Private_Clean:") + kib(&rollup, "Private_Dirty:"),
            locked: kib(&status, "VmLck:"),
        })
    }

    /// For the JSON.
    pub fn json(self) -> Value {
        json!({"rss_kib": self.rss, "pss_kib": self.pss, "private_kib": self.private, "locked_kib": self.locked})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_goes_on_with_work() {
        let before = cpu_time(std::process::id()).unwrap();
        let began = std::time::Instant::now();
        while began.elapsed() < Duration::from_secs(5) && cpu_time(std::process::id()).unwrap() == before {}
        let used = cpu_time(std::process::id()).unwrap() - before;
        assert!(!used.is_zero() && used < Duration::from_secs(5), "{used:?}");
    }
}
