//! A node of a core that serves. It is connected to when the core has joined its interface: not before can the threads of its
//! connections have words in the segment, and the connections be kept. A server that is out of reach then is tried again and again, so a
//! core can be replaced while a server is away.

use std::{
    io,
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::{
    limits::{NODE_SETTLE, node_connections},
    volume::{NbdExport, NodeUrl},
};
use everdisk_store_nbd::{self as client, Config, Keeper};
use everdisk_sys::robust;
use parking_lot::{Condvar, Mutex};

use super::NbdStore;
use crate::{About, Completion, Lent, NodeFormat, OpenError, Outcome, Owned, Store, StoreError, pool::Pool};

/// Limit on the first attempt to connect, during which the core waits.
const FIRST_LIMIT: Duration = Duration::from_secs(3);
/// Limit on a later one.
const LATER_LIMIT: Duration = Duration::from_secs(10);
/// Time between two attempts.
const INTERVAL: Duration = Duration::from_millis(250);

/// An export that is, or will be, opened as a storage node.
#[derive(Debug)]
pub struct LateStore {
    about: About,
    export: NbdExport,
    format: NodeFormat,
    unavailable_after: Duration,
    store: OnceLock<Arc<NbdStore>>,
    /// Why it is not open.
    trouble: Mutex<Trouble>,
    changed: Condvar,
    /// For operations that are begun before it is open.
    pool: Pool,
}

#[derive(Clone, Debug)]
enum Trouble {
    /// [`Store::serve`] was not called.
    NotServed,
    /// The server is out of reach, and is tried again.
    Away { since: Instant, why: client::Error },
    /// The export is something else.
    Other(String),
}

impl LateStore {
    /// Notes what is to be opened.
    pub(crate) fn new(export: &NbdExport, format: &NodeFormat, unavailable_after: Duration) -> Self {
        let about = About { url: NodeUrl::Nbd(export.clone()), uuid: format.superblock.node, size: format.len };
        Self {
            about,
            export: export.clone(),
            format: *format,
            unavailable_after,
            store: OnceLock::new(),
            trouble: Mutex::new(Trouble::NotServed),
            changed: Condvar::new(),
            pool: Pool::default(),
        }
    }

    fn open(&self, keeper: Option<Arc<dyn Keeper>>, limit: Duration) -> Result<(), OpenError> {
        let config = Config {
            connect: limit,
            unavailable_after: self.unavailable_after,
            connections: node_connections(usize::try_from(self.format.superblock.nodes).expect("at most 64")),
            settle: NODE_SETTLE,
            others_write: true,
            ..Config::default()
        };
        let store = NbdStore::open_kept(&self.export, &self.format, config, keeper)?;
        let _trouble = self.trouble.lock();
        assert!(self.store.set(Arc::new(store)).is_ok(), "a node is opened once");
        self.changed.notify_all();
        Ok(())
    }

    /// Tries until the server is there, or this store is of no use to anybody any more.
    fn try_on(store: &Arc<Self>, keeper: Option<Arc<dyn Keeper>>) -> io::Result<()> {
        let weak = Arc::downgrade(store);
        let body = move || {
            loop {
                thread::sleep(INTERVAL);
                let Some(store) = weak.upgrade() else { return };
                match store.open(keeper.clone(), LATER_LIMIT) {
                    Ok(()) => return,
                    Err(OpenError::Unreachable { source, .. }) => {
                        if let Trouble::Away { why, .. } = &mut *store.trouble.lock() {
                            *why = source;
                        }
                    }
                    Err(other) => {
                        tracing::error!(node = %store.about.url, error = %other, "a storage node is not what it was");
                        *store.trouble.lock() = Trouble::Other(other.to_string());
                        store.changed.notify_all();
                        return;
                    }
                }
            }
        };
        robust::start("nbd-open", body).map(drop)
    }

    /// The node, when it is open. Waits as long as a server may be out of reach.
    fn opened(&self) -> Result<&Arc<NbdStore>, StoreError> {
        let mut trouble = self.trouble.lock();
        loop {
            if let Some(store) = self.store.get() {
                return Ok(store);
            }
            let node = self.about.url.clone();
            match &*trouble {
                Trouble::NotServed => {
                    let source = io::Error::other("the core has not joined its interface yet");
                    return Err(StoreError::Io { node, action: "use it", source });
                }
                Trouble::Other(why) => {
                    return Err(StoreError::Io { node, action: "open it", source: io::Error::other(why.clone()) });
                }
                Trouble::Away { since, why } => {
                    let end = (!self.unavailable_after.is_zero()).then(|| *since + self.unavailable_after);
                    match end {
                        Some(end) if end <= Instant::now() => {
                            return Err(StoreError::Nbd { node, source: why.clone() });
                        }
                        Some(end) => {
                            // Whether it timed out or was woken: the loop checks both.
                            let _ = self.changed.wait_until(&mut trouble, end);
                        }
                        None => self.changed.wait(&mut trouble),
                    }
                }
            }
        }
    }
}

impl Store for LateStore {
    fn about(&self) -> &About {
        &self.about
    }

    fn attempt(&self, offset: u64, op: Lent<'_>) -> Option<Outcome> {
        self.store.get()?.attempt(offset, op)
    }

    fn perform(&self, offset: u64, op: Lent<'_>) -> Outcome {
        match self.store.get() {
            Some(store) => store.perform(offset, op),
            None => self.opened()?.perform(offset, op),
        }
    }

    fn begin(self: Arc<Self>, offset: u64, op: Owned, completion: Completion) {
        match self.store.get() {
            Some(store) => Arc::clone(store).begin(offset, op, completion),
            None => Arc::clone(&self).pool.begin(self, offset, op, completion),
        }
    }

    fn may_forget(&self) -> bool {
        true
    }

    fn serve(self: Arc<Self>, keeper: Option<Arc<dyn Keeper>>) -> Result<(), OpenError> {
        match self.open(keeper.clone(), FIRST_LIMIT) {
            Err(OpenError::Unreachable { place, source }) => {
                tracing::warn!(node = %self.about.url, error = source.reason(), "a storage node is out of reach, and tried again");
                *self.trouble.lock() = Trouble::Away { since: Instant::now(), why: source.clone() };
                Self::try_on(&self, keeper).map_err(|_| OpenError::Unreachable { place, source })
            }
            done => done,
        }
    }
}
