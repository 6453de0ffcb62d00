//! The pause of an upgrade: inside (gate closed → first request executed by the new core), and as the application saw
//! it.
//!
//! Rounds of some upgrades each, under one fio job (4k, random, half reads, QD16, O_DIRECT) that notes every I/O. Between
//! the upgrades standbys are killed, so that there are slices of time in which a core starts and no gate moves.

use std::{path::Path, thread, time::Duration};

use everdisk_harness::processes;
use everdisk_proto::{frame::Suspension, limits::BUFFER_DEFAULT};
use everdisk_sys::clock::monotonic_ns;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{
    SETTLE, Scope, VOLUME_BYTES, VOLUME_SIZE, memory_directory,
    windows::{self, CLAP_NS, Kind, Span, Windows},
};
use crate::{
    Error, Result,
    fio::{self, Background, Job, Target},
    host::{Host, VOLUME},
    interface::Interface,
    machine::load_average,
    say,
    stats::{Sorted, time},
    table::{at_most, row, table},
};

const JOB: Job = Job { pattern: "randrw", block: "4k", depth: 16 };
/// Upgrades of a round: a log of each I/O for a minute or so.
pub(super) const ROUND: usize = 25;
/// A core that dies younger than a second is started again later.
const GROWN_UP: Duration = Duration::from_millis(1100);
/// A standby is killed once in this many upgrades.
const CONTROL_EVERY: usize = 2;
/// After its predecessor has left, a core's start is over.
const LEAVING_NS: u64 = 30_000_000;

const TARGET_MEDIAN_US: f64 = 150.0;
const TARGET_P99_US: f64 = 1000.0;
const TARGET_RATIO: f64 = 1.2;

/// Measures.
///
/// # Errors
/// Whatever went wrong: an upgrade that was not committed, an I/O error.
pub fn run(scope: &Scope) -> Result<Value> {
    let mut host = Host::start(&scope.interrupt, Some(&memory_directory()?))?;
    host.attach(VOLUME_SIZE, 1)?;
    fio::prefill(&host.target(), VOLUME_BYTES)?;
    say(format!(
        "\nPause: {} upgrades back and forth under fio randrw 4k QD16, O_DIRECT; write buffer of {} MiB, hand-over by \
         flush (the defaults)",
        scope.upgrades,
        BUFFER_DEFAULT >> 20
    ));
    let way = Way { target: host.target(), handovers: &["flush"] };
    let mut all = Rounds::default();
    while all.reports.len() < scope.upgrades {
        all.add(&host, "file", &way, ROUND.min(scope.upgrades - all.reports.len()))?;
    }
    let inside = inside(&all.reports, TARGET_MEDIAN_US);
    let outside = outside(&all.windows);
    Ok(
        json!({"upgrades": all.reports, "inside_us": inside, "outside": outside, "windows": all.windows.json(), "buffer_bytes": BUFFER_DEFAULT,
              "window_ms": windows::WINDOW_NS / 1_000_000, "rounds_left_out": all.left_out}),
    )
}

/// How the load reaches the volume, and how its upgrades hand over, in turn.
pub(super) struct Way<'a> {
    pub(super) target: Target,
    pub(super) handovers: &'a [&'a str],
}

/// What rounds of one way gave.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    pub(super) reports: Vec<Value>,
    pub(super) windows: Windows,
    /// Why what the application saw is not known of some.
    pub(super) left_out: Vec<String>,
}

impl Rounds {
    /// One more round.
    pub(super) fn add(&mut self, host: &Host, name: &str, way: &Way<'_>, upgrades: usize) -> Result<()> {
        let (round, seen) = round(host, way, self.reports.len(), upgrades)?;
        let paused: Sorted = round.iter().map(|report| number(report, "suspended_us")).collect();
        let (median, longest) = (paused.median(), paused.max());
        say(format!(
            "  {name}: {} upgrades, pause median {median} µs, longest {longest} µs (load {:.1})",
            round.len(),
            load_average()
        ));
        self.reports.extend(round);
        match seen {
            Ok(seen) => self.windows.add(seen),
            Err(e) => {
                say(format!("  what the application saw in this round is left out: {e}"));
                self.left_out.push(e.to_string());
            }
        }
        Ok(())
    }
}

pub(super) fn number(report: &Value, key: &str) -> u64 {
    report.get(key).and_then(Value::as_u64).unwrap_or(0)
}

/// One fio job, and the upgrades under it. What the application saw is known only if the clocks can be laid together.
fn round(host: &Host, way: &Way<'_>, done: usize, upgrades: usize) -> Result<(Vec<Value>, Result<Windows>)> {
    let mut interface = host.interface();
    let fio = Background::start(&way.target, VOLUME_BYTES, JOB, &host.node("fio"))?;
    host.interrupt.sleep(2 * SETTLE)?;
    let first = clap(host, &mut interface)?;
    let mut reports = Vec::new();
    let mut spans = Vec::new();
    for turn in 0..upgrades {
        let next = if (done + turn).is_multiple_of(2) { "everdisk-core-next" } else { "everdisk-core" };
        // Each hand-over from either core to the other.
        let handover = way.handovers.get((done + turn) / 2 % way.handovers.len()).copied().unwrap_or("flush");
        reports.push(upgrade(host, &mut interface, &host.program(next), handover, &mut spans)?);
        host.interrupt.sleep(SETTLE)?;
        if turn % CONTROL_EVERY == 0 {
            host.interrupt.sleep(GROWN_UP.saturating_sub(SETTLE))?;
            spans.push(restart_standby(host, &mut interface)?);
            host.interrupt.sleep(SETTLE)?;
        }
    }
    let claps = [first, clap(host, &mut interface)?];
    host.interrupt.sleep(SETTLE)?;
    let log = fio.finish()?;
    let seen = windows::align(&log, claps).map(|offset| windows::sort(&log, offset, claps, &spans));
    Ok((reports, seen))
}

