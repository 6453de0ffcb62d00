//! Asking a volume's interface and cores. One connection for each question, so that questions of several threads never
//! wait for one another here.

use std::{path::Path, time::Duration};

use everdisk_proto::{
    frame::{
        Answer, Body, CoreAnswer, CoreRequest, FileAttach, FromInterface, HandoverFailure, HandoverReport,
        InterfaceStatus, NbdListen, NodeStatus, Request, ToInterface,
    },
    limits::PEER_DEADLINE,
};
use everdisk_sys::link::{Link, LinkError};

use crate::{
    error::{Error, Result},
    places,
    progress::milliseconds,
};

/// Time limit for the interface's answer to a status request.
pub const STATUS_DEADLINE: Duration = Duration::from_secs(1);
/// fusermount3 may take 10 s.
const ATTACH_DEADLINE: Duration = Duration::from_secs(15);
/// Unmounting waits for the kernel to write back.
pub const DETACH_DEADLINE: Duration = Duration::from_secs(30);
/// A forced unmount waits for no user, but fusermount3 may take 10 s.
const FORCED_DETACH_DEADLINE: Duration = Duration::from_secs(15);
/// Time limit for a core's answer about its stores. Without an answer their state is unknown.
const CORE_STATUS_DEADLINE: Duration = Duration::from_millis(500);

const MOUNTINFO: &str = "read /proc/self/mountinfo";

/// Why the front ends were not given up.
#[derive(Debug)]
pub enum NotDetached {
    /// A process has the file open, or a client is connected.
    InUse(String),
    /// Anything else.
    Other(Error),
}

/// The interface of a volume, by its socket.
#[derive(Clone, Copy, Debug)]
pub struct Interface<'a>(pub &'a Path);

impl Interface<'_> {
    fn ask(self, request: Request, limit: Duration) -> Result<Answer> {
        let failed = |source| Error::Peer { who: "interface", source };
        let mut link: Link<ToInterface, FromInterface> = Link::connect(self.0).map_err(failed)?;
        match link.ask(ToInterface::Request(request), limit).map_err(failed)? {
            FromInterface::Answer(answer) => Ok(answer),
            FromInterface::Refused { reason } => Err(Error::Failed(format!("the interface refused: {reason}"))),
            _ => Err(Error::Failed("the interface sent an unexpected kind of answer".to_owned())),
        }
    }

    /// Asks for something that is done or not.
    fn command(self, request: Request, limit: Duration) -> Result<()> {
        match self.ask(request, limit)? {
            Answer::Done => Ok(()),
            Answer::Failed { reason, .. } => Err(Error::Failed(reason)),
            _ => Err(Error::Failed("the interface sent an unexpected kind of answer".to_owned())),
        }
    }

    /// How it stands.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(self) -> Result<InterfaceStatus> {
        match self.ask(Request::Status, STATUS_DEADLINE)? {
            Answer::Status(status) => Ok(*status),
            Answer::Failed { reason, .. } => Err(Error::Failed(reason)),
            _ => Err(Error::Failed("the interface sent an unexpected kind of answer".to_owned())),
        }
    }

    /// Opens the front ends, all of them or none, and lets `core` serve them.
    ///
    /// # Errors
    /// Why they were not.
    pub fn attach(self, file: Option<FileAttach>, nbd: Vec<NbdListen>, core: u32) -> Result<()> {
        self.command(Request::Attach { file, nbd, core }, ATTACH_DEADLINE)
    }

    /// Suspends, switches, probes and resumes. A refusal is a hand-over that did not switch.
    ///
    /// # Errors
    /// It did not answer: it is not known which core serves.
    pub fn hand_over(self, to: u32, budget: Duration) -> Result<HandoverReport> {
        let before = self.status()?;
        let budget_ms = milliseconds(budget);
        match self.ask(Request::Handover { to, budget_ms }, budget + PEER_DEADLINE)? {
            Answer::Handover(report) => Ok(report),
            Answer::Failed { reason, .. } => Ok(HandoverReport {
                failure: Some(HandoverFailure { switched: false, reason }),
                generation: before.generation,
                suspension: everdisk_proto::frame::Suspension::default(),
                probe_blocks: 0,
                carried_bytes: 0,
                adopted_us: None,
            }),
            _ => Err(Error::Failed("the interface sent an unexpected kind of answer".to_owned())),
        }
    }

    /// Holds all I/O.
    ///
    /// # Errors
    /// Why not.
    pub fn suspend(self, lease: Duration) -> Result<()> {
        let lease_ms = milliseconds(lease);
        self.command(Request::Suspend { lease_ms }, PEER_DEADLINE + PEER_DEADLINE)
    }

    /// Lets I/O go on.
    ///
    /// # Errors
    /// Why not.
    pub fn resume(self) -> Result<()> {
        self.command(Request::Resume, PEER_DEADLINE)
    }

    /// Has writes go through to the storage nodes before they are acknowledged, or be buffered again.
    ///
    /// # Errors
    /// Why not.
    pub fn synchronous(self, on: bool) -> Result<()> {
        self.command(Request::Synchronous { on }, PEER_DEADLINE)
    }

    /// Asks a core that does not have the gate to leave.
    ///
    /// # Errors
    /// Why not.
    pub fn dismiss(self, core: u32) -> Result<()> {
        self.command(Request::Dismiss { core }, PEER_DEADLINE)
    }

    /// Unmounts `file` and gives up every other front end; the interface and its cores end.
    ///
    /// # Errors
    /// [`NotDetached`].
    pub fn detach(self, force: bool, file: Option<&FileAttach>) -> Result<(), NotDetached> {
        let limit = if force { FORCED_DETACH_DEADLINE } else { DETACH_DEADLINE };
        match self.ask(Request::Detach { force }, limit) {
            Ok(Answer::Done) => Ok(()),
            // It ended: having unmounted, and before its answer could be read, or in the middle of it. Of NBD front ends
            // nothing tells which: the cores have their sockets too.
            Err(e @ Error::Peer { source: LinkError::Closed, .. }) => match file.map(places::mount_of) {
                Some(Ok(None)) => Ok(()),
                Some(Err(source)) => Err(NotDetached::Other(Error::Io { doing: MOUNTINFO.to_owned(), source })),
                Some(Ok(Some(_))) | None => Err(NotDetached::Other(e)),
            },
            Ok(Answer::Failed { reason, busy: true }) => Err(NotDetached::InUse(reason)),
            Ok(Answer::Failed { reason, busy: false }) => Err(NotDetached::Other(Error::Failed(reason))),
            Ok(_) => {
                Err(NotDetached::Other(Error::Failed("the interface sent an unexpected kind of answer".to_owned())))
            }
            Err(e) => Err(NotDetached::Other(e)),
        }
    }
}

