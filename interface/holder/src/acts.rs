//! Carries out the decisions of [`Custody`].
//!
//! [`Custody`]: everdisk_gate::custody::Custody

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use everdisk_gate::{
    custody::{Act, State},
    ticket,
};
use everdisk_proto::ids::Slot;

use crate::{
    holder::Holder,
    suspension::{self, Given, TAKEOVER_LIMIT, not_drained},
};

impl Holder {
    /// Carries out custody's decision and what follows from the outcome. `limit` is for the probe of the core that is
    /// given the gate first. When that fails the next core has [`TAKEOVER_LIMIT`], because no other one could serve in
    /// that time. `alive`: a core that has just been drained. Every other core has to answer before it is given the
    /// gate without a probe. Returns why a core did not take the gate, if one did not.
    pub(crate) fn perform(&mut self, act: Act, limit: Duration, alive: Option<Slot>) -> Option<String> {
        let mut failure = None;
        let mut late = Vec::new();
        let (mut act, mut limit) = (act, limit);
        loop {
            if let Act::Grant(word) = act
                && alive != Some(word.slot)
                && !self.answers(word.slot)
            {
                let why = "it did not answer when it was to be given the gate";
                failure.get_or_insert_with(|| format!("process {} {why}", self.pid_of(word.slot)));
                self.put_down(word.slot, why.to_owned());
                act = self.custody.probed(word.slot, false);
                continue;
            }
            let (segment, cores, fronts) = (&self.segment, &self.cores, &self.fronts);
            let (word, given) = match act {
                Act::Nothing => break,
                Act::Close(word) => {
                    // `requests::suspend` drains and reports; no other code closes the gate.
                    ticket::set(&segment.gate.word, word);
                    break;
                }
                Act::Reopen(word) => {
                    segment.gate.lease_until_ns.store(0, Relaxed);
                    suspension::reopen(segment, word);
                    break;
                }
                Act::SetMode(word) => {
                    ticket::set(&segment.gate.word, word);
                    break;
                }
                Act::Give(word) | Act::Grant(word) if !suspension::can_adopt(segment, cores, word.slot) => {
                    (word, Given::Failed("that core cannot take over the write buffer, which is not empty"))
                }
                Act::Give(word) => (word, suspension::give(segment, cores, fronts, word, limit)),
                Act::Grant(word) => (word, suspension::grant(segment, cores, fronts, word)),
            };
            segment.gate.lease_until_ns.store(0, Relaxed);
            limit = TAKEOVER_LIMIT;
            let (slot, generation) = (word.slot, word.generation);
            act = match given {
                Given::Opened => {
                    tracing::info!(event = "gate_given", pid = self.pid_of(slot), %generation, "a core has the gate");
                    self.note_successor(slot);
                    self.custody.probed(slot, true)
                }
                Given::Failed(why) => {
                    tracing::error!(pid = self.pid_of(slot), %generation, why, "a core did not take the gate");
                    failure.get_or_insert_with(|| why.to_owned());
                    late.push(slot);
                    if matches!(act, Act::Grant(_)) {
                        // The last resort has failed: acknowledged data waits for a core that can adopt it.
                        self.custody.postponed();
                        Act::Nothing
                    } else {
                        self.custody.probed(slot, false)
                    }
                }
                Given::NotDrained(why) => {
                    let why = not_drained(why);
                    tracing::error!(pid = self.pid_of(slot), %generation, why, "the gate stays closed");
                    failure.get_or_insert(why);
                    self.custody.postponed();
                    Act::Nothing
                }
            };
        }
        if self.custody.state() == State::Recovering {
            ticket::set(&self.segment.gate.word, self.custody.closed());
        }
        // Now the gate is where it can be. A core that has not taken it, and does not answer either, is not tried
        // again.
        for slot in late {
            if self.custody.serving() != Some(slot) && self.cores.get(slot).is_some() && !self.answers(slot) {
                self.put_down(slot, "it did not take the gate and does not answer".to_owned());
            }
        }
        failure
    }
}
