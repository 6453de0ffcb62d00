//! The NBD store: a storage node that is an export of an NBD server.
//!
//! ```text
//!  0                          the node's length                        last MiB         size, rounded down to 4096
//!  │ the node's bytes at their offsets │ zeros, for a larger volume │ superblock, record, reserved │ not used
//! ```
//! The whole export is the node's, see [`node`] and [`tail`].
//!
//! | operation | command | where the server does not offer it |
//! |---|---|---|
//! | discard | WRITE_ZEROES that may punch, fast where the server offers that and can do it there | zeros are written over what is not zero; the space stays taken |
//! | write zeros | WRITE_ZEROES that may not punch | zeros are written |
//! | allocate | none: it is unsupported | |
//! | find data, holes | BLOCK_STATUS: what reads as zeros is a hole | everything is data |
//! | flush | FLUSH | the export is refused |
//!
//! TRIM is not used for a discard, because what was trimmed may read as anything. A server without FLUSH is refused: by the
//! protocol (doc/proto.md of the NBD project, "`NBD_CMD_FLUSH`") only a flush or FUA make a promise that data is durable, and the
//! absence of a flush says nothing.
//!
//! A server that dies may lose what it has acknowledged and not flushed. The next flush reports that as an error, and the engine
//! writes again what it has not seen durable.

mod extents;
mod late;
pub mod node;
mod record;
mod tail;
#[cfg(test)]
mod tests;

use std::{io, sync::Arc, time::Duration};

use everdisk_proto::{
    nbd::wire::transmission_flag as flag,
    volume::{NbdExport, NodeUrl},
};
use everdisk_store_nbd::{self as client, Client, Command, Config, Done, Keeper, Kind};
use rustix::io::Errno;

use self::extents::{Extents, clear, offers, plain};
pub use self::late::LateStore;
pub use self::node::{Created, check_destroy, check_open, check_resize, create, destroy, resize};
use crate::{
    About, Completion, Lent, NodeFormat, Op, OpenError, Outcome, Owned, Sought, Store, StoreError, pool::Pool,
};

/// An export opened as a storage node.
#[derive(Debug)]
pub struct NbdStore {
    about: About,
    format: NodeFormat,
    client: Client,
    /// For operations of more than one command.
    pool: Pool,
}

impl NbdStore {
    /// Opens the node on the export, which must bear exactly this format. `unavailable_after`: how long the server may be out
    /// of reach before operations fail; zero: for ever.
    ///
    /// # Errors
    /// [`OpenError`] says what was found instead.
    pub fn open(export: &NbdExport, format: &NodeFormat, unavailable_after: Duration) -> Result<Self, OpenError> {
        Self::open_kept(export, format, Config { unavailable_after, ..Config::default() }, None)
    }

    /// As [`NbdStore::open`], with connections that are kept beyond the death of this process.
    ///
    /// # Errors
    /// As [`NbdStore::open`].
    pub fn open_kept(
        export: &NbdExport,
        format: &NodeFormat,
        config: Config,
        keeper: Option<Arc<dyn Keeper>>,
    ) -> Result<Self, OpenError> {
        let client = node::connect(export, config, keeper)?;
        node::check(&client, &node::place(export), format)?;
        let about = About { url: NodeUrl::Nbd(export.clone()), uuid: format.superblock.node, size: format.len };
        Ok(Self { about, format: *format, client, pool: Pool::default() })
    }

    /// The client of the export.
    pub const fn client(&self) -> &Client {
        &self.client
    }

    fn inside(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        if offset.checked_add(len).is_some_and(|end| end <= self.format.len) {
            Ok(())
        } else {
            Err(StoreError::OutOfRange { node: self.about.url.clone(), offset, len, size: self.format.len })
        }
    }

    #[cold]
    fn failed(&self, source: client::Error) -> StoreError {
        StoreError::Nbd { node: self.about.url.clone(), source }
    }

    fn outcome(&self, result: Result<Done, client::Error>) -> Outcome {
        result.map(|_| None).map_err(|error| self.failed(error))
    }

    /// The one command that does the operation. For a read its memory is taken out of `op`, for a write its data. `None`: it takes several, or none.
    fn command(&self, offset: u64, op: &mut Owned) -> Option<Command> {
        let command = match op {
            Op::Read(memory) => Command::Read { offset, memory: std::mem::take(memory) },
            Op::Write(data) => Command::Write { offset, memory: std::mem::take(data), fua: false },
            Op::Flush => Command::Flush,
            Op::Discard(len) if offers(&self.client, flag::SEND_WRITE_ZEROES) => {
                let fast = offers(&self.client, flag::SEND_FAST_ZERO);
                Command::Zeroes { offset, len: *len, may_punch: true, fast }
            }
            Op::WriteZeroes(len) => Command::Zeroes { offset, len: *len, may_punch: false, fast: false },
            Op::Discard(_) | Op::Allocate(_) | Op::Seek(_) | Op::Identify => return None,
        };
        Some(command)
    }

