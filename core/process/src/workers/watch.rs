//! Watches the workers. It starts stand-ins where a leader asks for one because its request will take long, or where a
//! request takes long unexpectedly. It ends workers that are no longer needed. So requests that wait for a storage node
//! do not hold up others.
//!
//! Every channel and connection gets as many stand-ins as it can use. When none are left and one lacks some, the idle
//! ones give theirs back, and the others give back what exceeds an equal share.

use std::{
    sync::{
        Arc,
        atomic::Ordering::{Acquire, Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::{
    limits::STANDINS_MAX,
    segment::{Ticket, ticket_state},
};

use super::{START_LIMIT, Served, Shared};

/// A request that takes longer than this, from the first sample at which it was seen, takes long. This is the sampling
/// interval while requests are executed.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// The sampling interval after a sample that has shown no requests.
const IDLE_POLL_INTERVAL: Duration = Duration::from_millis(100);
/// When the lead has stayed with one worker for this long, its stand-ins end, one at each sample.
const KEPT: Duration = Duration::from_secs(10);

/// Watches the workers until the core ends.
pub(super) fn watch(shared: &Arc<Shared>) {
    let mut watched: Vec<Watched> = Vec::new();
    let mut pause = POLL_INTERVAL;
    // The last time that a worker could not be started, for lack of lockable memory or of a thread.
    let mut refused: Option<Instant> = None;
    while !shared.stop.load(Acquire) {
        thread::park_timeout(pause);
        let served = shared.served.lock().clone();
        watched.retain(|old| served.iter().any(|served| Arc::ptr_eq(&old.served, served)));
        for new in served {
            if !watched.iter().any(|old| Arc::ptr_eq(&old.served, &new)) {
                watched.push(Watched::new(new));
            }
        }
        let share = (STANDINS_MAX / watched.len().max(1)).max(1);
        let mut starving = watched.iter().filter(|watched| watched.starves).count();
        pause = IDLE_POLL_INTERVAL;
        for watched in &mut watched {
            let others_starve = starving > usize::from(watched.starves);
            starving -= usize::from(watched.starves);
            let may_start = refused.is_none_or(|at| at.elapsed() >= START_LIMIT);
            let (look, started) = watched.look_after(shared, others_starve.then_some(share), may_start);
            starving += usize::from(watched.starves);
            if look != Look::Idle {
                pause = POLL_INTERVAL;
            }
            if let Err(error) = started {
                tracing::warn!(%error, "no worker stands in for one that waits for a storage node");
                refused = Some(Instant::now());
            }
        }
    }
}

/// A channel or connection, and the result of the last sample.
struct Watched {
    served: Arc<Served>,
    /// The leader, and the number of requests it had executed.
    leader: (usize, u64),
    /// Since when the leader has been seen at work on the same request.
    at_work: Option<Instant>,
    /// It lacked a worker, and no ticket was left.
    starves: bool,
    /// How often the lead had been passed on, and when that was last seen to change.
    passed: (u64, Instant),
}

/// The result of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// There are no requests.
    Idle,
    /// Requests begin and end.
    Busy,
    /// The leader is at the same request as at the last sample.
    TakesLong,
}

impl Watched {
    fn new(served: Arc<Served>) -> Self {
        Self { served, leader: (usize::MAX, 0), at_work: None, starves: false, passed: (0, Instant::now()) }
    }

    /// Samples, and starts or ends workers. `share`: others lack workers, and this is an equal share of them.
    fn look_after(
        &mut self,
        shared: &Arc<Shared>,
        share: Option<usize>,
        may_start: bool,
    ) -> (Look, std::io::Result<()>) {
        let served = Arc::clone(&self.served);
        let lead = served.lead();
        let leader = lead.leader();
        let look = self.look(shared.ticket(leader), leader);
        let standins = served.standins.load(Relaxed);
        let most = share.map_or(STANDINS_MAX, |share| if look == Look::Idle { 0 } else { share });
        let may_have = standins < most && shared.standins.load(Relaxed) < STANDINS_MAX && may_start;
        lead.set_complete(!may_have);
        if look == Look::TakesLong {
            lead.let_others(leader);
        }
        let lacks = lead.is_wanted();
        self.starves = lacks && !may_have;
        let unneeded = usize::from(standins > 0 && self.is_quiet());
        lead.set_surplus(standins.saturating_sub(most).max(unneeded));
        let is_to_start = lacks && may_have && !served.is_coming.load(Acquire);
        (look, if is_to_start { shared.stand_in(&served) } else { Ok(()) })
    }

    fn look(&mut self, ticket: &Ticket, leader: usize) -> Look {
        let state = ticket.state.load(Acquire);
        let at_work = matches!(state, ticket_state::BUSY | ticket_state::AWAY | ticket_state::WRITING);
        let before = std::mem::replace(&mut self.leader, (leader, ticket.requests.load(Relaxed)));
        let same = before == self.leader;
        let since = self.at_work.filter(|_| same && at_work);
        self.at_work = at_work.then(|| since.unwrap_or_else(Instant::now));
        match since {
            Some(since) if since.elapsed() >= POLL_INTERVAL => Look::TakesLong,
            None if same && !at_work => Look::Idle,
            _ => Look::Busy,
        }
    }

    /// Whether the lead has been with the same worker for long.
    fn is_quiet(&mut self) -> bool {
        let passed = self.served.lead().passed();
        if passed != self.passed.0 {
            self.passed = (passed, Instant::now());
        }
        self.passed.1.elapsed() > KEPT
    }
}
