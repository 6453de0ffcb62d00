//! The processes of a volume that this control module has started.

use parking_lot::Mutex;

use crate::{child::Child, process::ProcessId};

/// Once the list has this many processes, ended ones are dropped from it.
const CHILDREN_KEPT: usize = 32;

/// How each of them ends is known.
#[derive(Debug, Default)]
pub struct Children(Mutex<Vec<Child>>);

impl Children {
    /// Keeps a process that was started. How it ended is asked a moment after its end: of those that have ended the last few are kept.
    pub fn keep(&self, child: &Child) {
        let mut children = self.0.lock();
        while children.len() >= CHILDREN_KEPT
            && let Some(oldest) = children.iter().position(|kept| kept.ended().is_some())
        {
            children.remove(oldest);
        }
        children.push(child.clone());
    }

    /// The process with this identity, where this control module has started it.
    pub fn find(&self, process: ProcessId) -> Option<Child> {
        self.0.lock().iter().find(|child| child.id == process).cloned()
    }
}
