//! Where an upgrade stands, and what may happen there.
//!
//! ```text
//!                                      ┌─► Flushed ──┐
//!  Begun ─► Staged ─► Verified ─► Armed ─┤             ├─► HandingOver ─► Soaking ─► Soaked ─► Committed
//!    │        │          │          │    └─► Carrying ─┤        │            │         │  ▲
//!    └───┬────┘          └──────────┴─────────┬────────┴────────┴────────────┴─────────┘  │ no old core could
//!        ▼                                    ▼                                           │ take the gate
//!     Aborted ◄── the old core served ── HandingBack ─────────────────────────────────────┘
//!                 all the time                │
//!                                             └─► RolledBack
//! ```
//!
//! The state is the only place where the position is kept; [`State::after`] is the only way to another one. From *Verified* on a new core
//! may run, and the death of the old one may have given it the gate at any time: *HandingBack* settles which core serves. A program
//! that is on record as the current one is committed, wherever the journal ends.

use everdisk_proto::journal::Outcome;

/// A position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Journalled.
    Begun,
    /// The program lies where it stays.
    Staged,
    /// It is a core that fits.
    Verified,
    /// It runs, is armed and has read its stores, as far as they can be read.
    Armed,
    /// Nothing is buffered, and nothing will be until the gate has changed hands.
    Flushed,
    /// What is buffered goes over with the gate: both cores know the version of the write buffer.
    Carrying,
    /// The command is out: only the segment knows which core serves.
    HandingOver,
    /// The new core serves, the old one is parked.
    Soaking,
    /// The new core has served well for the whole soak.
    Soaked,
    /// The new core must not go on: the gate is on its way back, where the new core has it.
    HandingBack,
    /// The new core serves for good.
    Committed,
    /// The old core serves again.
    RolledBack,
    /// The old core has never stopped serving.
    Aborted,
}

/// What happens to an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The step that was due is done.
    Done,
    /// It was not to flush, or could not, and what is buffered can be carried over.
    Carried,
    /// It failed, its deadline passed, the health window closed, or the operator wants the old core back.
    Failed,
    /// The segment says: the new core has the gate.
    NewServes,
    /// The segment says: an old core has the gate and never lost it.
    OldServes,
    /// The segment says: an old core has the gate again.
    OldServesAgain,
    /// No old core can take the gate from the core that has it, and which that is is not known.
    StrangerServes,
    /// The new program is on record as the current one.
    Recorded,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Begun,
        Self::Staged,
        Self::Verified,
        Self::Armed,
        Self::Flushed,
        Self::Carrying,
        Self::HandingOver,
        Self::Soaking,
        Self::Soaked,
        Self::HandingBack,
        Self::Committed,
        Self::RolledBack,
        Self::Aborted,
    ];

    /// The state that follows, or `None` where the event cannot happen.
    pub const fn after(self, event: Event) -> Option<Self> {
        use Event::{Carried, Done, Failed, NewServes, OldServes, OldServesAgain, Recorded, StrangerServes};
        Some(match (self, event) {
            (Self::Begun, Done) => Self::Staged,
            (Self::Staged, Done) => Self::Verified,
            (Self::Verified, Done) => Self::Armed,
            (Self::Armed, Done) => Self::Flushed,
            (Self::Armed, Carried) => Self::Carrying,
            (Self::Flushed | Self::Carrying, Done) => Self::HandingOver,
            (Self::Soaking, Done) => Self::Soaked,

            // No new core runs: nothing needs to be given back.
            (Self::Begun | Self::Staged, Failed) => Self::Aborted,
            (
                Self::Verified
                | Self::Armed
                | Self::Flushed
                | Self::Carrying
                | Self::HandingOver
                | Self::Soaking
                // The new core served well and could not be recorded as the current one: that is no commit.
                | Self::Soaked,
                Failed,
            ) => Self::HandingBack,
            // In Armed and in Soaking the one before did not live to write down what it knew.
            (Self::Armed | Self::HandingOver | Self::Soaking, NewServes) => Self::Soaking,

            (Self::HandingBack, OldServes | StrangerServes) => Self::Aborted,
            (Self::HandingBack, OldServesAgain) => Self::RolledBack,
            // No old core can take the gate: the new one has to go on, and the upgrade is committed with that reason.
            (Self::HandingBack, NewServes) => Self::Soaked,
            // The journal may end before the record does: what could not be handed back is recorded too.
            (Self::Verified | Self::Armed | Self::HandingOver | Self::Soaking | Self::Soaked, Recorded) => {
                Self::Committed
            }
            _ => return None,
        })
    }

    /// The outcome, once there is one.
    pub const fn outcome(self) -> Option<Outcome> {
        match self {
            Self::Committed => Some(Outcome::Committed),
            Self::RolledBack => Some(Outcome::RolledBack),
            Self::Aborted => Some(Outcome::Aborted),
            _ => None,
        }
    }
}

impl Event {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Done,
        Self::Carried,
        Self::Failed,
        Self::NewServes,
        Self::OldServes,
        Self::OldServesAgain,
        Self::StrangerServes,
        Self::Recorded,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_event_table() {
        let mut table = format!("{:<13}", "");
        for event in Event::ALL {
            table += &format!("{:<16}", format!("{event:?}"));
        }
        table = table.trim_end().to_owned() + "\n";
        for state in State::ALL {
            let mut row = format!("{:<13}", format!("{state:?}"));
            for event in Event::ALL {
                let next = state.after(event).map_or("-".to_owned(), |s| format!("{s:?}"));
                row += &format!("{next:<16}");
            }
            table += row.trim_end();
            table += "\n";
        }
        insta::assert_snapshot!(table);
    }

    #[test]
    fn ends_are_ends_and_every_other_state_has_a_way_on() {
        for state in State::ALL {
            let ways = Event::ALL.iter().filter(|e| state.after(**e).is_some()).count();
            assert_eq!(ways == 0, state.outcome().is_some(), "{state:?}");
        }
    }
}
