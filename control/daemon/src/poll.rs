//! Polls all processes of a volume in parallel. A process that does not answer delays no other.

use std::time::{Duration, Instant};

use everdisk_proto::frame::{
    Answer, Body, CoreAnswer, CoreRequest, FromInterface, InterfaceStatus, NodeStatus, RESTORING, Request, ToInterface,
};
use everdisk_sys::link::Link;

use crate::{peers::STATUS_DEADLINE, record::Attachment, volume::Volume};

/// What the interface says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// How it stands.
    Status(Box<InterfaceStatus>),
    /// It was started anew and waits for a core that gives the descriptors back.
    Restoring,
    /// Nothing in time.
    Silent,
}

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Polled {
    /// The interface.
    pub interface: Heard,
    /// The cores by process id, and their storage nodes; none where a core does not answer.
    pub cores: Vec<(u32, Option<Vec<NodeStatus>>)>,
}

impl Polled {
    /// The interface's status.
    pub fn status(&self) -> Option<&InterfaceStatus> {
        match &self.interface {
            Heard::Status(status) => Some(status),
            Heard::Restoring | Heard::Silent => None,
        }
    }

    /// Whether a core that was asked has answered; none when it was not asked.
    pub fn answers(&self, pid: u32) -> Option<bool> {
        self.cores.iter().find(|(core, _)| *core == pid).map(|(_, nodes)| nodes.is_some())
    }

    /// The storage nodes as a core sees them.
    pub fn nodes(&self, pid: u32) -> Option<&[NodeStatus]> {
        self.cores.iter().find(|(core, _)| *core == pid)?.1.as_deref()
    }
}

/// A question that is under way.
struct Question<S, R>(Option<Link<S, R>>);

impl<S: Body, R: Body> Question<S, R> {
    fn ask(path: &std::path::Path, what: S) -> Self {
        let link = Link::connect(path).ok();
        Self(link.filter(|link| link.send(1, what, &[]).is_ok()))
    }

    fn answer(&self, until: Instant) -> Option<R> {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let (frame, _) = self.0.as_ref()?.recv_within(left).ok()?;
        Some(frame.body)
    }
}

/// Asks the interface and every core that runs. Takes [`STATUS_DEADLINE`] at most.
pub fn poll(volume: &Volume, attachment: &Attachment) -> Polled {
    let until = Instant::now() + STATUS_DEADLINE;
    let socket = volume.paths.interface_socket();
    let interface = Question::<ToInterface, FromInterface>::ask(&socket, ToInterface::Request(Request::Status));
    let ask = |pid| Question::<CoreRequest, CoreAnswer>::ask(&volume.paths.core_socket(pid), CoreRequest::Status);
    let mut cores: Vec<(u32, Question<_, _>)> =
        attachment.live_cores().map(|core| (core.process.pid, ask(core.process.pid))).collect();
    let interface = match interface.answer(until) {
        Some(FromInterface::Answer(Answer::Status(status))) => Heard::Status(status),
        Some(FromInterface::Answer(Answer::Failed { reason, .. })) if reason == RESTORING => Heard::Restoring,
        _ => Heard::Silent,
    };
    if let Heard::Status(status) = &interface
        && let Some(serving) = status.serving.filter(|pid| cores.iter().all(|(core, _)| core != pid))
    {
        // It was started and is not on record yet, or no longer.
        cores.push((serving, ask(serving)));
    }
    let cores = cores.into_iter().map(|(pid, question)| match question.answer(until) {
        Some(CoreAnswer::Status { nodes }) => (pid, Some(nodes)),
        _ => (pid, None),
    });
    Polled { interface, cores: cores.collect() }
}
