//! What was observed of a volume: by the supervisor, by the watch over its health, and by operations.

use std::{
    collections::HashMap,
    time::{Duration, Instant, SystemTime},
};

use everdisk_api::status::Node;
use everdisk_proto::{frame::NodeStatus, node::NodeState};
use parking_lot::Mutex;
use uuid::Uuid;

/// The findings. They last as long as this control module.
#[derive(Debug, Default)]
pub struct Findings(Mutex<Found>);

#[derive(Debug, Default)]
struct Found {
    trouble: Option<String>,
    warning: Option<String>,
    standby_trouble: Option<String>,
    silent: HashMap<u32, Instant>,
    nodes: HashMap<Uuid, FoundNode>,
    served_elsewhere: Option<u32>,
    unflushed_since: Option<SystemTime>,
}

/// What a core has found out about a storage node that is not in step. It may serve no longer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FoundNode {
    /// Process id of the core.
    core: u32,
    state: NodeState,
    error: Option<String>,
}

impl Findings {
    /// Why the volume does not serve, as the supervisor sees it.
    pub fn trouble(&self) -> Option<String> {
        self.0.lock().trouble.clone()
    }

    /// Says why, or that there is no trouble.
    pub fn set_trouble(&self, trouble: Option<String>) {
        self.0.lock().trouble = trouble;
    }

    /// Why there is no standby, as the supervisor sees it.
    pub fn standby_trouble(&self) -> Option<String> {
        self.0.lock().standby_trouble.clone()
    }

    /// Says why, or that there is one.
    pub fn set_standby_trouble(&self, trouble: Option<String>) {
        self.0.lock().standby_trouble = trouble;
    }

    /// What the operator must know although the volume may serve.
    pub fn warning(&self) -> Option<String> {
        self.0.lock().warning.clone()
    }

    /// Says it, or that there is nothing.
    pub fn set_warning(&self, warning: Option<String>) {
        self.0.lock().warning = warning;
    }

    /// Notes the cores that do not answer now: the others do, or are gone.
    pub fn set_silent(&self, cores: &[u32]) {
        let now = Instant::now();
        let mut found = self.0.lock();
        found.silent.retain(|pid, _| cores.contains(pid));
        for pid in cores {
            found.silent.entry(*pid).or_insert(now);
        }
    }

    /// How long a core has not answered; none when it answers.
    pub fn silent_for(&self, core: u32) -> Option<Duration> {
        self.0.lock().silent.get(&core).map(Instant::elapsed)
    }

    /// What the core that serves says of a storage node, and what is shown of it. A node that was in trouble when another core served
    /// remains so until this one has written to it: what it has not tried it does not know.
    pub fn see_node(&self, core: u32, node: &NodeStatus) -> Node {
        let known = &mut self.0.lock().nodes;
        let mut shown = Node::from(node.clone());
        if node.state != NodeState::InStep {
            known.insert(node.uuid, FoundNode { core, state: node.state, error: node.error.clone() });
        } else if known.get(&node.uuid).is_some_and(|known| known.core == core || node.written) {
            known.remove(&node.uuid);
        } else if let Some(before) = known.get(&node.uuid) {
            let error = before.error.as_deref().unwrap_or("an operation on it did not end");
            shown.state = before.state;
            shown.error = Some(format!("{error} (found by the core before, process {})", before.core));
        }
        shown
    }

    /// A storage node of which no core says anything now, as it was found last.
    pub fn recall_node(&self, node: Node) -> Node {
        match self.0.lock().nodes.get(&node.uuid) {
            Some(known) => Node { state: known.state, error: known.error.clone(), ..node },
            None => node,
        }
    }

    /// What was found belongs to an attachment that is no more.
    pub fn forget_attachment(&self) {
        let mut found = self.0.lock();
        found.standby_trouble = None;
        found.nodes.clear();
    }

    /// The number of the FUSE connection of a file that a detach has unmounted and found in use elsewhere.
    pub fn served_elsewhere(&self) -> Option<u32> {
        self.0.lock().served_elsewhere
    }

    /// Says it, or that there is none.
    pub fn set_served_elsewhere(&self, connection: Option<u32>) {
        self.0.lock().served_elsewhere = connection;
    }

    /// Since when there has always been something in the write buffer, as far as it was seen: what was written before is on the storage
    /// nodes.
    pub fn unflushed_since(&self) -> Option<SystemTime> {
        self.0.lock().unflushed_since
    }

    /// Notes the number of bytes that are in the write buffer now.
    pub fn saw_buffered(&self, bytes: u64) {
        let since = &mut self.0.lock().unflushed_since;
        *since = (bytes > 0).then(|| since.unwrap_or_else(SystemTime::now));
    }
}
