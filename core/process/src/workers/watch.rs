//! Looks after the workers: brings more where a leader calls for one because its request will take long, or where it takes long all
//! the same; and ends those that are not needed any more. So requests that wait for a storage node do not keep others waiting.
//!
//! Everything that is served gets as many stand-ins as it can use. When there are no more and one that is served lacks some, those
//! that do nothing give theirs back, and the others what is above an equal share.

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

/// A request that takes longer than this takes long, from when it was first looked at. While there is something to do, the looks are so
/// far apart.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// After one at which nothing was asked for, the next look is this much later.
const IDLE_POLL_INTERVAL: Duration = Duration::from_millis(100);
/// When the lead has stayed where it is for so long, workers that stand in end, one at each look.
const KEPT: Duration = Duration::from_secs(10);

/// Looks after the workers until the core ends.
pub(super) fn watch(shared: &Arc<Shared>) {
    let mut watched: Vec<Watched> = Vec::new();
    let mut pause = POLL_INTERVAL;
    // When there was no memory that may be locked, or no thread, for another worker.
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

/// Something that is served, and what the last look at it has shown.
struct Watched {
    served: Arc<Served>,
    /// Who led, and the requests that one had executed.
    leader: (usize, u64),
    /// Since when it was seen at work on the same request.
    at_work: Option<Instant>,
    /// It lacked a worker, and there were no more.
    starves: bool,
    /// How often the lead had been passed on, and when that was seen to change.
    passed: (u64, Instant),
}

/// What a look shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// Nothing happens.
    Idle,
    /// Requests come and go.
    Busy,
    /// The leader is at the same request as at the last look.
    TakesLong,
}

impl Watched {
    fn new(served: Arc<Served>) -> Self {
        Self { served, leader: (usize::MAX, 0), at_work: None, starves: false, passed: (0, Instant::now()) }
    }

    /// Looks, and does what is to be done. `share`: others lack workers, and this is a fair share of them.
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

    /// The lead has been with the same worker for long.
    fn is_quiet(&mut self) -> bool {
        let passed = self.served.lead().passed();
        if passed != self.passed.0 {
            self.passed = (passed, Instant::now());
        }
        self.passed.1.elapsed() > KEPT
    }
}
