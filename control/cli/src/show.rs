//! Results for people.

use everdisk_api::{
    Handover, LastUpgrade,
    quantity::show_size,
    status::{Frontend, Program, UpgradePlan, VolumeDescription, VolumeLine, VolumeStatus},
};

use everdisk_proto::{journal::Outcome, volume::Timeouts};

use crate::output::{line, table};

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

fn program(program: Option<&Program>) -> String {
    program.map_or_else(|| "-".to_owned(), |p| format!("{} (process {})", p.version, p.pid))
}

fn buffer(bytes: u64) -> String {
    if bytes == 0 { "none".to_owned() } else { show_size(bytes) }
}

/// Where applications reach a volume.
pub(crate) fn places(v: &VolumeStatus) -> String {
    let addresses: Vec<&str> = v.frontends.iter().map(|f| f.address.as_str()).collect();
    if addresses.is_empty() { "-".to_owned() } else { addresses.join(", ") }
}

/// A front end, and what is known of its clients.
fn frontend(f: &Frontend) -> String {
    let (Some(connections), Some(accepted), Some(carried), Some(broken)) =
        (f.connections, f.accepted, f.carried, f.broken)
    else {
        return f.address.clone();
    };
    format!("{} ({connections} connected of {accepted} accepted, {carried} carried over, {broken} broken)", f.address)
}

/// `volume list`.
pub(crate) fn volumes(lines: &[VolumeLine]) {
    let mut rows = vec![row(&["NAME", "SIZE", "NODES", "STATE"])];
    rows.extend(lines.iter().map(|v| match &v.reason {
        None => row(&[&v.name, &show_size(v.size), &v.nodes.to_string(), v.state.name()]),
        Some(_) => row(&[&v.name, "-", "-", v.state.name()]),
    }));
    table(&rows);
    for volume in lines {
        volume.reason.iter().for_each(|reason| line(&format!("{}: {reason}", volume.name)));
    }
}

/// `volume show`.
pub(crate) fn description(volume: &VolumeDescription) {
    let spec = &volume.spec;
    let mut rows = vec![
        row(&["name", spec.name.as_str()]),
        row(&["state", volume.state.name()]),
        row(&["uuid", &spec.uuid.to_string()]),
        row(&["size", &show_size(spec.size)]),
        row(&["stripe", &show_size(spec.stripe)]),
        row(&["buffer", &buffer(spec.buffer)]),
        row(&["timeouts", &timeouts(&spec.timeouts)]),
        row(&["core", volume.core_version.as_deref().unwrap_or("-")]),
        row(&["previous core", volume.previous_core_version.as_deref().unwrap_or("-")]),
    ];
    rows.extend(spec.nodes.iter().map(|node| row(&["node", &format!("{} {}", node.url, node.uuid)])));
    table(&rows);
}

/// `status` of every volume.
pub(crate) fn statuses(volumes: &[VolumeStatus]) {
    let mut rows =
        vec![row(&["NAME", "STATE", "HEALTH", "SIZE", "CORE", "STANDBY", "IN FLIGHT", "WAITING", "FRONT END"])];
    rows.extend(volumes.iter().map(|v| {
        let version = |p: Option<&Program>| p.map_or_else(|| "-".to_owned(), |p| p.version.clone());
        row(&[
            &v.name,
            v.state.name(),
            v.health.name(),
            &show_size(v.size),
            &version(v.core.as_ref()),
            &version(v.standby.as_ref()),
            &v.in_flight.to_string(),
            &waiting(v),
            &places(v),
        ])
    }));
    table(&rows);
}

/// Requests that are not answered, and how many of them are executing, where that is known.
fn waiting(v: &VolumeStatus) -> String {
    v.waiting.map_or_else(|| "-".to_owned(), |waiting| waiting.to_string())
}

fn buffered(v: &VolumeStatus) -> String {
    if v.buffer_bytes == 0 {
        return "no write buffer".to_owned();
    }
    format!("{} / {}", show_size(v.buffered_bytes), show_size(v.buffer_bytes))
}

/// How long requests wait for storage nodes.
fn timeouts(timeouts: &Timeouts) -> String {
    let [room, full_node, flush, io] = [timeouts.room(), timeouts.full_node(), timeouts.flush(), timeouts.io()];
    format!("room {room:?}, full node {full_node:?}, flush {flush:?}, I/O {io:?}")
}

