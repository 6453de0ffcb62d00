//! Frames from cores and the control module: cores join, report themselves armed, give connections back; requests go to
//! [`crate::requests`].

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::atomic::Ordering::Relaxed,
    time::Duration,
};

use everdisk_proto::{
    frame::{FromInterface, LentConnection, ToInterface},
    identity::Identity,
    ids::Slot,
};
use everdisk_sys::{link::LinkError, process::pidfd, signal};

use crate::{
    cores::{self, Core},
    holder::Holder,
    peers::{Peer, hear, refuse},
    suspension::TAKEOVER_LIMIT,
};

/// A peer that has connected introduces itself within this time.
const INTRODUCTION_LIMIT: Duration = Duration::from_secs(5);

impl Holder {
    pub(crate) fn accept(&mut self) {
        match self.door.wait(Duration::ZERO) {
            Ok(true) => self.door.take(&mut self.peers),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "it is not known whether a peer connects"),
        }
    }

    pub(crate) fn hear_cores(&mut self) {
        let slots: Vec<Slot> = self.cores.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            while let Some(heard) = self.cores.get(slot).and_then(|core| core.link.as_ref()).and_then(hear) {
                match heard {
                    Ok((frame, _)) if matches!(frame.body, ToInterface::Armed { .. }) => {
                        let ToInterface::Armed { fronts } = frame.body else { break };
                        self.arm(slot, fronts);
                    }
                    // One core's descriptors were enough, except for connections that had not been lent to it yet.
                    Ok((frame, _))
                        if matches!(frame.body, ToInterface::Returned { .. } | ToInterface::ReturnedLocks { .. }) => {}
                    Ok((frame, fds)) if matches!(frame.body, ToInterface::ReturnedConnection(_)) => {
                        let ToInterface::ReturnedConnection(lent) = frame.body else { break };
                        self.take_back(lent, fds);
                    }
                    Ok((frame, fds)) if matches!(frame.body, ToInterface::KeepNode(_) | ToInterface::DropNode(_)) => {
                        self.note_node(slot, &frame.body, fds);
                    }
                    Ok((frame, _)) => {
                        tracing::warn!(pid = self.pid_of(slot), body = ?frame.body, "a core said what it may not say now");
                    }
                    Err(error) => {
                        if let Some(core) = self.cores.get_mut(slot) {
                            core.unlink(&error);
                        }
                    }
                }
            }
        }
    }

    pub(crate) fn hear_peers(&mut self) {
        let mut peers = std::mem::take(&mut self.peers);
        peers.retain(|peer| peer.is_control || peer.since.elapsed() < INTRODUCTION_LIMIT);
        for mut peer in peers {
            match hear(&peer.link) {
                None => self.peers.push(peer),
                Some(Ok((frame, _))) => match frame.body {
                    ToInterface::Hello { identity, slot, keeps_locks } => {
                        self.welcome(peer, identity, slot, keeps_locks);
                    }
                    ToInterface::Request(request) => {
                        peer.is_control = true;
                        let answer = self.handle(request, &peer, frame.id);
                        let sent = answer
                            .is_none_or(|answer| peer.link.send(frame.id, FromInterface::Answer(answer), &[]).is_ok());
                        if sent {
                            self.peers.push(peer);
                        }
                    }
                    ToInterface::Armed { .. }
                    | ToInterface::Returned { .. }
                    | ToInterface::ReturnedLocks { .. }
                    | ToInterface::ReturnedConnection(_)
                    | ToInterface::KeepNode(_)
                    | ToInterface::DropNode(_) => {
                        refuse(&peer, "introduce yourself first");
                    }
                },
                Some(Err(LinkError::Closed)) => {}
                Some(Err(error)) => {
                    tracing::warn!(pid = peer.pid, %error, "a peer is refused");
                    refuse(&peer, &error.to_string());
                }
            }
        }
    }

    /// What a core says of its connections to storage nodes.
    fn note_node(&mut self, slot: Slot, body: &ToInterface, fds: Vec<OwnedFd>) {
        match *body {
            ToInterface::KeepNode(connection) => self.kept.keep(slot, connection, fds),
            ToInterface::DropNode(connection) => self.kept.drop(slot, connection),
            _ => unreachable!("the caller has seen that it is one of these"),
        }
    }

    /// A core is dead. What it said last of its connections to storage nodes may lie unread in its socket.
    pub(crate) fn hear_last_words(&mut self, slot: Slot, core: &Core) {
        while let Some(Ok((frame, fds))) = core.link.as_ref().and_then(hear) {
            if matches!(frame.body, ToInterface::KeepNode(_) | ToInterface::DropNode(_)) {
                self.note_node(slot, &frame.body, fds);
            }
        }
    }

    /// A core gives back a connection that may be new to this interface: then it is lent to every other core.
    fn take_back(&mut self, lent: LentConnection, fds: Vec<OwnedFd>) {
        let Ok([socket, memory]) = <[OwnedFd; 2]>::try_from(fds) else { return };
        let Some(nbd) = &mut self.fronts.nbd else { return };
        if nbd.adopt_connection(lent, socket, memory) {
            self.fronts.lend_to_all(&mut self.cores);
        }
    }

    /// A core reports that it is ready. It is armed if it has every front end. A core that lost its connection before
    /// it was lent the last one gets it now.
    fn arm(&mut self, slot: Slot, fronts: u8) {
        let Some(core) = self.cores.get_mut(slot) else { return };
        if fronts == 0 && self.fronts.kinds() > 0 {
            // A core that does not read its socket loses its connection, and is lent them when it connects again.
            let _ = self.fronts.lend(core);
        } else if fronts == self.fronts.kinds() {
            let act = self.custody.armed(slot);
            self.perform(act, TAKEOVER_LIMIT, None);
        }
    }

    /// A core joins, or connects again to a new interface process.
    fn welcome(&mut self, peer: Peer, identity: Identity, had: Option<Slot>, keeps_locks: bool) {
        if let Some(slot) = had.filter(|slot| cores::is_of(&self.segment, *slot, peer.pid)) {
            if let Some(core) = self.cores.get_mut(slot) {
                core.link = Some(peer.link);
                core.identity = identity;
                core.keeps_locks = keeps_locks;
            } else if let Ok(handle) = pidfd(peer.pid) {
                self.enter(slot, Core::new(peer.pid, handle, identity, Some(peer.link), keeps_locks));
                self.custody.joined(slot);
            }
            // It knows nothing of clients that have connected since, and may know of one that the earlier interface
            // lent to no other core. As above, one that does not read its socket is lent them later.
            if let Some(core) = self.cores.get_mut(slot) {
                let _ = self.fronts.lend(core);
                if self.fronts.nbd.is_some() {
                    let _ = core.tell(FromInterface::Recall, &[]);
                }
            }
            return;
        }
        let abi = self.segment.header.abi.load(Relaxed);
        if !identity.abi.contains(abi) {
            return refuse(
                &peer,
                &format!("the core serves ABI {}, this volume's segment has ABI {abi}", identity.abi),
            );
        }
        if self.cores.slot_of(peer.pid).is_some() {
            return refuse(&peer, "this process has a slot already");
        }
        let Some(slot) = self.custody.vacancy() else { return refuse(&peer, "every core slot is taken") };
        let Ok(handle) = pidfd(peer.pid) else { return };
        cores::enrol(&self.segment, slot, peer.pid);
        let mut core = Core::new(peer.pid, handle, identity, Some(peer.link), keeps_locks);
        let lend = |core: &mut Core| -> Result<(), LinkError> {
            let fronts = self.fronts.frames(core);
            core.tell(FromInterface::Welcome { slot, fronts, keeps_nodes: true }, &[self.segment.as_fd()])?;
            self.fronts.lend(core)
        };
        if let Err(error) = lend(&mut core) {
            // It may have the segment already, so its slot is vacant only when it is gone.
            tracing::warn!(pid = core.pid, %error, "a core that joined could not be lent what it needs, and is killed");
            // It may have ended by itself.
            let _ = signal::kill(core.handle.as_fd());
        }
        self.enter(slot, core);
        self.custody.joined(slot);
    }
}