    fn begin_command(self: Arc<Self>, command: Command, mut op: Owned, completion: Completion) {
        let slow = match command {
            Command::Zeroes { offset, len, may_punch, fast: true } => {
                Some(Command::Zeroes { offset, len, may_punch, fast: false })
            }
            _ => None,
        };
        let store = Arc::clone(&self);
        let then = move |client::Outcome { memory, result }| {
            if let (Err(error), Some(slow)) = (&result, slow)
                && error.kind() == Kind::Unsupported
            {
                return store.begin_command(slow, op, completion);
            }
            if let Op::Read(empty) | Op::Write(empty) = &mut op {
                *empty = memory;
            }
            let outcome = store.outcome(result);
            completion.complete(op, outcome);
        };
        self.client.begin(command, client::Completion::new(then));
    }

    fn call(&self, command: Command) -> Outcome {
        plain(&self.client, command).map(|()| None).map_err(|error| self.failed(error))
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Outcome {
        let client::Outcome { memory, result } = self.client.call(Command::Read { offset, memory: vec![0; buf.len()] });
        if result.is_ok() {
            buf.copy_from_slice(&memory);
        }
        self.outcome(result)
    }

    fn discard(&self, offset: u64, len: u64) -> Outcome {
        if !offers(&self.client, flag::SEND_WRITE_ZEROES) {
            return clear(&self.client, offset..offset + len).map(|()| None).map_err(|error| self.failed(error));
        }
        let zeroes = |fast| Command::Zeroes { offset, len, may_punch: true, fast };
        if offers(&self.client, flag::SEND_FAST_ZERO) {
            match plain(&self.client, zeroes(true)) {
                Err(error) if error.kind() == Kind::Unsupported => {}
                done => return done.map(|()| None).map_err(|error| self.failed(error)),
            }
        }
        self.call(zeroes(false))
    }

    fn next(&self, offset: u64, sought: Sought) -> Outcome {
        if offset >= self.format.len {
            return Ok(None);
        }
        for extent in Extents::new(&self.client, offset..self.format.len) {
            let (range, zero) = extent.map_err(|error| self.failed(error))?;
            if zero == (sought == Sought::Hole) {
                return Ok(Some(range.start));
            }
        }
        Ok((sought == Sought::Hole).then_some(self.format.len))
    }

    fn identify(&self) -> Outcome {
        let NodeUrl::Nbd(export) = &self.about.url else { unreachable!("it was opened from an export") };
        match node::check(&self.client, &node::place(export), &self.format) {
            Ok(()) => Ok(None),
            // Nothing was found instead.
            Err(OpenError::Nbd { source, .. }) => Err(self.failed(source)),
            Err(source) => Err(StoreError::Changed { node: self.about.url.clone(), source: Box::new(source) }),
        }
    }
}

/// The bytes that an operation needs inside the node; `None`: its offset says nothing, or may be anything.
fn len<R: AsRef<[u8]>, W: AsRef<[u8]>>(op: &Op<R, W>) -> Option<u64> {
    match op {
        Op::Read(memory) => Some(memory.as_ref().len() as u64),
        Op::Write(data) => Some(data.as_ref().len() as u64),
        Op::Discard(len) | Op::WriteZeroes(len) | Op::Allocate(len) => Some(*len),
        Op::Flush | Op::Seek(_) | Op::Identify => None,
    }
}

impl Store for NbdStore {
    fn about(&self) -> &About {
        &self.about
    }

    fn attempt(&self, _offset: u64, _op: Lent<'_>) -> Option<Outcome> {
        None
    }

    fn perform(&self, offset: u64, op: Lent<'_>) -> Outcome {
        if let Some(len) = len(&op) {
            self.inside(offset, len)?;
        }
        match op {
            Op::Read(buf) => self.read_at(offset, buf),
            Op::Write(data) => self.call(Command::Write { offset, memory: data.to_vec(), fua: false }),
            Op::Flush => self.call(Command::Flush),
            Op::Discard(len) => self.discard(offset, len),
            Op::WriteZeroes(len) => self.call(Command::Zeroes { offset, len, may_punch: false, fast: false }),
            Op::Allocate(0) => Ok(None),
            Op::Allocate(_) => {
                let source = io::Error::from(Errno::OPNOTSUPP);
                Err(StoreError::Io { node: self.about.url.clone(), action: "reserve space", source })
            }
            Op::Seek(sought) => self.next(offset, sought),
            Op::Identify => self.identify(),
        }
    }

    /// With its server.
    fn may_forget(&self) -> bool {
        true
    }

    fn begin(self: Arc<Self>, offset: u64, mut op: Owned, completion: Completion) {
        if let Some(Err(error)) = len(&op).map(|len| self.inside(offset, len)) {
            return completion.complete(op, Err(error));
        }
        match self.command(offset, &mut op) {
            Some(command) => self.begin_command(command, op, completion),
            None => Arc::clone(&self).pool.begin(self, offset, op, completion),
        }
    }
}
