//! Custody of the gate: which core has it, which one gets it next, and when a suspension ends by itself.
//!
//! ```text
//!                attach(core)                    suspend(lease)
//!   Detached ───────────────────► Serving ─────────────────────────► Suspended
//!                                 │  ▲  ▲  ◄──── resume, lease over ───── │
//!                  its core died, │  │  │ a core is armed                 │ resume, and its core
//!                  no other armed ▼  │  │                                 ▼ has died since
//!                              Recovering ◄───────────────────────────────
//! ```
//! The same core gets the gate back under the same generation: then it may execute the requests that it holds
//! unanswered. Any other core gets a new generation, and what was unanswered is given out anew; so does any core after
//! another has had the gate.
//!
//! A core that has not served yet probes its stores before it opens the gate. The predecessor of a hand-over has served
//! and needs no probe. When no core passes its probe, one of them gets the gate nevertheless: to an application, errors
//! of one storage node are better than a volume that hangs.

use everdisk_proto::{
    gate_word::{GateWord, Mode},
    ids::{Generation, Slot},
    limits::CORES_MAX,
};

/// The state of the core in a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SlotState {
    /// No core.
    #[default]
    Vacant,
    /// A core that cannot take the gate yet.
    Joined,
    /// A core with parked workers and open stores.
    Armed,
    /// Armed, and its last probe failed.
    Unfit,
}

/// Who has the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No front end.
    Detached,
    /// This core serves.
    Serving {
        /// The core.
        slot: Slot,
    },
    /// Closed by the operator.
    Suspended {
        /// The core that served; `None` when it has died since then.
        slot: Option<Slot>,
        /// When the suspension ends by itself (CLOCK_MONOTONIC ns).
        until_ns: u64,
    },
    /// No core can serve.
    Recovering,
}

/// The action that the interface has to take now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Act {
    /// Nothing.
    Nothing,
    /// Close the gate and drain it.
    Close(GateWord),
    /// Open the gate for the core that had it; nothing is given out anew.
    Reopen(GateWord),
    /// The gate stays open in another mode.
    SetMode(GateWord),
    /// Give out anew what is unanswered, and give the gate to this core, which probes first. Then report the outcome to
    /// [`Custody::probed`].
    Give(GateWord),
    /// Give out anew what is unanswered, and open the gate for this core.
    Grant(GateWord),
}

/// The reason for refusing a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// There is no front end.
    Detached,
    /// There is one already.
    Attached,
    /// The gate is closed by the operator.
    Suspended,
    /// It is not closed by the operator.
    NotSuspended,
    /// No core serves now.
    Recovering,
    /// The core in question is not armed.
    NotArmed,
    /// The core in question has the gate.
    HasGate,
}

impl Refusal {
    /// The refusal in words, with what to do.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Detached => "the volume has no front end: attach it first",
            Self::Attached => "the volume has this front end already",
            Self::Suspended => "I/O is suspended: resume it first",
            Self::NotSuspended => "I/O is not suspended",
            Self::Recovering => "no core serves the volume now: wait until it has recovered",
            Self::NotArmed => "that core is not ready to serve",
            Self::HasGate => "that core serves the volume now",
        }
    }
}

/// Decides who has the gate. It has no clock: times are passed in.
#[derive(Clone, Debug)]
pub struct Custody {
    seats: [SlotState; CORES_MAX],
    state: State,
    generation: Generation,
    last: Slot,
    fallback: Option<Slot>,
    /// Writes go through before they are acknowledged, until the gate goes to another core.
    synchronous: bool,
    crashes: u64,
}

impl Custody {
    /// A new volume without front end or core.
    pub fn new() -> Self {
        Self::restore(State::Detached, Generation(0), false, 0)
    }

    /// Takes up the state that an earlier interface left.
    pub fn restore(state: State, generation: Generation, synchronous: bool, crashes: u64) -> Self {
        let last = match state {
            State::Serving { slot } | State::Suspended { slot: Some(slot), .. } => Some(slot),
            _ => None,
        };
        let mut seats = [SlotState::Vacant; CORES_MAX];
        if let Some(slot) = last {
            seats[slot.index()] = SlotState::Armed;
        }
        Self { seats, state, generation, last: last.unwrap_or(Slot::FIRST), fallback: None, synchronous, crashes }
    }

