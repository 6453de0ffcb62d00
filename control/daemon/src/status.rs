//! The status of a volume. Its processes are polled each time.

use std::{sync::Arc, thread};

use everdisk_api::status::{
    Frontend, Health, Node, Program, State, VolumeDescription, VolumeLine, VolumeStatus, WriteMode,
};
use everdisk_proto::{
    frame::{GateState, InterfaceStatus},
    identity::{Build, Component, Identity},
    ids::VolumeName,
    node::NodeState,
    volume::{Timeouts, VolumeSpec},
};

use crate::{
    health,
    poll::{Polled, poll},
    record::{Attachment, Phase},
    stage,
    volume::{Running, Volume},
};

/// Most threads that poll at once.
const ASKERS_MAX: usize = 32;

/// Everything about a volume. Never waits for an operation, and for no process longer than a second.
pub fn status(volume: &Volume) -> VolumeStatus {
    // First of all: what an operation that has ended left behind is in everything that is asked afterwards.
    let running = volume.operations.running();
    let attachment = volume.attachment();
    let polled = attachment.as_ref().map(|attachment| poll(volume, attachment));
    let seen = polled.as_ref().and_then(Polled::status);
    let spec = volume.spec();
    let (state, reason) = judge(volume, running, attachment.as_ref(), seen);
    let nodes = polled.as_ref().map_or_else(|| unknown(&spec), |polled| nodes(volume, polled));
    let problems = health::problems(volume, attachment.as_ref(), polled.as_ref(), &nodes);
    let mut status = VolumeStatus {
        state,
        health: health::worst(&problems),
        problems: problems.into_iter().map(|problem| problem.text).collect(),
        size: spec.size,
        mode: mode(spec.buffer == 0),
        buffer_bytes: spec.buffer,
        timeouts: spec.timeouts,
        nodes,
        last_upgrade: volume.record().last_upgrade,
        operation: running
            .map(|running| format!("{} since {} s", running.name.text(), running.since.elapsed().as_secs())),
        reason: reason.or_else(|| volume.findings.warning()),
        daemon: Some(own_program(volume)),
        ..empty(volume.name.to_string())
    };
    if let Some(attachment) = attachment.filter(|a| a.phase != Phase::Attaching) {
        status.frontends = frontends(&attachment, seen);
    }
    if let Some(seen) = seen {
        enter(&mut status, volume, seen.clone());
    }
    status
}

/// As [`status`], for several volumes concurrently: one that does not answer delays no other.
pub fn statuses(volumes: &[Arc<Volume>]) -> Vec<VolumeStatus> {
    side_by_side(volumes, status)
}

/// As [`line`], of several volumes side by side.
pub fn lines(volumes: &[Arc<Volume>]) -> Vec<VolumeLine> {
    side_by_side(volumes, line)
}

fn side_by_side<T: Send>(volumes: &[Arc<Volume>], ask: impl Fn(&Volume) -> T + Sync) -> Vec<T> {
    let of_some = |volumes: &[Arc<Volume>]| volumes.iter().map(|volume| ask(volume)).collect::<Vec<T>>();
    thread::scope(|scope| {
        let parts: Vec<_> = volumes
            .chunks(volumes.len().div_ceil(ASKERS_MAX).max(1))
            .map(|part| (part, thread::Builder::new().spawn_scoped(scope, || of_some(part))))
            .collect();
        let answers = parts.into_iter().flat_map(|(part, asker)| match asker {
            Ok(asker) => asker.join().expect("asking a volume does not panic"),
            // No thread can be started: this one asks.
            Err(_) => of_some(part),
        });
        answers.collect()
    })
}

/// The storage nodes as the core that serves sees them, and what was found out about them before.
pub fn nodes(volume: &Volume, polled: &Polled) -> Vec<Node> {
    let seen = polled.status().and_then(|status| status.serving).and_then(|pid| Some((pid, polled.nodes(pid)?)));
    match seen {
        Some((core, seen)) => seen.iter().map(|node| volume.findings.see_node(core, node)).collect(),
        None => unknown(&volume.spec()).into_iter().map(|node| volume.findings.recall_node(node)).collect(),
    }
}

/// A volume whose files are damaged.
pub fn damaged(name: &VolumeName, why: String) -> VolumeStatus {
    VolumeStatus {
        state: State::Failed,
        health: Health::Failed,
        problems: vec![why.clone()],
        reason: Some(why),
        ..empty(name.to_string())
    }
}

/// The line of such a volume in the list.
pub fn damaged_line(name: &VolumeName, why: String) -> VolumeLine {
    VolumeLine { name: name.to_string(), size: 0, state: State::Failed, nodes: 0, reason: Some(why) }
}

/// Of which nothing is known.
fn empty(name: String) -> VolumeStatus {
    VolumeStatus {
        name,
        state: State::Detached,
        health: Health::Ok,
        problems: Vec::new(),
        size: 0,
        mode: mode(false),
        generation: 0,
        core: None,
        standby: None,
        interface: None,
        daemon: None,
        segment_abi: None,
        frontends: Vec::new(),
        buffered_bytes: 0,
        buffer_bytes: 0,
        timeouts: Timeouts::default(),
        damaged_ranges: 0,
        in_flight: 0,
        waiting: None,
        nodes: Vec::new(),
        last_upgrade: None,
        crashes_survived: 0,
        lease_ms: None,
        operation: None,
        cores: Vec::new(),
        reason: None,
    }
}

