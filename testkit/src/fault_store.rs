//! A storage node that is slow, fails, hangs or lies on command, and counts what it did.
//!
//! Beside the node `N` lies `N.faults`, a text that is read anew at every operation ([`Faults`] is its language), so a
//! test outside the core's process commands every core that has the node open. In `N.faults.count.PID` each process
//! keeps [`Counts`], exact at any instant: they outlive a core that is killed.
//!
//! A node that was [made volatile](make_volatile) keeps what it has not flushed apart, to be lost on command.

mod counts;
mod faults;
#[cfg(test)]
mod tests;
mod volatile;

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use everdisk_proto::volume::NodeUrl;
use everdisk_store::{About, Completion, Lent, Op, Outcome, Owned, Store, StoreError, pool::Pool};

use self::{
    counts::Counter,
    volatile::{Trouble, Volatile},
};
pub use self::{
    counts::Counts,
    faults::{BadFault, Fault, Faults, Kind, Operation},
    volatile::{durable, fail_write_back, lose_power, make_volatile},
};

/// Interval at which an operation that hangs polls the file.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
/// Longest text that is read.
const TEXT_MAX: usize = 1024;

/// A store that obeys a file.
pub struct FaultStore {
    inner: Arc<dyn Store>,
    pool: Pool,
    file: PathBuf,
    counter: Counter,
    volatile: Volatile,
}

/// The file that commands the node at `url`, which is a directory.
pub fn fault_file(url: &NodeUrl) -> PathBuf {
    beside(url.as_directory().expect("an export is commanded by its server"), ".faults")
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// What every process did so far to the node that `file` commands: its process id, and its counts.
pub fn counts(file: &Path) -> Vec<(u32, Counts)> {
    counts::read_all(file)
}

impl FaultStore {
    /// Puts a store under the command of [`fault_file`] of its address, if it is a directory.
    pub fn wrap(inner: Arc<dyn Store>) -> Arc<dyn Store> {
        if inner.url().as_directory().is_none() {
            return inner;
        }
        let file = fault_file(inner.url());
        let volatile = Volatile::new(&file).expect("the file of what is unflushed can be read");
        Arc::new(Self { counter: Counter::new(&file), pool: Pool::default(), inner, file, volatile })
    }

    /// Waits, or fails, as the file says; else what more it says.
    fn obey(&self, operation: Operation) -> Result<Fault, StoreError> {
        let fault = loop {
            let fault = self.look().map_err(|e| self.failed(e))?.on(operation);
            if !fault.hang {
                break fault;
            }
            thread::sleep(POLL_INTERVAL);
        };
        if !fault.delay.is_zero() {
            thread::sleep(fault.delay);
        }
        match fault.fail {
            Some(errno) => Err(self.failed(io::Error::from_raw_os_error(errno))),
            None => Ok(fault),
        }
    }

    fn look(&self) -> io::Result<Faults> {
        let mut file = match File::open(&self.file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Faults::default()),
            opened => opened?,
        };
        let mut text = [0; TEXT_MAX];
        let mut len = 0;
        loop {
            match file.read(&mut text[len..]) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let text = str::from_utf8(&text[..len]).map_err(io::Error::other)?;
        text.parse().map_err(io::Error::other)
    }

    #[cold]
    fn failed(&self, source: io::Error) -> StoreError {
        StoreError::Io { node: self.inner.url().clone(), action: "do as the test wants", source }
    }

    /// Obeys, acts and counts.
    fn run(
        &self,
        operation: Operation,
        len: u64,
        act: impl FnOnce(Fault) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let _under_way = self.counter.arrive();
        let fault = self.obey(operation)?;
        if fault.lose {
            return Ok(());
        }
        let begun = self.counter.begin(operation);
        let outcome = act(fault);
        self.counter.end(begun, outcome.is_ok(), len);
        outcome
    }

    /// [`Self::run`] of what changes a range.
    fn change(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
        act: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        // What is refused changes nothing, and has no old content.
        let is_inside = offset.checked_add(len).is_some_and(|end| end <= self.inner.size());
        self.run(operation, len, |_| {
            if !is_inside {
                return act();
            }
            let changed = self.volatile.change(offset, len, |old| self.inner.read_at(offset, old), act);
            changed.map_err(|e| self.troubled(e))
        })
    }

    #[cold]
    fn troubled(&self, trouble: Trouble) -> StoreError {
        match trouble {
            Trouble::Store(error) => error,
            Trouble::File(source) => self.failed(source),
        }
    }
}

impl Store for FaultStore {
    fn about(&self) -> &About {
        self.inner.about()
    }

    fn attempt(&self, offset: u64, op: Lent<'_>) -> Option<Outcome> {
        match self.look().map(|faults| faults.on(Operation::Read)) {
            Ok(fault) if fault == Fault::default() => self.inner.attempt(offset, op),
            Ok(_) => None,
            Err(e) => Some(Err(self.failed(e))),
        }
    }

    fn perform(&self, offset: u64, op: Lent<'_>) -> Outcome {
        let inner = &*self.inner;
        match op {
            Op::Read(buf) => self.run(Operation::Read, buf.len() as u64, |_| inner.read_at(offset, buf)),
            Op::Write(data) => {
                self.change(Operation::Write, offset, data.len() as u64, || inner.write_at(offset, data))
            }
            Op::Flush => self.run(Operation::Flush, 0, |fault| {
                let put = |offset, old: &[u8]| inner.write_at(offset, old);
                self.volatile.flush(fault.drop, put, || inner.flush()).map_err(|e| self.troubled(e))
            }),
            Op::Discard(len) => self.change(Operation::Discard, offset, len, || inner.discard(offset, len)),
            Op::WriteZeroes(len) => self.change(Operation::Zeroes, offset, len, || inner.write_zeroes(offset, len)),
            Op::Allocate(len) => self.run(Operation::Allocate, len, |_| inner.allocate(offset, len)),
            Op::Identify => self.obey(Operation::Read).and_then(|_| inner.recheck()),
            Op::Seek(sought) => {
                let fault = self.obey(Operation::Read)?;
                // One answer only: that of the process that has taken the file away.
                if fault.astray && offset > 0 && fs::remove_file(&self.file).is_ok() {
                    return Ok(Some(offset - 1));
                }
                return inner.next(offset, sought);
            }
        }
        .map(|()| None)
    }

    fn begin(self: Arc<Self>, offset: u64, op: Owned, completion: Completion) {
        Arc::clone(&self).pool.begin(self, offset, op, completion);
    }

    fn forget_errors(&self) -> Result<(), StoreError> {
        self.inner.forget_errors()
    }
}