    /// Who has the gate.
    pub const fn state(&self) -> State {
        self.state
    }

    /// The generation in force.
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// Deaths of a core that had the gate.
    pub const fn crashes(&self) -> u64 {
        self.crashes
    }

    /// The state of a slot.
    pub fn slot_state(&self, slot: Slot) -> SlotState {
        self.seats[slot.index()]
    }

    /// The core that serves.
    pub const fn serving(&self) -> Option<Slot> {
        match self.state {
            State::Serving { slot } => Some(slot),
            _ => None,
        }
    }

    /// A free slot.
    pub fn vacancy(&self) -> Option<Slot> {
        Slot::all().find(|slot| self.slot_state(*slot) == SlotState::Vacant)
    }

    fn set_seat(&mut self, slot: Slot, seat: SlotState) {
        self.seats[slot.index()] = seat;
    }

    /// The mode in which the core that has the gate serves.
    pub const fn serving_mode(&self) -> Mode {
        if self.synchronous { Mode::Synchronous } else { Mode::Open }
    }

    /// Sets whether, from now on, writes go through before they are acknowledged (M3). The next core begins without.
    ///
    /// # Errors
    /// `Detached`, `Suspended`, `Recovering`.
    pub fn set_synchronous(&mut self, on: bool) -> Result<Act, Refusal> {
        let State::Serving { slot } = self.state else {
            return Err(match self.state {
                State::Detached => Refusal::Detached,
                State::Suspended { .. } => Refusal::Suspended,
                State::Serving { .. } | State::Recovering => Refusal::Recovering,
            });
        };
        if self.synchronous == on {
            return Ok(Act::Nothing);
        }
        self.synchronous = on;
        Ok(Act::SetMode(self.word(self.serving_mode(), slot)))
    }

    const fn word(&self, mode: Mode, slot: Slot) -> GateWord {
        GateWord { mode, slot, generation: self.generation }
    }

    /// A core has taken a slot.
    pub fn joined(&mut self, slot: Slot) {
        self.set_seat(slot, SlotState::Joined);
    }

    /// A core is ready to serve.
    pub fn armed(&mut self, slot: Slot) -> Act {
        self.set_seat(slot, SlotState::Armed);
        if self.state == State::Recovering { self.choose_successor() } else { Act::Nothing }
    }

    /// A core is dead: none of its threads runs any more.
    pub fn died(&mut self, slot: Slot) -> Act {
        self.set_seat(slot, SlotState::Vacant);
        if self.fallback == Some(slot) {
            self.fallback = None;
        }
        match self.state {
            State::Serving { slot: serving } if serving == slot => {
                self.crashes += 1;
                self.choose_successor()
            }
            State::Suspended { slot: Some(held), until_ns } if held == slot => {
                self.crashes += 1;
                self.state = State::Suspended { slot: None, until_ns };
                Act::Nothing
            }
            _ => Act::Nothing,
        }
    }

    /// The first front end: this core is to serve.
    ///
    /// # Errors
    /// `Attached`, `NotArmed`.
    pub fn attach(&mut self, slot: Slot) -> Result<Act, Refusal> {
        if self.state != State::Detached {
            return Err(Refusal::Attached);
        }
        if self.slot_state(slot) != SlotState::Armed {
            return Err(Refusal::NotArmed);
        }
        Ok(self.give(slot, Mode::Probe))
    }

    /// The front end is gone.
    pub fn detached(&mut self) {
        self.state = State::Detached;
    }

    /// The operator closes the gate.
    ///
    /// # Errors
    /// `Detached`, `Suspended` (never refused: a second suspension prolongs the lease), `Recovering`.
    pub fn suspend(&mut self, until_ns: u64) -> Result<Act, Refusal> {
        match self.state {
            State::Detached => Err(Refusal::Detached),
            State::Recovering => Err(Refusal::Recovering),
            State::Suspended { slot, .. } => {
                self.state = State::Suspended { slot, until_ns };
                Ok(Act::Nothing)
            }
            State::Serving { slot } => {
                self.state = State::Suspended { slot: Some(slot), until_ns };
                Ok(Act::Close(self.word(Mode::Closed, slot)))
            }
        }
    }