/// Where applications reach the volume: as recorded, and of NBD as it is while the interface says so.
fn frontends(attachment: &Attachment, seen: Option<&InterfaceStatus>) -> Vec<Frontend> {
    let file = attachment.file.iter().map(|file| Frontend::file(&file.path));
    // One that is being restored has not all of them yet.
    match seen.filter(|seen| seen.nbd.len() == attachment.nbd.len()) {
        Some(seen) => file.chain(seen.nbd.iter().map(Frontend::from)).collect(),
        None => file.chain(attachment.nbd.iter().map(|nbd| Frontend::nbd(&nbd.address))).collect(),
    }
}

const fn mode(synchronous: bool) -> WriteMode {
    if synchronous { WriteMode::Synchronous } else { WriteMode::WriteBack }
}

/// This process.
fn own_program(volume: &Volume) -> Program {
    let identity = Identity::current(Component::Control);
    let build = volume.programs.own_digest().map(str::to_owned);
    Program { pid: std::process::id(), version: identity.version, abi: Some(identity.abi), build }
}

fn enter(status: &mut VolumeStatus, volume: &Volume, seen: InterfaceStatus) {
    status.mode = mode(seen.buffer.is_none_or(|buffer| buffer.synchronous));
    status.buffer_bytes = seen.buffer.map_or(0, |buffer| buffer.capacity);
    status.buffered_bytes = seen.buffer.map_or(0, |buffer| buffer.buffered_bytes);
    status.damaged_ranges = seen.buffer.map_or(0, |buffer| buffer.damaged_ranges);
    if status.damaged_ranges > 0 {
        let damage = format!(
            "buffered data of {} ranges was found damaged: reads there fail until they are written anew",
            status.damaged_ranges
        );
        status.reason = Some(status.reason.take().map_or(damage.clone(), |reason| format!("{reason}; {damage}")));
    }
    let record = volume.record();
    let program = |pid: u32| {
        let core = seen.cores.iter().find(|core| core.pid == pid)?;
        let build = record.digest_of(pid);
        Some(Program { pid, version: core.identity.version.clone(), abi: Some(core.identity.abi), build })
    };
    status.core = seen.serving.and_then(program);
    // During an upgrade the youngest armed core is the one that is about to take over.
    let mut others = seen.cores.iter().filter(|core| core.armed && Some(core.pid) != seen.serving);
    status.standby = others.next_back().and_then(|core| program(core.pid));
    status.cores = seen.cores.iter().filter_map(|core| program(core.pid)).collect();
    status.segment_abi = stage::segment_abi_on_record(volume, &seen);
    status.interface = Some(Program {
        pid: seen.pid,
        version: seen.version,
        abi: seen.identity.map(|identity| identity.abi),
        build: record.interface.and_then(|build| build.digest),
    });
    status.generation = seen.generation.0;
    status.in_flight = seen.in_flight;
    status.waiting = seen.waiting;
    status.crashes_survived = seen.crashes_survived;
    status.lease_ms = seen.lease_ms;
}

/// The state in one word, and why it is not a better one.
fn judge(
    volume: &Volume,
    running: Option<Running>,
    attachment: Option<&Attachment>,
    seen: Option<&InterfaceStatus>,
) -> (State, Option<String>) {
    let Some(attachment) = attachment.filter(|a| a.phase != Phase::Attaching) else { return (State::Detached, None) };
    let Some(seen) = seen else {
        let reason = volume.findings.trouble();
        if attachment.interface_alive() {
            return (State::Recovering, reason.or_else(|| Some("the interface does not answer".to_owned())));
        }
        if attachment.live_cores().next().is_some() {
            return (State::Recovering, reason.or_else(|| Some("the interface has died".to_owned())));
        }
        // Not what the supervisor said: its last pass may have been before the death.
        return (State::Failed, Some(all_gone(volume, attachment)));
    };
    let upgrading = running.is_some_and(|running| running.name.replaces_the_core());
    match seen.gate {
        GateState::Serving | GateState::Suspended if upgrading => (State::Upgrading, None),
        GateState::Serving => (State::Serving, None),
        GateState::Suspended => (State::Suspended, None),
        GateState::Recovering => {
            (State::Recovering, volume.findings.trouble().or_else(|| Some("the core has died".to_owned())))
        }
        GateState::Detached => (State::Recovering, volume.findings.trouble()),
    }
}

/// What is wrong, and what to do, when no process of an attached volume is left.
pub fn all_gone(volume: &Volume, attachment: &Attachment) -> String {
    format!(
        "core and interface are gone: `everdisk attach {0} {1}` brings it back, `everdisk detach {0} --force` gives it up",
        volume.name,
        attachment.options()
    )
}

fn unknown(spec: &VolumeSpec) -> Vec<Node> {
    let node = |node: &everdisk_proto::volume::NodeSpec| Node {
        url: node.url.to_string(),
        uuid: node.uuid,
        state: NodeState::Unknown,
        missed_bytes: 0,
        error: None,
    };
    spec.nodes.iter().map(node).collect()
}

/// The state alone.
pub fn state(volume: &Volume) -> State {
    let running = volume.operations.running();
    let attachment = volume.attachment();
    let seen = attachment.as_ref().and_then(|_| volume.interface().status().ok());
    judge(volume, running, attachment.as_ref(), seen.as_ref()).0
}

/// A line of the list.
pub fn line(volume: &Volume) -> VolumeLine {
    let spec = volume.spec();
    VolumeLine {
        name: spec.name.to_string(),
        size: spec.size,
        state: state(volume),
        nodes: spec.nodes.len(),
        reason: None,
    }
}

/// The description.
pub fn describe(volume: &Volume) -> VolumeDescription {
    let record = volume.record();
    let version = |build: Build| build.identity.version;
    VolumeDescription {
        spec: volume.spec(),
        state: state(volume),
        core_version: record.current.map(version),
        previous_core_version: record.previous.map(version),
    }
}

#[cfg(test)]
mod tests;
