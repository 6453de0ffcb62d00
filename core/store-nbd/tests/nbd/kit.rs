//! What the tests share: commands under a deadline.

use std::{
    sync::mpsc::{self, Receiver},
    time::Duration,
};

use everdisk_store_nbd::{Client, Command, Completion, Done, Error, Outcome};

/// Limit on everything that a test waits for.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A command that was begun.
pub(crate) struct Pending(Receiver<Outcome>);

/// Begins a command.
pub(crate) fn begin(client: &Client, command: Command) -> Pending {
    let (send, receive) = mpsc::channel();
    // The test may have failed and gone.
    client.begin(command, Completion::new(move |outcome| drop(send.send(outcome))));
    Pending(receive)
}

impl Pending {
    /// Waits for its end, which must come once.
    pub(crate) fn wait(self) -> Outcome {
        let outcome = self.0.recv_timeout(LIMIT).expect("the command is completed");
        assert!(self.0.try_recv().is_err(), "the command was completed twice");
        outcome
    }

    /// Whether it has not ended.
    pub(crate) fn is_outstanding(&self) -> bool {
        matches!(self.0.try_recv(), Err(mpsc::TryRecvError::Empty))
    }
}

/// Executes a command.
pub(crate) fn call(client: &Client, command: Command) -> Outcome {
    begin(client, command).wait()
}

/// Executes a command that has to succeed.
#[track_caller]
pub(crate) fn succeed(client: &Client, command: Command) -> Done {
    call(client, command).result.unwrap()
}

/// Executes a command that has to fail.
#[track_caller]
pub(crate) fn fail(client: &Client, command: Command) -> Error {
    call(client, command).result.unwrap_err()
}

/// Reads.
#[track_caller]
pub(crate) fn read(client: &Client, offset: u64, len: usize) -> Vec<u8> {
    let outcome = call(client, Command::Read { offset, memory: vec![0xee; len] });
    outcome.result.unwrap();
    assert_eq!(outcome.memory.len(), len);
    outcome.memory
}

/// A write of a pattern that depends on `seed`.
pub(crate) fn write(offset: u64, len: usize, seed: u64) -> Command {
    Command::Write { offset, memory: pattern(len, seed), fua: false }
}

/// Bytes without a period.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; len];
    random.fill(&mut bytes);
    bytes
}