    /// The operator opens the gate.
    ///
    /// # Errors
    /// `NotSuspended`.
    pub fn resume(&mut self) -> Result<Act, Refusal> {
        match self.state {
            State::Suspended { slot: Some(slot), .. } => {
                self.state = State::Serving { slot };
                Ok(Act::Reopen(self.word(self.serving_mode(), slot)))
            }
            State::Suspended { slot: None, .. } => Ok(self.choose_successor()),
            _ => Err(Refusal::NotSuspended),
        }
    }

    /// Time has passed: ends a suspension whose lease is over (D8).
    pub fn tick(&mut self, now_ns: u64) -> Act {
        match self.state {
            State::Suspended { until_ns, .. } if now_ns >= until_ns => self.resume().expect("it is suspended"),
            _ => Act::Nothing,
        }
    }

    /// The gate could not be given to any core, because one still executes what would be given out anew.
    /// [`Custody::retry`] has to follow.
    pub fn postponed(&mut self) {
        self.state = State::Recovering;
    }

    /// Another attempt to end `Recovering`.
    pub fn retry(&mut self) -> Act {
        if self.state == State::Recovering { self.choose_successor() } else { Act::Nothing }
    }

    /// A planned hand-over to `to` may begin; returns the closed word of the core that serves.
    ///
    /// # Errors
    /// `Detached`, `Suspended`, `Recovering`, `NotArmed`, `HasGate`.
    pub fn may_hand_over(&self, to: Slot) -> Result<GateWord, Refusal> {
        match self.state {
            State::Detached => Err(Refusal::Detached),
            State::Suspended { .. } => Err(Refusal::Suspended),
            State::Recovering => Err(Refusal::Recovering),
            State::Serving { slot } if slot == to => Err(Refusal::HasGate),
            State::Serving { .. } if self.slot_state(to) != SlotState::Armed => Err(Refusal::NotArmed),
            State::Serving { slot } => Ok(self.word(Mode::Closed, slot)),
        }
    }

    /// The gate is drained: it goes to `to`, and `to` may return it to the core that serves now, its predecessor.
    pub fn hand_over(&mut self, to: Slot) -> Act {
        self.fallback = self.serving();
        self.give(to, Mode::Probe)
    }

    /// The outcome of the probe by the core that was given the gate. After a failure the gate goes to the next core.
    pub fn probed(&mut self, slot: Slot, passed: bool) -> Act {
        if passed || self.serving() != Some(slot) {
            return Act::Nothing;
        }
        if self.slot_state(slot) == SlotState::Armed {
            self.set_seat(slot, SlotState::Unfit);
        }
        self.choose_successor()
    }

    /// Chooses who gets the gate: the predecessor that is still parked, else the first core that is armed, else the
    /// first one whose probe has failed.
    fn choose_successor(&mut self) -> Act {
        let fallback = self.fallback.take();
        if let Some(slot) = fallback.filter(|slot| self.slot_state(*slot) == SlotState::Armed) {
            return self.give(slot, Mode::Open);
        }
        let first = |seat| Slot::all().find(|slot| self.slot_state(*slot) == seat);
        if let Some(slot) = first(SlotState::Armed) {
            return self.give(slot, Mode::Probe);
        }
        if let Some(slot) = first(SlotState::Unfit) {
            return self.give(slot, Mode::Open);
        }
        self.state = State::Recovering;
        Act::Nothing
    }

    fn give(&mut self, slot: Slot, mode: Mode) -> Act {
        self.generation = self.generation.next();
        self.synchronous = false;
        self.last = slot;
        self.state = State::Serving { slot };
        let word = self.word(mode, slot);
        if mode == Mode::Probe { Act::Give(word) } else { Act::Grant(word) }
    }

    /// The word that closes the gate while no core may serve.
    pub const fn closed(&self) -> GateWord {
        self.word(Mode::Closed, self.last)
    }
}

impl Default for Custody {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
