//! A scripted interface and scripted cores for the tests of this crate.

use std::{os::fd::AsFd, sync::Arc, thread, time::Duration};

use everdisk_proto::{
    frame::{
        Answer, BufferStatus, CoreAnswer, CoreRequest, CoreStatus, FileAttach, FromInterface, GateState,
        HandoverFailure, HandoverReport, InterfaceStatus, Request, Suspension, ToInterface,
    },
    identity::{Component, Identity},
    ids::{Generation, Slot},
    version::{ABI, BUFFER},
};
use everdisk_sys::{
    link::{Link, wait_readable},
    packet,
};
use parking_lot::Mutex;

use crate::{
    process::{ProcessId, boot_id},
    record::{Attachment, Phase},
    volume::Volume,
};

/// A write buffer with something in it.
pub(crate) fn buffer(buffered_bytes: u64) -> BufferStatus {
    BufferStatus { version: BUFFER, capacity: 64 << 20, buffered_bytes, damaged_ranges: 0, synchronous: false }
}

/// Listens like a core of a volume and answers from a script, until it is dropped.
pub(crate) struct Core(Arc<Mutex<CoreScript>>);

struct CoreScript {
    asked: Vec<CoreRequest>,
    ended: bool,
}

impl Core {
    /// The core with this process id. Where there is no answer, the connection is closed.
    pub(crate) fn start(
        volume: &Volume,
        pid: u32,
        mut answer: impl FnMut(&CoreRequest) -> Option<CoreAnswer> + Send + 'static,
    ) -> Self {
        let script = Arc::new(Mutex::new(CoreScript { asked: Vec::new(), ended: false }));
        let listener = packet::listen(&volume.paths.core_socket(pid)).unwrap();
        let shared = Arc::clone(&script);
        thread::spawn(move || {
            while !shared.lock().ended {
                if !wait_readable(listener.as_fd(), Duration::from_millis(20)).unwrap() {
                    continue;
                }
                let link: Link<CoreAnswer, CoreRequest> = Link::new(packet::accept(listener.as_fd()).unwrap());
                while let Ok((frame, _)) = link.recv() {
                    shared.lock().asked.push(frame.body.clone());
                    let Some(answer) = answer(&frame.body) else { break };
                    let _ = link.send(frame.id, answer, &[]);
                }
            }
        });
        Self(script)
    }

    /// What it was asked.
    pub(crate) fn asked(&self) -> Vec<CoreRequest> {
        self.0.lock().asked.clone()
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.0.lock().ended = true;
    }
}

/// Listens like the interface of a volume and answers from a script.
pub(crate) struct Interface(Arc<Mutex<Script>>);

struct Script {
    status: InterfaceStatus,
    asked: Vec<Request>,
    hand_over: HandOver,
    when_gone: Option<(ProcessId, u32)>,
    in_use: bool,
    /// It leaves questions after the status without an answer.
    is_late: bool,
    ended: bool,
}

#[derive(Clone, Copy)]
enum HandOver {
    Switch,
    Refuse,
    HangUp { switch: bool },
}

/// An armed core.
pub(crate) fn core(pid: u32, slot: usize) -> CoreStatus {
    CoreStatus {
        pid,
        slot: Slot::new(slot).unwrap(),
        identity: Identity::current(Component::Core),
        armed: true,
        requests: 0,
        io_errors: 0,
        writing: 0,
    }
}