/// A core, by its socket.
#[derive(Clone, Copy, Debug)]
pub struct Core<'a>(pub &'a Path);

impl Core<'_> {
    fn ask(self, request: CoreRequest, limit: Duration) -> Result<CoreAnswer> {
        ask_core(self.0, request, limit).map_err(|source| Error::Peer { who: "core", source })
    }

    /// Begins to make everything acknowledged durable.
    ///
    /// # Errors
    /// It cannot be reached.
    pub fn flush(self) -> Result<Flush> {
        let link = Link::connect(self.0).map_err(|source| Error::Peer { who: "core", source })?;
        Ok(Flush { link, id: 0 })
    }

    /// Has a core that does not have the gate take the write buffer in; how many bytes of it it knows now.
    ///
    /// # Errors
    /// It does not.
    pub fn follow(self, limit: Duration) -> Result<u64> {
        match self.ask(CoreRequest::Follow, limit)? {
            CoreAnswer::Following { buffered_bytes } => Ok(buffered_bytes),
            CoreAnswer::Failed { reason } => Err(Error::Failed(reason)),
            _ => Err(Error::Failed("the core sent an unexpected kind of answer".to_owned())),
        }
    }

    /// Reads blocks spread over the volume; how many could be read.
    ///
    /// # Errors
    /// Not all could.
    pub fn verify(self, blocks: u32, limit: Duration) -> Result<u32> {
        match self.ask(CoreRequest::Verify { blocks }, limit)? {
            CoreAnswer::Verified { blocks } => Ok(blocks),
            CoreAnswer::Failed { reason } => Err(Error::Failed(reason)),
            _ => Err(Error::Failed("the core sent an unexpected kind of answer".to_owned())),
        }
    }

    /// How the stores are.
    ///
    /// # Errors
    /// It does not answer.
    pub fn nodes(self) -> Result<Vec<NodeStatus>> {
        match self.ask(CoreRequest::Status, CORE_STATUS_DEADLINE)? {
            CoreAnswer::Status { nodes } => Ok(nodes),
            _ => Err(Error::Failed("the core sent an unexpected kind of answer".to_owned())),
        }
    }
}

/// A flush at a core. All of it uses one connection: a core answers a limited number at a time, and a storage node that hangs
/// would hold up each.
#[derive(Debug)]
pub struct Flush {
    link: Link<CoreRequest, CoreAnswer>,
    id: u64,
}

/// How far a flush is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// Everything is durable.
    All,
    /// This number of bytes is still buffered.
    Left(u64),
}

impl Flush {
    /// Asks the core to do as much as `limit` allows.
    ///
    /// # Errors
    /// It has gone.
    pub fn ask(&mut self, limit: Duration) -> Result<()> {
        self.id += 1;
        let limit_ms = milliseconds(limit);
        let asked = self.link.send(self.id, CoreRequest::Flush { limit_ms }, &[]);
        asked.map_err(|source| Error::Peer { who: "core", source })
    }

    /// Its answer, when there is one within `limit`.
    ///
    /// # Errors
    /// A storage node did not take it, or the core has gone.
    pub fn answer(&mut self, limit: Duration) -> Result<Option<Flushed>> {
        match self.link.recv_within(limit) {
            Err(LinkError::Deadline(_)) => Ok(None),
            Err(source) => Err(Error::Peer { who: "core", source }),
            Ok((frame, _)) if frame.id != self.id => Ok(None),
            Ok((frame, _)) => match frame.body {
                CoreAnswer::Flushed => Ok(Some(Flushed::All)),
                CoreAnswer::Flushing { buffered_bytes } => Ok(Some(Flushed::Left(buffered_bytes))),
                CoreAnswer::Failed { reason } => Err(Error::Failed(reason)),
                _ => Err(Error::Failed("the core sent an unexpected kind of answer".to_owned())),
            },
        }
    }
}

fn ask_core<S: Body, R: Body>(path: &Path, body: S, limit: Duration) -> Result<R, LinkError> {
    Link::<S, R>::connect(path)?.ask(body, limit)
}

#[cfg(test)]
mod tests;
