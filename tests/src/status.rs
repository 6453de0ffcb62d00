//! What `--json status` and `--json upgrade` print, read.

use std::fmt;

use serde_json::Value;

/// A volume's status.
#[derive(Clone, PartialEq)]
pub struct Status(pub Value);

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

fn pid(value: &Value) -> Option<u32> {
    u32::try_from(value.pointer("/pid")?.as_u64()?).ok()
}

impl Status {
    /// `serving`, …
    pub fn state(&self) -> &str {
        self.0["state"].as_str().expect("state")
    }
    /// Whether I/O is executed.
    pub fn serves(&self) -> bool {
        matches!(self.state(), "serving" | "upgrading") && self.core().is_some()
    }
    /// Process id of the serving core.
    pub fn core(&self) -> Option<u32> {
        pid(&self.0["core"])
    }
    /// Version of the serving core.
    pub fn version(&self) -> &str {
        self.0["core"]["version"].as_str().unwrap_or("none")
    }
    /// Process id of the standby.
    pub fn standby(&self) -> Option<u32> {
        pid(&self.0["standby"])
    }
    /// Version of the standby.
    pub fn standby_version(&self) -> &str {
        self.0["standby"]["version"].as_str().unwrap_or("none")
    }
    /// Process id of the interface.
    pub fn interface(&self) -> Option<u32> {
        pid(&self.0["interface"])
    }
    /// `ok`, `degraded`, `failed`.
    pub fn health(&self) -> &str {
        self.0["health"].as_str().expect("health")
    }
    /// Whether a problem says all of these words.
    pub fn has_problem(&self, words: &[&str]) -> bool {
        let problems = self.0["problems"].as_array().expect("problems");
        problems.iter().filter_map(Value::as_str).any(|problem| words.iter().all(|word| problem.contains(word)))
    }
    /// Hand-overs so far.
    pub fn generation(&self) -> u64 {
        self.0["generation"].as_u64().expect("generation")
    }
    /// Deaths of a serving core.
    pub fn crashes(&self) -> u64 {
        self.0["crashes_survived"].as_u64().expect("crashes_survived")
    }
    /// `write-back` or `synchronous`.
    pub fn mode(&self) -> &str {
        self.0["mode"].as_str().expect("mode")
    }
    /// Acknowledged bytes that are not on the storage nodes.
    pub fn buffered(&self) -> u64 {
        self.0["buffered_bytes"].as_u64().expect("buffered_bytes")
    }
    /// How the last upgrade ended.
    pub fn last_outcome(&self) -> Option<&str> {
        self.0["last_upgrade"]["outcome"].as_str()
    }
    /// Process ids of every core.
    pub fn cores(&self) -> Vec<u32> {
        self.0["cores"].as_array().map(|cores| cores.iter().filter_map(pid).collect()).unwrap_or_default()
    }
}

/// How an upgrade ended.
#[derive(Clone, PartialEq)]
pub struct Report(pub Value);

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl Report {
    /// `committed`, `rolled-back`, `aborted`.
    pub fn outcome(&self) -> &str {
        self.0["outcome"].as_str().unwrap_or("none")
    }
    /// Gate closed → first request executed, µs.
    pub fn suspended_us(&self) -> Option<u64> {
        self.0["suspended_us"].as_u64()
    }
    /// Why it was not committed.
    pub fn reason(&self) -> &str {
        self.0["reason"].as_str().unwrap_or("")
    }
    /// The names of the steps that were begun.
    pub fn steps(&self) -> Vec<&str> {
        self.0["steps"].as_array().map(|s| s.iter().filter_map(|s| s["step"].as_str()).collect()).unwrap_or_default()
    }
}

/// Median, 90th, 99th percentile and maximum, for printing.
pub fn percentiles(mut values: Vec<u64>) -> String {
    values.sort_unstable();
    let at = |percent: usize| values.get((values.len() * percent / 100).min(values.len().saturating_sub(1))).copied();
    let show = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |v| v.to_string());
    let parts = [("p50", at(50)), ("p90", at(90)), ("p99", at(99)), ("max", values.last().copied())];
    let parts: Vec<String> = parts.into_iter().map(|(name, value)| format!("{name} {}", show(value))).collect();
    format!("n {} {}", values.len(), parts.join(" "))
}