impl Interface {
    /// Attaches the volume to itself: this process passes for the interface.
    pub(crate) fn start(volume: &Volume) -> Self {
        let attachment = Attachment {
            boot_id: boot_id(),
            phase: Phase::Attached,
            file: Some(FileAttach {
                path: "/srv/v".into(),
                mode: 0o600,
                uid: 0,
                gid: 0,
                allow_other: false,
                source: None,
                target: None,
            }),
            nbd: Vec::new(),
            created_file: false,
            interface: ProcessId::of(std::process::id()),
            cores: Vec::new(),
            started: 0,
            home: None,
        };
        volume.update(|record| record.attachment = Some(attachment)).unwrap();
        let status = InterfaceStatus {
            version: "1".to_owned(),
            identity: Some(Identity::current(Component::Interface)),
            segment_abi: Some(ABI),
            pid: std::process::id(),
            gate: GateState::Serving,
            generation: Generation(1),
            serving: None,
            cores: Vec::new(),
            file: None,
            nbd: Vec::new(),
            in_flight: 0,
            waiting: None,
            lease_ms: None,
            crashes_survived: 0,
            last_suspension: Suspension::default(),
            buffer: None,
            deaths: Vec::new(),
            undrained: 0,
        };
        let script = Script {
            status,
            asked: Vec::new(),
            hand_over: HandOver::Switch,
            when_gone: None,
            in_use: false,
            is_late: false,
            ended: false,
        };
        let script = Arc::new(Mutex::new(script));
        let listener = packet::listen(&volume.paths.interface_socket()).unwrap();
        let shared = Arc::clone(&script);
        thread::spawn(move || {
            while !shared.lock().ended {
                if wait_readable(listener.as_fd(), Duration::from_millis(20)).unwrap() {
                    let link: Link<FromInterface, ToInterface> = Link::new(packet::accept(listener.as_fd()).unwrap());
                    let Ok((frame, _)) = link.recv() else { continue };
                    let ToInterface::Request(request) = frame.body else { continue };
                    if let Some(answer) = shared.lock().answer(&request) {
                        let _ = link.send(frame.id, FromInterface::Answer(answer), &[]);
                    }
                }
            }
        });
        Self(script)
    }

    pub(crate) fn set(&self, change: impl FnOnce(&mut InterfaceStatus)) {
        change(&mut self.0.lock().status);
    }

    pub(crate) fn status(&self) -> InterfaceStatus {
        self.0.lock().status.clone()
    }

    /// When writes were to go through, and when no longer.
    pub(crate) fn modes(&self) -> Vec<bool> {
        let mode = |request: &Request| match request {
            Request::Synchronous { on } => Some(*on),
            _ => None,
        };
        self.asked().iter().filter_map(mode).collect()
    }

    pub(crate) fn refuse_hand_over(&self) {
        self.0.lock().hand_over = HandOver::Refuse;
    }

    pub(crate) fn hang_up_on_hand_over(&self, switch: bool) {
        self.0.lock().hand_over = HandOver::HangUp { switch };
    }

    /// Its file is in use: it does not unmount.
    pub(crate) fn is_in_use(&self) {
        self.0.lock().in_use = true;
    }

    /// From now on it does not answer questions after the status.
    pub(crate) fn is_late(&self) {
        self.0.lock().is_late = true;
    }

    /// The crash path: `heir` serves once `process` has gone.
    pub(crate) fn when_gone(&self, process: ProcessId, heir: u32) {
        self.0.lock().when_gone = Some((process, heir));
    }

    /// Everything but questions after the status.
    pub(crate) fn asked(&self) -> Vec<Request> {
        self.0.lock().asked.clone()
    }

    /// The cores that were to be given the gate.
    pub(crate) fn hand_overs(&self) -> Vec<u32> {
        let asked = self.asked();
        let to = |request: &Request| match request {
            Request::Handover { to, .. } => Some(*to),
            _ => None,
        };
        asked.iter().filter_map(to).collect()
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        self.0.lock().ended = true;
    }
}

impl Script {
    fn answer(&mut self, request: &Request) -> Option<Answer> {
        if let Some((_, heir)) = self.when_gone.filter(|(process, _)| !process.alive()) {
            self.status.serving = Some(heir);
        }
        if *request == Request::Status {
            return (!self.is_late).then(|| Answer::Status(Box::new(self.status.clone())));
        }
        self.asked.push(request.clone());
        if let (Request::Synchronous { on }, Some(buffer)) = (request, &mut self.status.buffer) {
            buffer.synchronous = *on;
            return Some(Answer::Done);
        }
        let Request::Handover { to, .. } = *request else {
            // No core leaves on request here: a core that is dismissed has to be ended.
            return Some(Answer::Failed { reason: "scripted".to_owned(), busy: self.in_use });
        };
        let (switch, failure) = match self.hand_over {
            HandOver::Switch => (true, None),
            HandOver::HangUp { switch } => (switch, None),
            HandOver::Refuse => {
                (false, Some(HandoverFailure { switched: false, reason: "it does not drain".to_owned() }))
            }
        };
        if switch {
            self.status.serving = Some(to);
        }
        if matches!(self.hand_over, HandOver::HangUp { .. }) {
            return None;
        }
        let suspension = self.status.last_suspension;
        Some(Answer::Handover(HandoverReport {
            failure,
            generation: Generation(2),
            suspension,
            probe_blocks: 0,
            carried_bytes: self.status.buffer.map_or(0, |buffer| buffer.buffered_bytes),
            adopted_us: None,
        }))
    }
}
