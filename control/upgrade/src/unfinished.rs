//! What the journal says of an upgrade without an end. Only the segment knows which core serves; [`crate::run::resume`] asks.

use std::time::Duration;

use everdisk_proto::{
    identity::Build,
    journal::{Entry, Event},
};

use crate::state::State;

/// An upgrade that a control module left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    /// Its number.
    pub upgrade: u64,
    /// The core that served when it began.
    pub from: Build,
    /// The new core, once it was verified.
    pub to: Option<Build>,
    /// Its process id, once it was started.
    pub to_pid: Option<u32>,
    /// It goes back to the build before the last committed upgrade.
    pub rollback: bool,
    /// The soak that was asked for.
    pub soak: Duration,
    /// The last state the journal proves; the world may be one step further.
    pub state: State,
}

/// The upgrade at the end of a journal, unless it has ended.
pub fn unfinished(records: &[Entry]) -> Option<Unfinished> {
    let number = records.last()?.upgrade;
    let mut found: Option<Unfinished> = None;
    for record in records.iter().filter(|r| r.upgrade == number) {
        match (&record.event, &mut found) {
            (Event::Begin { from, soak_ms, rollback, .. }, _) => {
                found = Some(Unfinished {
                    upgrade: number,
                    from: from.clone(),
                    to: None,
                    to_pid: None,
                    rollback: *rollback,
                    soak: Duration::from_millis(*soak_ms),
                    state: State::Begun,
                });
            }
            (Event::Staged { to }, Some(left)) => {
                left.to = Some(to.clone());
                left.state = State::Verified;
            }
            (Event::Standby { to_pid }, Some(left)) => {
                left.to_pid = Some(*to_pid);
                left.state = State::Armed;
            }
            (Event::Handover, Some(left)) => left.state = State::HandingOver,
            (Event::Switched, Some(left)) => left.state = State::Soaking,
            (Event::End { .. }, _) => return None,
            (_, None) => {}
        }
    }
    found
}

/// The number of the next upgrade.
pub fn next_number(records: &[Entry]) -> u64 {
    records.iter().map(|r| r.upgrade).max().unwrap_or(0) + 1
}

#[cfg(test)]
mod tests {
    use everdisk_proto::journal::parse;

    use super::*;

    const GOLDEN: &str = include_str!("../../../proto/golden/journal-v1.jsonl");

    #[test]
    fn every_prefix_of_a_journal_says_where_it_was_left() {
        let records = parse(GOLDEN).unwrap();
        let states: Vec<Option<State>> =
            (0..=records.len()).map(|n| unfinished(&records[..n]).map(|left| left.state)).collect();
        let expected = [
            None,
            Some(State::Begun),
            Some(State::Verified),
            Some(State::Armed),
            Some(State::HandingOver),
            Some(State::Soaking),
            None,
        ];
        assert_eq!(states, expected);
        assert_eq!(unfinished(&records[..3]).unwrap().to_pid, Some(11));
        assert_eq!(next_number(&records), 2);
        assert_eq!(next_number(&[]), 1);
    }
}
