//! The problems of a volume: judges what was seen, and logs when each problem begins and ends.
//!
//! The watch runs on a thread of its own for each volume and asks every process with a deadline, so that nothing that hangs keeps it
//! from being seen: what is wrong is in `status`, in `health` and in the log within two seconds.

use std::{
    collections::BTreeMap,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use everdisk_api::status::{Health, Node};
use everdisk_proto::{
    frame::{GateState, InterfaceStatus},
    node::NodeState,
};
use everdisk_telemetry::event;
use tracing::{error, info, warn};

use crate::{
    poll::{Heard, Polled, poll},
    record::{Attachment, Phase},
    status::{all_gone, nodes},
    volume::Volume,
};

/// Interval between two checks.
const INTERVAL: Duration = Duration::from_millis(400);
/// A problem that ends within this time is not logged: a standby that is being replaced, an answer that came late.
const PASSING: Duration = Duration::from_millis(600);
/// With less free space than this, writing a record may fail.
const SPACE_MIN: u64 = 1 << 20;

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What it is about. The same for as long as the same problem lasts.
    pub about: String,
    /// How bad it is.
    pub health: Health,
    /// A sentence: what is wrong, and what to do.
    pub text: String,
    /// The component that reports it has seen it for long enough.
    certain: bool,
}

impl Problem {
    fn new(about: impl Into<String>, health: Health, text: impl Into<String>) -> Self {
        Self { about: about.into(), health, text: text.into(), certain: false }
    }
}

/// The worst of them.
pub fn worst(problems: &[Problem]) -> Health {
    problems.iter().map(|problem| problem.health).max().unwrap_or_default()
}

/// What is wrong with a volume.
pub fn problems(
    volume: &Volume,
    attachment: Option<&Attachment>,
    polled: Option<&Polled>,
    nodes: &[Node],
) -> Vec<Problem> {
    let mut found = of_records(volume);
    let (Some(attachment), Some(polled)) = (attachment.filter(|a| a.phase == Phase::Attached), polled) else {
        return found;
    };
    match polled.status() {
        None => found.extend(of_interface(volume, attachment, polled)),
        Some(status) => {
            found.extend(of_gate(volume, status));
            found.extend(of_cores(volume, status, polled));
            found.extend(of_data(status));
            found.extend(of_fence(status));
        }
    }
    found.extend(nodes.iter().filter_map(of_node));
    found
}

/// Problems of what is remembered.
fn of_records(volume: &Volume) -> Vec<Problem> {
    let directory = volume.paths.state.display();
    let mut found = Vec::new();
    if let Some(trouble) = volume.files.record_trouble() {
        found.push(Problem::new(
            "record",
            Health::Degraded,
            format!("what happens to the volume cannot be recorded: {trouble}; attach, detach, upgrade and the start of a standby fail"),
        ));
    }
    let trouble = match free_bytes(&volume.paths.state) {
        Ok(free) if free < SPACE_MIN => {
            Some(format!("the state directory {directory} is full ({free} bytes are free): free some space there"))
        }
        Ok(_) => None,
        Err(e) => Some(format!("the state directory {directory} cannot be examined: {e}")),
    };
    found.extend(trouble.map(|text| Problem::new("state directory", Health::Degraded, text)));
    found.extend(volume.findings.warning().map(|warning| Problem::new("journal", Health::Degraded, warning)));
    found
}

