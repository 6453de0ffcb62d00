//! The language of the fault file: one fault a line, `KIND EFFECT`; several on one kind add up.
//!
//! | kind | operations |
//! |---|---|
//! | `read` | reads, searches for data and holes, the check of the identity |
//! | `write` | writes, zeroing, reservations; discards too, unless another line names `discard` |
//! | `flush` | flushes |
//! | `discard` | discards |
//! | `all` | all of these |
//!
//! | effect | what happens to the operation |
//! |---|---|
//! | `delay_us=N` | it is done N µs later |
//! | `fail=EIO` | it is not done and fails so; `ENOSPC`, `EOPNOTSUPP` and plain numbers are known as well |
//! | `hang` | it waits until the line is gone |
//! | `astray` | a search for data or holes reports one before its start, which no store may do; once, because the file is removed with it (`read` only) |
//! | `lose` | it is not done but reported as done (not for `read`) |
//! | `drop=EIO` | a flush of a [volatile](super::make_volatile) node: what is unflushed is lost, and it fails so (`flush` only) |
//!
//! Empty lines, and what follows a `#`, are ignored.

use std::{fmt, str::FromStr, time::Duration};

use rustix::io::Errno;

/// Which operations a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `read`
    Read,
    /// `write`
    Write,
    /// `flush`
    Flush,
    /// `discard`
    Discard,
    /// `all`
    All,
}

/// An operation of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A read, or anything else that changes nothing.
    Read,
    /// A write.
    Write,
    /// Zeroing.
    Zeroes,
    /// A discard.
    Discard,
    /// A reservation.
    Allocate,
    /// A flush.
    Flush,
}

/// What an operation meets with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// It waits until it does not hang any more.
    pub hang: bool,
    /// It waits this long.
    pub delay: Duration,
    /// It fails with this errno.
    pub fail: Option<i32>,
    /// It is left out.
    pub lose: bool,
    /// It breaks the contract of a store.
    pub astray: bool,
    /// It loses what is unflushed and fails with this errno.
    pub drop: Option<i32>,
}

impl Fault {
    fn and(self, other: Self) -> Self {
        Self {
            hang: self.hang || other.hang,
            delay: self.delay + other.delay,
            fail: self.fail.or(other.fail),
            lose: self.lose || other.lose,
            astray: self.astray || other.astray,
            drop: self.drop.or(other.drop),
        }
    }
}

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults(Vec<(Kind, Fault)>);

impl Faults {
    /// What an operation meets with.
    pub fn on(&self, operation: Operation) -> Fault {
        let named = self.0.iter().any(|(kind, _)| *kind == Kind::Discard);
        let covers = |kind: Kind| match kind {
            Kind::All => true,
            Kind::Read => operation == Operation::Read,
            Kind::Flush => operation == Operation::Flush,
            Kind::Discard => operation == Operation::Discard,
            Kind::Write => match operation {
                Operation::Write | Operation::Zeroes | Operation::Allocate => true,
                Operation::Discard => !named,
                Operation::Read | Operation::Flush => false,
            },
        };
        self.0.iter().filter(|(kind, _)| covers(*kind)).fold(Fault::default(), |all, (_, fault)| all.and(*fault))
    }
}

/// A line that is not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadFault(String);

impl fmt::Display for BadFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the fault file says {:?}, which is not understood", self.0)
    }
}

impl std::error::Error for BadFault {}

impl FromStr for Faults {
    type Err = BadFault;
    fn from_str(text: &str) -> Result<Self, BadFault> {
        let lines = text.lines().map(|line| line.split_once('#').map_or(line, |(before, _)| before).trim());
        let lines = lines.filter(|line| !line.is_empty());
        lines.map(|line| fault(line).ok_or_else(|| BadFault(line.to_owned()))).collect::<Result<_, _>>().map(Self)
    }
}

fn fault(line: &str) -> Option<(Kind, Fault)> {
    let mut words = line.split_whitespace();
    let (kind, effect) = (words.next()?, words.next()?);
    if words.next().is_some() {
        return None;
    }
    let kind = match kind {
        "read" => Kind::Read,
        "write" => Kind::Write,
        "flush" => Kind::Flush,
        "discard" => Kind::Discard,
        "all" => Kind::All,
        _ => return None,
    };
    let fault = match effect.split_once('=') {
        None if effect == "hang" => Fault { hang: true, ..Fault::default() },
        None if effect == "lose" && kind != Kind::Read => Fault { lose: true, ..Fault::default() },
        None if effect == "astray" && kind == Kind::Read => Fault { astray: true, ..Fault::default() },
        Some(("delay_us", us)) => Fault { delay: Duration::from_micros(us.parse().ok()?), ..Fault::default() },
        Some(("fail", name)) => Fault { fail: Some(errno(name)?), ..Fault::default() },
        Some(("drop", name)) if kind == Kind::Flush => Fault { drop: Some(errno(name)?), ..Fault::default() },
        _ => return None,
    };
    // A read that is left out would show whatever the caller's buffer held.
    (!(fault.lose && kind == Kind::All)).then_some((kind, fault))
}

fn errno(name: &str) -> Option<i32> {
    let errno = match name {
        "EIO" => Errno::IO,
        "ENOSPC" => Errno::NOSPC,
        "EOPNOTSUPP" => Errno::OPNOTSUPP,
        number => return number.parse().ok().filter(|n| (1..4096).contains(n)),
    };
    Some(errno.raw_os_error())
}