/// `status` of one volume.
pub(crate) fn status(v: &VolumeStatus) {
    let mut rows = vec![
        row(&["name", &v.name]),
        row(&["state", v.state.name()]),
        row(&["health", v.health.name()]),
        row(&["size", &show_size(v.size)]),
        row(&["mode", v.mode.name()]),
        row(&["buffered", &buffered(v)]),
        row(&["timeouts", &timeouts(&v.timeouts)]),
        row(&["generation", &v.generation.to_string()]),
        row(&["core", &program(v.core.as_ref())]),
        row(&["standby", &program(v.standby.as_ref())]),
        row(&["interface", &program(v.interface.as_ref())]),
        row(&["in flight", &v.in_flight.to_string()]),
        row(&["waiting", &waiting(v)]),
        row(&["crashes survived", &v.crashes_survived.to_string()]),
    ];
    rows.extend(v.problems.iter().map(|problem| row(&["problem", problem])));
    if let Some(lease) = v.lease_ms {
        rows.push(row(&["lease ends in", &format!("{lease} ms")]));
    }
    rows.extend(v.frontends.iter().map(|f| row(&[f.kind.name(), &frontend(f)])));
    for node in &v.nodes {
        let error = node.error.as_deref().map_or(String::new(), |e| format!(" ({e})"));
        rows.push(row(&["node", &format!("{} {}{error}", node.url, node.state)]));
    }
    if let Some(operation) = &v.operation {
        rows.push(row(&["running", operation]));
    }
    if let Some(reason) = &v.reason {
        rows.push(row(&["reason", reason]));
    }
    table(&rows);
    if let Some(last) = &v.last_upgrade {
        line("last upgrade");
        upgrade(last);
    }
}

/// An upgrade that ended.
pub(crate) fn upgrade(report: &LastUpgrade) {
    let outcome = match report.outcome {
        Some(Outcome::Committed) => "committed",
        Some(Outcome::RolledBack) => "rolled-back",
        Some(Outcome::Aborted) => "aborted",
        None => "under way",
    };
    let outcome =
        if report.rollback { format!("{outcome} (a rollback to the build before)") } else { outcome.to_owned() };
    let us = |time: Option<u64>| time.map_or_else(|| "-".to_owned(), |us| format!("{us} µs"));
    let mut rows = vec![
        row(&["  outcome", &outcome]),
        row(&["  from, to", &format!("{} → {}", report.from, report.to.as_deref().unwrap_or("-"))]),
        row(&["  hand-over", &handover(report)]),
        row(&["  suspended", &us(report.suspended_us)]),
        row(&["  attempts", &report.attempts.to_string()]),
        row(&["  requests held", &report.requests_held.to_string()]),
        row(&["  blocks verified", &report.verified_blocks.to_string()]),
    ];
    let steps: Vec<String> = report.steps.iter().map(|s| format!("{} {}", s.step, us(Some(s.us)))).collect();
    rows.push(row(&["  steps", &steps.join(", ")]));
    rows.extend(report.notes.iter().map(|note| row(&["  note", note])));
    if let Some(reason) = &report.reason {
        rows.push(row(&["  reason", reason]));
    }
    table(&rows);
}

/// The policy, and what it did with how much.
fn handover(report: &LastUpgrade) -> String {
    let mut words = report.handover.to_string();
    if report.handover != report.handover_asked {
        words += &format!(" instead of {}", report.handover_asked);
    }
    words += &format!(", {} buffered at the start", show_size(report.buffered_bytes));
    if let Some(ms) = report.flush_ms {
        words += &format!(", flushed for {ms} ms");
    }
    match report.handover {
        Handover::Flush => words,
        Handover::Carry => format!("{words}, {} carried over", show_size(report.carried_bytes)),
    }
}

/// `upgrade --plan`.
pub(crate) fn plan(plan: &UpgradePlan) {
    line(&format!("volume {}: {} → {}, hand-over {}", plan.volume, plan.from, plan.to, plan.handover));
    for check in &plan.checks {
        line(&format!("ok  {check}"));
    }
    let mut rows = vec![row(&["STEP", "DEADLINE", "IF IT FAILS"])];
    for step in &plan.steps {
        rows.push(row(&[&step.step, &format!("{} ms", step.deadline_ms), &step.undo]));
    }
    table(&rows);
    line("nothing was changed");
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use everdisk_proto::frame::NbdStatus;

    use super::*;

    #[test]
    fn a_front_end_says_what_is_known_of_its_clients() {
        assert_eq!(frontend(&Frontend::file(Path::new("/srv/v"))), "/srv/v");
        let address = "unix:/run/v.sock".parse().unwrap();
        assert_eq!(frontend(&Frontend::nbd(&address)), "unix:/run/v.sock");
        let seen = NbdStatus { address, bound: None, connections: 1, accepted: 4, carried: 2, broken: 0 };
        let words = "unix:/run/v.sock (1 connected of 4 accepted, 2 carried over, 0 broken)";
        assert_eq!(frontend(&Frontend::from(&seen)), words);
    }
}
