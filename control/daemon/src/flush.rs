//! Has buffered data sent to the storage nodes (M8). While this goes on, writes go through to them (M3).

use std::{
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::limits::{FLUSH_LIMIT_DEFAULT, PEER_DEADLINE};
use tracing::warn;

use crate::{
    error::{Error, Result},
    peers::{self, Flushed},
    progress::Progress,
    volume::Volume,
};

/// The first ask gives the core this long, each one after it twice as long as the one before: what is acknowledged while
/// it works must not keep it from ending.
const FIRST_ASK: Duration = Duration::from_millis(250);
/// Interval at which the remaining data is polled while an answer is awaited.
const SLICE: Duration = Duration::from_millis(250);
/// Time that an answer given at the end of its limit needs to arrive.
const GRACE: Duration = Duration::from_millis(250);
/// Interval between two requests, and between two polls while another core takes over.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// How long a flush may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Altogether.
    Whole(Duration),
    /// No limit in total, but this limit on the time in which the remaining data does not shrink.
    Still(Duration),
}

impl Patience {
    /// For an operator's command: it ends only when done, however much is buffered and however slow the storage nodes are.
    pub const OPERATOR: Self = Self::Still(FLUSH_LIMIT_DEFAULT);

    const fn limit(self) -> Duration {
        match self {
            Self::Whole(limit) | Self::Still(limit) => limit,
        }
    }
}

/// Makes everything acknowledged durable on the storage nodes.
///
/// # Errors
/// No core serves, or a storage node did not take it; the data is kept then.
pub fn flush(volume: &Volume, limit: Patience, progress: &Progress) -> Result<()> {
    send(volume, limit, progress, &|| false).map_err(|error| match error {
        Error::State(_) => error,
        _ => Error::Failed(kept(volume, &error)),
    })
}

/// What is known of the data when a flush failed, and what to do.
fn kept(volume: &Volume, error: &Error) -> String {
    let name = &volume.name;
    let buffer = volume.interface().status().ok().and_then(|status| status.buffer);
    let mut known = Vec::new();
    if let Some(buffer) = &buffer
        && buffer.buffered_bytes > 0
    {
        let mebibytes = mebibytes(buffer.buffered_bytes);
        known.push(format!(
            "{mebibytes} MiB are kept in the volume's write buffer and sent when the storage node takes them"
        ));
    }
    if let Some(ranges) = buffer.map(|buffer| buffer.damaged_ranges).filter(|ranges| *ranges > 0) {
        known.push(format!("{ranges} ranges of the volume are lost: reads of them fail until they are written anew"));
    }
    if known.is_empty() {
        known.push("what was written last may not be durable".to_owned());
    }
    let known = known.join("; ");
    format!("volume {name} could not be flushed: {error}; {known}. Mend the node that `everdisk status {name}` shows")
}

const fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// Has the core that serves send everything acknowledged to the storage nodes, while I/O goes on, and tells how much is
/// left. `stopped` says that it is no longer wanted.
///
/// # Errors
/// No core serves, a storage node did not take it, or it was not done within `limit`.
pub fn send(volume: &Volume, limit: Patience, progress: &Progress, stopped: &dyn Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + limit.limit();
    let mut sending = Sending { volume, progress, stopped, limit, deadline, left: None };
    let mut lost: Option<(u32, Error, Instant)> = None;
    loop {
        let serving = volume.interface().status()?.serving;
        lost = match (serving, lost.take()) {
            (Some(pid), lost) if lost.as_ref().is_none_or(|(dead, ..)| *dead != pid) => match sending.by(pid) {
                // It died: the core that serves next has the buffered data.
                Err(error @ Error::Peer { .. }) => {
                    Some((pid, error, sending.deadline.min(Instant::now() + PEER_DEADLINE)))
                }
                ended => return ended,
            },
            (_, Some((_, error, until))) if Instant::now() > until => return Err(error),
            (_, Some(lost)) => {
                thread::sleep(POLL_INTERVAL);
                Some(lost)
            }
            (_, None) => {
                return Err(Error::State(format!(
                    "no core serves volume {0} now: see `everdisk status {0}`",
                    volume.name
                )));
            }
        };
    }
}

struct Sending<'a> {
    volume: &'a Volume,
    progress: &'a Progress,
    stopped: &'a dyn Fn() -> bool,
    limit: Patience,
    deadline: Instant,
    /// The smallest number of buffered bytes reported yet, if any was reported.
    left: Option<u64>,
}

impl Sending<'_> {
    fn by(&mut self, pid: u32) -> Result<()> {
        let mut flush = self.volume.with_core(pid, |core| core.flush())?;
        let mut ask = FIRST_ASK;
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.late());
            }
            flush.ask(ask.min(left))?;
            match self.answer(&mut flush)? {
                Flushed::All => return Ok(()),
                Flushed::Left(bytes) => self.tell(bytes),
            }
            ask = ask.saturating_mul(2);
            thread::sleep(POLL_INTERVAL);
        }
    }

    fn answer(&mut self, flush: &mut peers::Flush) -> Result<Flushed> {
        loop {
            let left = (self.deadline + GRACE).saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.late());
            }
            if (self.stopped)() {
                return Err(Error::Failed("it was stopped".to_owned()));
            }
            if let Some(answer) = flush.answer(SLICE.min(left))? {
                return Ok(answer);
            }
            if let Some(buffer) = self.volume.interface().status().ok().and_then(|status| status.buffer) {
                self.tell(buffer.buffered_bytes);
            }
        }
    }

    fn tell(&mut self, bytes: u64) {
        if self.left.is_none_or(|left| bytes < left) {
            self.left = Some(bytes);
            if let Patience::Still(limit) = self.limit {
                self.deadline = Instant::now() + limit;
            }
        }
        self.progress.amend(format!("flush, {} MiB left", mebibytes(bytes)));
    }

    fn late(&self) -> Error {
        let left = self.left.map_or(String::new(), |bytes| format!(", {} MiB are left", mebibytes(bytes)));
        Error::Failed(match self.limit {
            Patience::Whole(limit) => format!("it was not done within {limit:?}{left}"),
            Patience::Still(limit) => format!("nothing more was sent for {limit:?}{left}"),
        })
    }
}

/// Writes go through to the storage nodes while this lives, and are buffered again when it is dropped.
#[derive(Debug)]
pub struct Synchronous<'a>(Option<&'a Volume>);

impl<'a> Synchronous<'a> {
    /// Has writes go through from now on. In a volume without a write buffer they always do.
    ///
    /// # Errors
    /// The interface does not answer, or why not.
    pub fn begin(volume: &'a Volume) -> Result<Self> {
        if volume.interface().status()?.buffer.is_none() {
            return Ok(Self::nothing());
        }
        // Made first: where the answer stays out, it is not known whether they go through.
        let through = Self(Some(volume));
        volume.interface().synchronous(true)?;
        Ok(through)
    }

    /// Nothing that would have to be ended.
    pub const fn nothing() -> Self {
        Self(None)
    }

    /// Writes go through for as long as the interface lives.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Synchronous<'_> {
    fn drop(&mut self) {
        let Some(volume) = self.0 else { return };
        if let Err(e) = volume.interface().synchronous(false) {
            warn!(volume = %volume.name, "writes still go through, until the supervisor ends it: {e}");
        }
    }
}

#[cfg(test)]
mod tests;
