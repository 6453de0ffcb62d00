//! `kill -9` of the serving core, with a warm standby, under load that verifies itself: from just before kill(2) to the
//! first request that the other core executes.

use std::{thread, time::Duration};

use everdisk_harness::processes;
use everdisk_proto::{frame::Suspension, limits::BUFFER_DEFAULT};
use everdisk_sys::clock::monotonic_ns;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{LOAD_BYTES, LOAD_THREADS, SETTLE, Scope, memory_directory, suspension_json};
use crate::{
    Error, Result,
    host::Host,
    interface::Interface,
    load::Load,
    say,
    stats::{Sorted, time},
    table::{at_most, row, table},
};

const TARGET_MEDIAN_NS: f64 = 10e6;
/// The volume is served again within this time.
const RECOVERED_WITHIN: Duration = Duration::from_secs(20);
/// The interface is not polled for this long, so that no request delays its work.
const UNDISTURBED: Duration = Duration::from_millis(60);
/// At the end everything is read back within this time.
const FINISH_WITHIN: Duration = Duration::from_secs(120);

/// One kill.
#[derive(Clone, Copy, Debug)]
pub(super) struct Killed {
    at_ns: u64,
    times: Suspension,
}

impl Killed {
    /// For the JSON.
    pub(super) fn json(&self) -> Value {
        json!({"kill_monotonic_ns": self.at_ns, "times": suspension_json(&self.times), "ns": self.first_request_ns()})
    }

    /// Kill → death noticed, gate closed, ns.
    pub(super) fn closed_ns(&self) -> u64 {
        self.times.closed_ns.saturating_sub(self.at_ns)
    }

    fn after(&self, us: Option<u64>) -> u64 {
        self.closed_ns() + us.unwrap_or(0) * 1000
    }

    /// Kill → first request by another core, ns.
    pub(super) fn first_request_ns(&self) -> u64 {
        self.after(self.times.first_request_us)
    }
}

/// Measures.
///
/// # Errors
/// Whatever went wrong. Errors and mismatches of the load are counted, printed and returned.
pub fn run(scope: &Scope) -> Result<Value> {
    let mut host = Host::start(&scope.interrupt, Some(&memory_directory()?))?;
    host.attach("512M", 1)?;
    say(format!(
        "\nCrash: kill -9 of the serving core, {} times, under {LOAD_THREADS} verifying threads; write buffer of {} MiB \
         (the default)",
        scope.kills,
        BUFFER_DEFAULT >> 20
    ));
    crashes(scope, &host, Load::start(&host.file(), LOAD_THREADS, LOAD_BYTES)?)
}

/// Kills cores under a load and reports.
pub(super) fn crashes(scope: &Scope, host: &Host, load: Load) -> Result<Value> {
    let mut interface = host.interface();
    let mut kills = Vec::new();
    let mut failure = None;
    while kills.len() < scope.kills {
        match kill(host, &mut interface) {
            Ok(killed) => kills.push(killed),
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            Err(e) => {
                failure = Some(format!("after {} kills: {e}\n{}", kills.len(), host.log()));
                break;
            }
        }
    }
    let tally = load.finish(FINISH_WITHIN);
    let total: Sorted = kills.iter().map(Killed::first_request_ns).collect();
    let parts: [(&str, Sorted); 4] = [
        ("kill → death noticed, gate closed", kills.iter().map(Killed::closed_ns).collect()),
        ("kill → drained", kills.iter().map(|k| k.after(k.times.drained_us)).collect()),
        ("kill → gate open", kills.iter().map(|k| k.after(k.times.opened_us)).collect()),
        ("kill → first request executed", total.clone()),
    ];
    let mut rows = vec![row(["", "p50", "p90", "p99", "max"])];
    for (name, sorted) in &parts {
        let cells = [500, 900, 990, 1000].map(|permille| time(sorted.at(permille)));
        rows.push([vec![(*name).to_owned()], cells.to_vec()].concat());
    }
    say(format!("\n{}", table(&rows, &[0])));
    let verdict = at_most(total.median() as f64, TARGET_MEDIAN_NS);
    say(format!("  median {} (target ≤ 10 ms: {verdict})", time(total.median())));
    say(format!(
        "  {} I/Os, {} errors, {} mismatches, {} threads hanging; {} blocks compared at the end",
        tally.ios(),
        tally.errors,
        tally.mismatches,
        tally.hanging,
        tally.compared_at_end
    ));
    for fault in &tally.faults {
        say(format!("    {fault}"));
    }
    if let Some(failure) = failure {
        return Err(Error::Failed(failure));
    }
    if !tally.is_clean() {
        return Err(Error::Failed("the load saw errors".to_owned()));
    }
    Ok(json!({
        "kills": kills.iter().map(Killed::json).collect::<Vec<_>>(), "kill_to_first_request_ns": total.summary(),
        "ios": tally.ios(), "errors": tally.errors, "mismatches": tally.mismatches,
    }))
}

/// Kills the core that serves, once another one is armed.
pub(super) fn kill(host: &Host, interface: &mut Interface) -> Result<Killed> {
    let before = interface.standby(&host.interrupt)?;
    host.interrupt.sleep(SETTLE / 2)?;
    let at_ns = monotonic_ns();
    processes::signal(before.serving.pid, Signal::KILL);
    thread::sleep(UNDISTURBED);
    let times = host.interrupt.wait_for("the standby serves", RECOVERED_WITHIN, UNDISTURBED / 4, || {
        let status = interface.status()?;
        let times = status.last_suspension;
        let over = status.crashes_survived > before.crashes && times.closed_ns >= at_ns;
        Ok((over && times.first_request_us.is_some()).then_some(times))
    })?;
    Ok(Killed { at_ns, times })
}
