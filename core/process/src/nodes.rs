//! Watches the storage nodes from a thread that does no I/O on them. So a node that hangs, with the threads that hang
//! in it, is detected, and so is its recovery.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Weak},
    thread,
    time::{Duration, Instant},
};

use everdisk_engine::Engine;
use everdisk_proto::node::NodeState;
use uuid::Uuid;

/// Interval between two checks.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// What was logged last of a node that is not in step.
struct Trouble {
    state: NodeState,
    since: Instant,
}

/// Starts the thread; it ends with the engine.
#[expect(clippy::disallowed_methods, reason = "it touches no node, and reports those in which threads hang")]
pub(crate) fn watch(engine: &Arc<Engine>) -> io::Result<()> {
    let engine = Arc::downgrade(engine);
    thread::Builder::new().name("nodes".to_owned()).spawn(move || look_after(&engine)).map(drop)
}

fn look_after(engine: &Weak<Engine>) {
    let mut troubles = HashMap::new();
    loop {
        thread::sleep(POLL_INTERVAL);
        let Some(engine) = engine.upgrade() else { return };
        engine.watch();
        if !engine.is_good() || !troubles.is_empty() {
            tell(&engine, &mut troubles);
        }
    }
}

/// Logs one line when a node's trouble begins or changes, and one when it is over.
fn tell(engine: &Engine, troubles: &mut HashMap<Uuid, Trouble>) {
    for node in engine.nodes() {
        let before = troubles.get(&node.uuid).map(|trouble| trouble.state);
        match (before, node.state) {
            (None, NodeState::InStep) => {}
            (Some(_), NodeState::InStep) => {
                if let Some(trouble) = troubles.remove(&node.uuid) {
                    let lasted_ms =
                        u64::try_from(trouble.since.elapsed().as_millis()).expect("less than 584 million years");
                    tracing::info!(
                        event = "node_recovered",
                        node = node.url,
                        lasted_ms,
                        "the storage node works again"
                    );
                }
            }
            (before, state) if before != Some(state) => {
                let error = node.error.as_deref().unwrap_or("an operation on it does not end");
                tracing::warn!(
                    event = "node_trouble",
                    node = node.url,
                    state = state.name(),
                    error,
                    "a storage node is in trouble"
                );
                let since = troubles.get(&node.uuid).map_or_else(Instant::now, |trouble| trouble.since);
                troubles.insert(node.uuid, Trouble { state, since });
            }
            _ => {}
        }
    }
}
