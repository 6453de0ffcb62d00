//! The machine that the numbers are of.

use std::{fs, process::Command, time::Duration};

use everdisk_harness::{processes::Memory, run::try_run};
use serde_json::{Value, json};

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
    let mut command = Command::new(program);
    command.arg(option);
    let ended = try_run(command, Duration::from_secs(5));
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

/// The memory of a process, for the JSON.
pub fn json_of(memory: Memory) -> Value {
    let Memory { rss, pss, private, locked } = memory;
    json!({"rss_kib": rss, "pss_kib": pss, "private_kib": private, "locked_kib": locked})
}
