//! What the client's handle, the threads of its connections and the connector share.

use std::{
    io,
    os::fd::AsFd,
    sync::Arc,
    thread::{self, JoinHandle},
};

use everdisk_sys::{in_flight::InFlight, robust};
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::{
    address::Address,
    connect::{Connected, Resolver},
    inbox::Inbox,
    keeper::Keeper,
    lane::{Agreed, Lane},
    receive::{Lost, Receiver},
    state::{Health, State, Work},
};

/// What the threads of a client share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) address: Address,
    pub(crate) resolver: Resolver,
    keeper: Option<Arc<dyn Keeper>>,
    state: Mutex<State>,
    /// Signalled when the state has changed in a way that concerns the connector.
    changed: Condvar,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Shared {
    pub(crate) fn new(address: Address, resolver: Resolver, keeper: Option<Arc<dyn Keeper>>, state: State) -> Self {
        let (changed, threads) = (Condvar::new(), Mutex::default());
        Self { address, resolver, keeper, state: Mutex::new(state), changed, threads }
    }

    /// Changes the state, sends what can be sent then, and completes what has ended, the last two without the lock.
    pub(crate) fn with<T>(&self, change: impl FnOnce(&mut State, &mut Work) -> T) -> T {
        let mut work = Work::default();
        let mut state = self.state.lock();
        let result = change(&mut state, &mut work);
        state.pump(&mut work);
        drop(state);
        work.run(self.keeper.as_deref());
        result
    }

    /// Locks the state.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(crate) const fn changed(&self) -> &Condvar {
        &self.changed
    }

    pub(crate) fn notify_connector(&self) {
        // With the lock: the connector checks and goes to sleep with it, so it does not miss this.
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    /// Takes a connection into use.
    pub(crate) fn install(self: &Arc<Self>, connected: Connected, slot: usize) -> io::Result<()> {
        let Connected { socket, tls, offer } = connected;
        let agreed = Agreed { structured: offer.structured, context: offer.context };
        let id = {
            let mut state = self.state.lock();
            state.lanes_ever += 1;
            state.lanes_ever
        };
        let (table, inbox) = InFlight::create()?;
        let lane = Arc::new(Lane::new(id, slot, socket, tls.is_some(), agreed, table)?);
        if let Some(keeper) = &self.keeper {
            if tls.is_some() {
                return Err(io::Error::other("a successor cannot read on an encrypted connection"));
            }
            keeper.keep(id, lane.socket.as_fd(), lane.table())?;
        }
        let receiver = Receiver::new(Arc::clone(&lane), tls, Inbox::new(inbox));
        let shared = Arc::clone(self);
        // Before the thread starts, since it may find at once that the connection is lost.
        let is_closed = self.with(|state, _| {
            let is_closed = matches!(state.health, Health::Closed(_));
            if !is_closed {
                state.connected(&lane);
            }
            is_closed
        });
        if is_closed {
            lane.end();
            return Ok(());
        }
        self.start("nbd-io", move || receiver.run(&shared)).inspect_err(|_| {
            lane.end();
            self.with(|state, work| state.lost(&lane, &Lost::Closed, work));
        })
    }

    /// Starts the thread of a connection, which [`Self::join`] waits for.
    fn start(&self, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let mut threads = self.threads.lock();
        threads.retain(|thread| !thread.is_finished());
        threads.push(robust::start(name, work)?);
        Ok(())
    }

    /// Waits for the threads of the connections; for the calling one, which may be among them, not.
    pub(crate) fn join(&self) {
        loop {
            let Some(next) = self.threads.lock().pop() else { return };
            if next.thread().id() != thread::current().id() {
                next.join().expect("a panic aborts");
            }
        }
    }
}
