//! The client's handle.

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use everdisk_proto::nbd::wire::transmission_flag as flag;
use everdisk_sys::robust;

use crate::{
    address::Address,
    command::{Command, Completion, Outcome},
    config::{Config, Offer},
    connect::{Resolver, open},
    error::{Error, Kind},
    keeper::Keeper,
    reconnect,
    shared::Shared,
    state::{OutstandingWrite, State},
};

/// A client of one export. It reconnects by itself.
///
/// # Order
/// Commands in flight have no order among each other. The caller begins no command whose range overlaps that of a
/// write in flight. A [`Command::Flush`] covers every change begun before it.
///
/// # Blocks
/// The caller may use any range. Where the server's minimum block is larger than a byte, the client reads the blocks
/// that a write covers in part, and writes them whole, one change of a block at a time. If the minimum block does not divide
/// the size of the export, no request can name the last bytes, and [`Client::size`] does not count them.
///
/// # Loss of a connection
/// What was in flight is sent again when the server is back. What had been answered and not flushed may be lost if the
/// server died. The client cannot see whether it did. So the next [`Command::Flush`] then fails with
/// [`Kind::Unflushed`], and so does every flush that was in flight. After that the caller writes again what it wrote since its last
/// flush that succeeded, and flushes again. [`Client::losses`] counts the losses.
///
/// # Late writes
/// A server that loses a connection may go on executing what it received on it. A write that was sent again and answered, and one
/// after it to the same place, can then be overwritten by the first one. [`Config::settle`] is the time that such a
/// server is given. No time is safe in general; a server that died executes nothing any more.
///
/// # Waiting
/// A server that is connected and does not answer is waited for without a limit; [`Client::oldest_outstanding`] tells for how long.
/// A server that cannot be reached is waited for as [`Config::unavailable_after`] says.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    offer: Offer,
}

impl Client {
    /// Connects to an export. Waits for at most [`Config::connect`].
    ///
    /// # Errors
    /// [`Kind::Unavailable`]: the server cannot be reached, or does not agree to what is needed. The words say what.
    pub fn connect(address: Address, config: Config) -> Result<Self, Error> {
        Self::connect_kept(address, config, None)
    }

    /// As [`Client::connect`]. Every connection is kept beyond the death of this process.
    ///
    /// # Errors
    /// As [`Client::connect`], also where the connection cannot be kept.
    pub fn connect_kept(address: Address, config: Config, keeper: Option<Arc<dyn Keeper>>) -> Result<Self, Error> {
        let (node, resolver) = (Arc::<str>::from(address.to_string()), Resolver::default());
        let unavailable = |why: &dyn std::fmt::Display| Error::new(Kind::Unavailable, &node, why);
        let connected = open(&address, &resolver, Instant::now() + config.connect).map_err(|why| unavailable(&why))?;
        let offer = connected.offer;
        let several = offer.has(flag::CAN_MULTI_CONN);
        let slots = if several { config.connections.max(1) } else { 1 };
        let state = State::new(Arc::clone(&node), config, offer, slots);
        let client = Self { shared: Arc::new(Shared::new(address, resolver, keeper, state)), offer };
        client.shared.install(connected, 0).map_err(|why| unavailable(&why))?;
        let shared = Arc::clone(&client.shared);
        // It makes the further connections too.
        // Nobody waits for its end: it may be connecting then, to a server that does not answer.
        robust::start("nbd-connect", move || reconnect::run(&shared)).map_err(|why| unavailable(&why))?;
        Ok(client)
    }

    /// Begins a command. Never blocks: what exceeds the window waits in a queue. A command that cannot be begun is
    /// completed before this returns.
    pub fn begin(&self, command: Command, completion: Completion) {
        self.shared.with(|state, work| state.begin(command, completion, work));
    }

    /// Executes a command and waits for it.
    pub fn call(&self, command: Command) -> Outcome {
        let (completed, outcome) = mpsc::sync_channel(1);
        // The receiver waits below.
        self.begin(command, Completion::new(move |outcome| drop(completed.send(outcome))));
        outcome.recv().expect("a command is always completed")
    }

    /// Bytes of the export that can be used.
    pub fn size(&self) -> u64 {
        self.offer.usable()
    }

    /// What the server offers.
    pub const fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Connections that are there now.
    pub fn connections(&self) -> usize {
        self.shared.state().slots.iter().filter(|slot| slot.lane.is_some()).count()
    }

    /// Connections that were lost so far.
    pub fn losses(&self) -> u64 {
        self.shared.state().losses
    }

    /// When the oldest command was begun that has not been completed.
    pub fn oldest_outstanding(&self) -> Option<Instant> {
        self.shared.state().oldest()
    }

    /// Since when there has been no connection on which the server answers; `None` if there is one.
    pub fn out_of_reach(&self) -> Option<Duration> {
        self.shared.state().trouble.map(|since| since.elapsed())
    }

    /// The changes that were sent and have not been answered.
    pub fn outstanding_writes(&self) -> Vec<OutstandingWrite> {
        self.shared.state().outstanding_writes()
    }
}

impl Drop for Client {
    /// Takes leave of the server. Commands in flight are completed with [`Kind::Unavailable`]; the server may still
    /// execute them.
    fn drop(&mut self) {
        let lanes = self.shared.with(|state, work| state.close(work));
        lanes.iter().for_each(|lane| lane.close());
        self.shared.notify_connector();
        self.shared.join();
    }
}