/// Holds I/O for a known time.
fn clap(host: &Host, interface: &mut Interface) -> Result<Suspension> {
    host.do_everdisk(&["suspend", VOLUME, "--lease", "5s"])?;
    thread::sleep(Duration::from_nanos(CLAP_NS));
    host.do_everdisk(&["resume", VOLUME])?;
    host.interrupt.sleep(SETTLE)?;
    let times = interface.status()?.last_suspension;
    times
        .opened_us
        .map(|_| times)
        .ok_or_else(|| Error::Failed("the interface does not tell when it resumed".to_owned()))
}

fn upgrade(
    host: &Host,
    interface: &mut Interface,
    program: &Path,
    handover: &str,
    spans: &mut Vec<Span>,
) -> Result<Value> {
    let from_ns = monotonic_ns();
    let said = host.upgrade_with(program, &["--handover", handover])?;
    if !said.done {
        return Err(Error::Failed(format!("an upgrade failed: {}\n{}", said.complaint, host.log())));
    }
    interface.standby(&host.interrupt)?;
    let closed_ns = number(&said.json, "closed_monotonic_ns");
    if closed_ns < from_ns {
        return Err(Error::Failed(format!("the report of an upgrade lacks the time of its suspension: {}", said.json)));
    }
    spans.push(Span { kind: Kind::Operation, from_ns, to_ns: monotonic_ns() + LEAVING_NS });
    let to_ns = closed_ns + number(&said.json, "suspended_us") * 1000;
    spans.push(Span { kind: Kind::Switch, from_ns: closed_ns, to_ns });
    Ok(said.json)
}

/// Kills the core on standby and waits for the next one.
fn restart_standby(host: &Host, interface: &mut Interface) -> Result<Span> {
    let old = interface.standby(&host.interrupt)?.standby.pid;
    let from_ns = monotonic_ns();
    processes::signal(old, Signal::KILL);
    host.interrupt.wait_for("another core on standby", Duration::from_secs(20), SETTLE / 20, || {
        let pair = interface.standby(&host.interrupt)?;
        Ok((pair.standby.pid != old).then_some(()))
    })?;
    Ok(Span { kind: Kind::Start, from_ns, to_ns: monotonic_ns() })
}

pub(super) fn inside(reports: &[Value], target_median_us: f64) -> Value {
    let of = |key: &str| reports.iter().filter_map(|r| r.get(key)?.as_u64()).collect::<Sorted>();
    let names = [
        ("closed → drained", "drained_us"),
        ("closed → open", "opened_us"),
        ("closed → first request", "suspended_us"),
    ];
    let mut rows = vec![row(["µs", "p50", "p90", "p99", "max"])];
    let mut values = serde_json::Map::new();
    for (name, key) in names {
        let sorted = of(key);
        let cells = [500, 900, 990, 1000].map(|permille| sorted.at(permille).to_string());
        rows.push([vec![name.to_owned()], cells.to_vec()].concat());
        values.insert(key.to_owned(), sorted.summary());
    }
    let pause = of("suspended_us");
    say(format!("\n{}", table(&rows, &[0])));
    let verdict = |permille, target: f64| at_most(pause.at(permille) as f64, target);
    say(format!(
        "  pause: median {} µs (target ≤ {target_median_us} µs: {}), p99 {} µs (target ≤ 1 ms: {}); requests held: median {}",
        pause.median(),
        verdict(500, target_median_us),
        pause.at(990),
        verdict(990, TARGET_P99_US),
        of("requests_held").median()
    ));
    values.into()
}

pub(super) fn outside(all: &Windows) -> Value {
    let mut rows = vec![row(["longest I/O per 62 ms", "slices", "p50", "p90", "p99", "max"])];
    let mut line = |name: &str, sorted: &Sorted| {
        let cells = [500, 900, 990, 1000].map(|permille| time(sorted.at(permille)));
        rows.push([vec![name.to_owned(), sorted.len().to_string()], cells.to_vec()].concat());
    };
    line("with the switch", &all.of(Kind::Switch));
    line("control: a core started, no switch", &all.of(Kind::Start));
    line("the rest of an upgrade", &all.of(Kind::Operation));
    line("nothing going on", &all.of(Kind::Quiet));
    let without = all.without_switch();
    line("all without a switch", &without);
    say(format!("\n{}", table(&rows, &[0])));
    let mut values = serde_json::Map::new();
    let others = [
        ("all without a switch", without),
        ("nothing going on", all.of(Kind::Quiet)),
        ("control", all.of(Kind::Start)),
    ];
    for (name, others) in others {
        let [median, p99] = [500, 990].map(|permille| all.switch_to(&others, permille));
        say(format!(
            "  switch against {name}: {median:.2} at the median, {p99:.2} at p99 (target ≤ 1.2: {}; {})",
            at_most(median, TARGET_RATIO),
            at_most(p99, TARGET_RATIO)
        ));
        values.insert(name.to_owned(), json!({"p50": median, "p99": p99}));
    }
    values.into()
}