/// Bytes that this process may still write there.
fn free_bytes(path: &std::path::Path) -> rustix::io::Result<u64> {
    let found = rustix::fs::statvfs(path)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// The interface says nothing.
fn of_interface(volume: &Volume, attachment: &Attachment, polled: &Polled) -> Option<Problem> {
    let lives = attachment.live_cores().next().is_some();
    let answers = polled.cores.iter().any(|(_, nodes)| nodes.is_some());
    let health = if answers { Health::Degraded } else { Health::Failed };
    let io = if answers { "I/O goes on, but" } else { "no core answers either:" };
    let without = format!("{io} the death of a core would stop it, and neither upgrade nor detach is possible");
    match (&polled.interface, attachment.interface.filter(|_| attachment.interface_alive())) {
        (_, None) if !lives => Some(Problem::new("volume", Health::Failed, all_gone(volume, attachment))),
        (_, None) => {
            let why =
                volume.findings.trouble().unwrap_or_else(|| "the interface has died and is started again".to_owned());
            Some(Problem::new("interface", health, format!("{why}; {without}")))
        }
        (Heard::Restoring, _) => Some(Problem::new(
            "interface",
            health,
            format!(
                "the interface has died, and a new one waits for a core that gives it the descriptors back; {without}"
            ),
        )),
        (_, Some(process)) => Some(Problem::new(
            "interface",
            health,
            format!(
                "the interface (process {0}) does not answer; {without}: let it go on (kill -CONT {0}) or have another one take its \
                 place (kill -KILL {0})",
                process.pid
            ),
        )),
    }
}

/// No core serves.
fn of_gate(volume: &Volume, status: &InterfaceStatus) -> Option<Problem> {
    let why = volume.findings.trouble().unwrap_or_else(|| "no core serves".to_owned());
    let waiting = waiting(status);
    match status.gate {
        GateState::Serving | GateState::Suspended => None,
        GateState::Recovering => Some(Problem::new("service", Health::Failed, format!("{why}{waiting}"))),
        GateState::Detached => {
            Some(Problem::new("service", Health::Failed, format!("the front ends are not open{waiting}")))
        }
    }
}

fn waiting(status: &InterfaceStatus) -> String {
    match status.waiting {
        None | Some(0) => String::new(),
        Some(1) => "; 1 request waits".to_owned(),
        Some(n) => format!("; {n} requests wait"),
    }
}

fn of_cores(volume: &Volume, status: &InterfaceStatus, polled: &Polled) -> Vec<Problem> {
    let mut found = Vec::new();
    let limit = volume.programs.hang_limit.as_secs_f64();
    let silent = |pid: u32| polled.answers(pid) == Some(false);
    if let Some(pid) = status.serving.filter(|pid| silent(*pid)) {
        let health = if status.waiting == Some(0) { Health::Degraded } else { Health::Failed };
        let text = format!(
            "the core that serves (process {pid}) does not answer{}: it is killed and the standby takes over when requests have \
             waited {limit} s for it",
            waiting(status)
        );
        found.push(Problem::new("core", health, text));
    }
    let others = || status.cores.iter().filter(|core| Some(core.pid) != status.serving);
    for core in others().filter(|core| core.armed && silent(core.pid)) {
        let text = format!(
            "the standby core (process {}) does not answer and could not take over: it is replaced when that lasts {limit} s",
            core.pid
        );
        found.push(Problem::new("standby", Health::Degraded, text));
    }
    if status.serving.is_some() && !others().any(|core| core.armed) {
        let why = volume.findings.standby_trouble().unwrap_or_else(|| "one is being started".to_owned());
        let text = format!("no standby core is ready, so the death of the core would interrupt I/O: {why}");
        found.push(Problem::new("standby", Health::Degraded, text));
    }
    for core in others().filter(|core| core.writing > 0 && status.serving.is_some()) {
        let text = format!(
            "a write of an earlier core (process {}) to a storage node has not ended; until it has, nothing is sent to the storage \
             nodes",
            core.pid
        );
        found.push(Problem::new(format!("write of {}", core.pid), Health::Degraded, text));
    }
    found
}

fn of_data(status: &InterfaceStatus) -> Option<Problem> {
    let damaged = status.buffer.map_or(0, |buffer| buffer.damaged_ranges);
    let text =
        format!("buffered data of {damaged} ranges was found damaged: reads there fail until they are written anew");
    (damaged > 0).then(|| Problem::new("data", Health::Degraded, text))
}

/// What a dead core has sent to NBD storage nodes is not answered.
fn of_fence(status: &InterfaceStatus) -> Option<Problem> {
    let text = format!(
        "changes of a core that has died are still in flight on {} connections to NBD storage nodes: nothing is written to a storage \
         node until their servers answer",
        status.undrained
    );
    (status.undrained > 0).then(|| Problem::new("fence", Health::Degraded, text))
}

fn of_node(node: &Node) -> Option<Problem> {
    let url = &node.url;
    let error = node.error.as_deref().map_or(String::new(), |error| format!(": {error}"));
    let text = match node.state {
        NodeState::Stalled => {
            format!("an operation on storage node {url} does not end: requests that need it wait{error}")
        }
        NodeState::Failed => format!("storage node {url} fails{error}"),
        NodeState::InStep | NodeState::Missing | NodeState::Rebuilding | NodeState::Unknown => return None,
    };
    Some(Problem { certain: true, ..Problem::new(format!("node {url}"), Health::Degraded, text) })
}

/// Starts the watch over a volume. It ends when the volume is deleted.
///
/// # Errors
/// No thread can be started.
pub fn watch(volume: &Arc<Volume>) -> std::io::Result<()> {
    let volume = Arc::clone(volume);
    thread::Builder::new().name(format!("health-{}", volume.name)).spawn(move || {
        let mut told = Told::default();
        while !volume.operations.is_deleted() {
            volume.files.retry_record();
            let attachment = volume.attachment().filter(|attachment| attachment.phase == Phase::Attached);
            let seen = attachment.as_ref().map(|attachment| poll(&volume, attachment));
            let nodes = seen.as_ref().map(|seen| nodes(&volume, seen)).unwrap_or_default();
            note_silence(&volume, seen.as_ref());
            told.tell(&volume, problems(&volume, attachment.as_ref(), seen.as_ref(), &nodes), Instant::now());
            thread::sleep(INTERVAL);
        }
    })?;
    Ok(())
}

/// Since when each core does not answer, for the supervisor.
fn note_silence(volume: &Volume, seen: Option<&Polled>) {
    let cores = seen.map(|seen| seen.cores.as_slice()).unwrap_or_default();
    let silent: Vec<u32> = cores.iter().filter(|(_, nodes)| nodes.is_none()).map(|(pid, _)| *pid).collect();
    volume.findings.set_silent(&silent);
}

/// The troubles that were seen, and which of them were logged.
#[derive(Debug, Default)]
struct Told(BTreeMap<String, Trouble>);

#[derive(Debug)]
struct Trouble {
    since: Instant,
    is_told: bool,
}

impl Told {
    /// One line for a trouble that begins, one for its end.
    fn tell(&mut self, volume: &Volume, problems: Vec<Problem>, now: Instant) {
        let name = &volume.name;
        self.0.retain(|about, trouble| {
            let goes_on = problems.iter().any(|problem| problem.about == *about);
            if !goes_on && trouble.is_told {
                let lasted_ms = u64::try_from((now - trouble.since).as_millis()).expect("u64 holds 500 million years");
                info!(event = event::PROBLEM_ENDED, volume = %name, about, lasted_ms, "the problem is over");
            }
            goes_on
        });
        for problem in problems {
            let Problem { about, health, text, certain } = problem;
            let trouble = self.0.entry(about.clone()).or_insert(Trouble { since: now, is_told: false });
            if trouble.is_told || !(certain || now - trouble.since >= PASSING) {
                continue;
            }
            trouble.is_told = true;
            match health {
                Health::Failed => error!(event = event::PROBLEM_BEGAN, volume = %name, about, "{text}"),
                Health::Degraded | Health::Ok => warn!(event = event::PROBLEM_BEGAN, volume = %name, about, "{text}"),
            }
        }
    }
}
