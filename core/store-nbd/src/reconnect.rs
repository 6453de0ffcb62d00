//! The connector: a thread that makes the connections which are missing.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    config::Config,
    connect::{ConnectError, open},
    error::{Error, Kind},
    shared::Shared,
    state::{Health, State},
};

/// Time before the next attempt after `failures` failures: at once after none, then twice as long each time, of which half is random,
/// so that clients which lost a server together do not return together.
pub(crate) fn backoff(config: &Config, failures: u32) -> Duration {
    let Some(doublings) = failures.checked_sub(1) else { return Duration::ZERO };
    let full =
        config.backoff_min.saturating_mul(1_u32.checked_shl(doublings).unwrap_or(u32::MAX)).min(config.backoff_max);
    full / 2 + full.mul_f64(fastrand::f64() / 2.0)
}

/// What it may take to connect while there is another connection.
const FURTHER: Duration = Duration::from_secs(1);

/// What the connector does next.
enum Next {
    Connect { slot: usize, deadline: Instant },
    End,
}

/// Until the client is closed.
pub(crate) fn run(shared: &Arc<Shared>) {
    // What the last attempt failed by.
    let mut failure: Option<ConnectError> = None;
    while let Next::Connect { slot, deadline } = next(shared, failure.as_ref()) {
        let result = open(&shared.address, &shared.resolver, deadline).and_then(|connected| {
            let difference = connected.offer.differs_from(&shared.state().offer);
            match difference {
                Some(difference) => {
                    changed(shared, &difference);
                    Err(ConnectError::Changed(difference))
                }
                None => shared
                    .install(connected, slot)
                    .map_err(|source| ConnectError::Io { doing: "use the connection", source }),
            }
        });
        failure = result.err();
        if let Some(failure) = &failure {
            let mut state = shared.state();
            tracing::debug!(node = %state.node, "cannot connect: {failure}");
            let delay = backoff(&state.config, state.slots[slot].failures.max(1));
            let slot = &mut state.slots[slot];
            slot.failures = slot.failures.saturating_add(1);
            slot.next_try = Instant::now() + delay;
        }
    }
}

/// The server is another one than before.
fn changed(shared: &Shared, difference: &str) {
    shared.with(|state, work| {
        if state.slots.iter().all(|slot| slot.lane.is_none()) && !matches!(state.health, Health::Closed(_)) {
            let error = Error::new(Kind::Changed, &state.node, format_args!("{difference}; restore the export"));
            state.give_up(error, work);
        }
    });
}

/// Sleeps until a connection is to be made.
fn next(shared: &Shared, failure: Option<&ConnectError>) -> Next {
    loop {
        let now = Instant::now();
        let mut state = shared.state();
        if matches!(state.health, Health::Closed(_)) {
            return Next::End;
        }
        let limit = state.config.unavailable_after;
        let is_alone = state.slots.iter().all(|slot| slot.lane.is_none());
        let may_give_up = is_alone && !limit.is_zero() && matches!(state.health, Health::Serving);
        let give_up = state.trouble.filter(|_| may_give_up).map(|since| since + limit);
        if give_up.is_some_and(|at| at <= now) {
            drop(state);
            shared.with(|state, work| {
                let why = failure.map_or_else(|| "connections break at once".to_owned(), ToString::to_string);
                let words = format_args!("the server was out of reach for {limit:?}: {why}");
                let error = Error::new(Kind::Unavailable, &state.node, words);
                state.give_up(error, work);
            });
            continue;
        }
        if state.held_until().is_some_and(|until| until <= now) {
            drop(state);
            // To send what was held back.
            shared.with(|_, _| ());
            continue;
        }
        let idle = state.next_try_of_idle(now);
        if idle.is_some_and(|at| at <= now) {
            drop(state);
            shared.with(State::try_idle);
            continue;
        }
        let missing = state.slots.iter().enumerate().filter(|(_, slot)| slot.lane.is_none());
        let due = missing.min_by_key(|(_, slot)| slot.next_try).map(|(index, slot)| (index, slot.next_try));
        if let Some((slot, at)) = due
            && at <= now
        {
            // A further connection may be one more than the server serves, which then lets it wait. That must not hold up a
            // connection that is needed.
            let limit = if is_alone { state.config.connect } else { state.config.connect.min(FURTHER) };
            let deadline = now + limit;
            return Next::Connect { slot, deadline: give_up.map_or(deadline, |end| deadline.min(end)) };
        }
        let wake = [due.map(|(_, at)| at), give_up, state.held_until(), idle].into_iter().flatten().min();
        match wake {
            Some(at) => {
                let _ = shared.changed().wait_until(&mut state, at);
            }
            None => shared.changed().wait(&mut state),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_between_attempts_doubles_up_to_a_limit() {
        let config = Config {
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(2),
            ..Config::default()
        };
        assert_eq!(backoff(&config, 0), Duration::ZERO);
        for (failures, full) in [(1, 100), (2, 200), (3, 400), (5, 1600), (6, 2000), (40, 2000), (u32::MAX, 2000)] {
            let full = Duration::from_millis(full);
            for _ in 0..100 {
                let delay = backoff(&config, failures);
                assert!(delay >= full / 2 && delay <= full, "{failures} failures: {delay:?}");
            }
        }
    }
}
