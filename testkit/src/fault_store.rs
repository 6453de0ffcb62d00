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
    thread,
    time::Duration,
};

use everdisk_proto::volume::NodeUrl;
use everdisk_store::{Sought, Store, StoreError};
use uuid::Uuid;

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
    inner: Box<dyn Store>,
    file: PathBuf,
    counter: Counter,
    volatile: Volatile,
}

/// The file that commands the node at `url`.
pub fn fault_file(url: &NodeUrl) -> PathBuf {
    let NodeUrl::Dir(path) = url;
    beside(path, ".faults")
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
    /// Puts a store under the command of [`fault_file`] of its address.
    pub fn wrap(inner: Box<dyn Store>) -> Box<dyn Store> {
        let file = fault_file(inner.url());
        let volatile = Volatile::new(&file).expect("the file of what is unflushed can be read");
        Box::new(Self { counter: Counter::new(&file), inner, file, volatile })
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
    fn url(&self) -> &NodeUrl {
        self.inner.url()
    }

    fn uuid(&self) -> Uuid {
        self.inner.uuid()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn recheck(&self) -> Result<(), StoreError> {
        self.obey(Operation::Read)?;
        self.inner.recheck()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        let len = buf.len() as u64;
        self.run(Operation::Read, len, |_| self.inner.read_at(offset, buf))
    }

    fn read_at_once(&self, offset: u64, buf: &mut [u8]) -> Result<bool, StoreError> {
        let fault = self.look().map_err(|e| self.failed(e))?.on(Operation::Read);
        if fault != Fault::default() {
            return Ok(false);
        }
        self.inner.read_at_once(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        self.change(Operation::Write, offset, data.len() as u64, || self.inner.write_at(offset, data))
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.run(Operation::Flush, 0, |fault| {
            let flushed =
                self.volatile.flush(fault.drop, |offset, old| self.inner.write_at(offset, old), || self.inner.flush());
            flushed.map_err(|e| self.troubled(e))
        })
    }

    fn forget_errors(&self) -> Result<(), StoreError> {
        self.inner.forget_errors()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.change(Operation::Discard, offset, len, || self.inner.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.change(Operation::Zeroes, offset, len, || self.inner.write_zeroes(offset, len))
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.run(Operation::Allocate, len, |_| self.inner.allocate(offset, len))
    }

    fn next(&self, offset: u64, sought: Sought) -> Result<Option<u64>, StoreError> {
        let fault = self.obey(Operation::Read)?;
        // One answer only: that of the process that has taken the file away.
        if fault.astray && offset > 0 && fs::remove_file(&self.file).is_ok() {
            return Ok(Some(offset - 1));
        }
        self.inner.next(offset, sought)
    }
}
