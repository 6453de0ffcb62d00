//! What is done to the volume, one thing after another.

use std::{thread, time::Duration};

use everdisk_harness::processes;
use everdisk_proto::frame::{InterfaceStatus, Suspension};
use everdisk_sys::clock::monotonic_ns;
use rustix::process::Signal;
use serde_json::Value;

use super::{Event, Kind};
use crate::{
    Result,
    host::{Host, Said, VOLUME},
    interface::Interface,
    load::Load,
    say, stats,
};

/// Between two events.
const BETWEEN: Duration = Duration::from_millis(1500);
/// The volume is suspended by hand for this long.
const SUSPENDED: Duration = Duration::from_millis(300);
/// A core is replaced within this time.
const RECOVERED_WITHIN: Duration = Duration::from_secs(20);
/// Between two questions whether it is.
const POLL_INTERVAL: Duration = Duration::from_millis(40);

#[derive(Clone, Copy)]
enum Act {
    Upgrade(&'static str),
    Rollback,
    Kill,
    Suspend,
}

const NEXT: &str = "everdisk-core-next";
const FIRST: &str = "everdisk-core";

/// The whole demo.
const SCRIPT: [Act; 11] = [
    Act::Upgrade(NEXT),
    Act::Upgrade(FIRST),
    Act::Upgrade(NEXT),
    Act::Kill,
    Act::Upgrade(FIRST),
    Act::Suspend,
    Act::Upgrade(NEXT),
    Act::Rollback,
    Act::Upgrade(NEXT),
    Act::Upgrade(FIRST),
    Act::Upgrade(NEXT),
];

/// Plays the script.
///
/// # Errors
/// A command cannot be run, or the volume does not come back. An upgrade that fails is an event, not an error.
pub fn play(host: &Host, load: &Load) -> Result<Vec<Event>> {
    let mut interface = host.interface();
    let mut events = Vec::new();
    for act in SCRIPT {
        interface.standby(&host.interrupt)?;
        let event = match act {
            Act::Upgrade(program) => replaced(Kind::Upgrade, &host.upgrade(&host.program(program))?),
            Act::Rollback => replaced(Kind::Rollback, &host.everdisk(&["rollback", VOLUME])?),
            Act::Kill => kill(host, &mut interface)?,
            Act::Suspend => suspend(host, &mut interface)?,
        };
        let pause = event.pause_ns.map_or_else(|| "?".to_owned(), stats::time);
        say(format!(
            "  {:<8}  {:>10} → {:<10}  {:<11}  I/O held for {pause:>8}   ({} I/Os so far)",
            event.kind.name(),
            event.from,
            event.to,
            event.outcome,
            load.ios()
        ));
        events.push(event);
        host.interrupt.sleep(BETWEEN)?;
    }
    Ok(events)
}

fn number(json: &Value, key: &str) -> Option<u64> {
    json.get(key).and_then(Value::as_u64)
}

/// An upgrade or a rollback, from the report that the command printed.
fn replaced(kind: Kind, said: &Said) -> Event {
    let text = |key: &str| said.json.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
    let outcome = if said.json.get("outcome").is_some() { text("outcome") } else { said.complaint.clone() };
    Event {
        kind,
        from: text("from"),
        to: text("to"),
        well: said.done && outcome == "committed",
        outcome,
        at_ns: number(&said.json, "closed_monotonic_ns").unwrap_or_else(monotonic_ns),
        pause_ns: number(&said.json, "suspended_us").map(|us| us * 1000),
        held: number(&said.json, "requests_held").unwrap_or(0),
    }
}

fn kill(host: &Host, interface: &mut Interface) -> Result<Event> {
    let pair = interface.standby(&host.interrupt)?;
    let at_ns = monotonic_ns();
    processes::signal(pair.serving.pid, Signal::KILL);
    thread::sleep(POLL_INTERVAL);
    let (status, times) = host.interrupt.wait_for("another core serves", RECOVERED_WITHIN, POLL_INTERVAL, || {
        let status = interface.status()?;
        let times = status.last_suspension;
        let over = status.crashes_survived > pair.crashes && times.closed_ns >= at_ns;
        Ok((over && times.first_request_us.is_some()).then_some((status, times)))
    })?;
    let to = served_by(&status);
    Ok(Event {
        kind: Kind::Kill,
        from: pair.serving.identity.version,
        well: to != "?",
        to,
        outcome: "survived".to_owned(),
        at_ns,
        pause_ns: pause(&times).map(|ns| times.closed_ns - at_ns + ns),
        held: times.held,
    })
}

fn suspend(host: &Host, interface: &mut Interface) -> Result<Event> {
    let suspended = host.everdisk(&["suspend", VOLUME, "--lease", "10s"])?;
    let version = served_by(&interface.status()?);
    thread::sleep(SUSPENDED);
    let resumed = host.everdisk(&["resume", VOLUME])?;
    thread::sleep(POLL_INTERVAL);
    let status = interface.status()?;
    let times = status.last_suspension;
    let well = suspended.done && resumed.done;
    Ok(Event {
        kind: Kind::Suspend,
        from: version,
        to: served_by(&status),
        outcome: if well { "resumed".to_owned() } else { format!("{}{}", suspended.complaint, resumed.complaint) },
        well,
        at_ns: times.closed_ns,
        pause_ns: pause(&times),
        held: times.held,
    })
}

fn pause(times: &Suspension) -> Option<u64> {
    times.first_request_us.or(times.opened_us).map(|us| us * 1000)
}

/// Version of the core that has the gate.
fn served_by(status: &InterfaceStatus) -> String {
    let core = status.cores.iter().find(|core| Some(core.pid) == status.serving);
    core.map_or_else(|| "?".to_owned(), |core| core.identity.version.clone())
}
