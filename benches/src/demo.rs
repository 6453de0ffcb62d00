//! The demo: a volume is upgraded, rolled back, suspended and robbed of its core under load that verifies itself, and
//! what that load saw is told.

pub mod report;
pub mod script;

use std::{fs, os::unix::fs::MetadataExt, time::Duration};

use everdisk_harness::interrupt::Interrupt;
use everdisk_sys::clock::monotonic_ns;

use crate::{
    Error, Result,
    fio::{Target, Verifying},
    host::Host,
    load::{Load, Tally},
    nbd, say,
};

/// Threads of the load.
const THREADS: u64 = 8;
/// Bytes it works on: both storage nodes have their share.
const BYTES: u64 = 128 << 20;
/// Where on the volume the NBD client works, and how many bytes.
const NBD_REGION: [u64; 2] = [192 << 20, 64 << 20];
/// Load without events at the beginning and the end.
const CALM: Duration = Duration::from_secs(3);
/// At the end everything is read back within this time.
const FINISH_WITHIN: Duration = Duration::from_secs(30);

/// What happened to the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `everdisk upgrade`.
    Upgrade,
    /// `everdisk rollback`.
    Rollback,
    /// `kill -9` of the serving core.
    Kill,
    /// `everdisk suspend` and, a moment later, `everdisk resume`.
    Suspend,
}

/// One event.
#[derive(Clone, Debug)]
pub struct Event {
    /// What.
    pub kind: Kind,
    /// Version of the core that served before.
    pub from: String,
    /// … and after.
    pub to: String,
    /// `committed` and the like.
    pub outcome: String,
    /// Whether it ended as it should.
    pub well: bool,
    /// CLOCK_MONOTONIC at which the gate was closed, or the core killed.
    pub at_ns: u64,
    /// Until the first request was executed again; none when the interface did not tell.
    pub pause_ns: Option<u64>,
    /// Requests that were held.
    pub held: u64,
}

/// Everything that was seen.
#[derive(Debug)]
pub struct Seen {
    /// What was done to the volume.
    pub events: Vec<Event>,
    /// What the load counted.
    pub tally: Tally,
    /// Beginning and end of the load, CLOCK_MONOTONIC ns.
    pub span: [u64; 2],
    /// Inode and file system of the file, before and after.
    pub identity: [(u64, u64); 2],
    /// Reads and writes of the NBD client, or what was wrong with it.
    pub nbd: std::result::Result<[u64; 2], String>,
    /// Times that its connection went on in another core.
    pub carried: u64,
}

/// Runs the demo. True: no error, no mismatch, every event as it should be, and nothing left behind.
///
/// # Errors
/// It could not be carried out.
pub fn run(interrupt: &Interrupt) -> Result<bool> {
    say("Everdisk: a volume whose client is replaced while applications use it\n");
    let mut host = Host::start(interrupt, None)?;
    let nbd_at = host.attach_nbd("256M", 2, &[])?;
    say(format!(
        "volume of 256 MiB on two directories, attached to {} and served to NBD clients",
        host.file().display()
    ));
    say(format!(
        "{THREADS} threads read and write it with O_DIRECT; every block read is checked against what was written last"
    ));
    say(
        "fio does the same over one NBD connection, on a part of its own; it fails if that connection is ever dropped\n",
    );
    let seen = watch(&host, &nbd::target(&nbd_at.unix));
    let left = host.end();
    let seen = seen?;
    let mut well = report::tell(&seen);
    if left.is_empty() {
        say("  left behind: no process, no mount, no file");
    } else {
        well = false;
        left.iter().for_each(|what| say(format!("  LEFT BEHIND, or had to be forced: {what}")));
    }
    Ok(well)
}

fn watch(host: &Host, export: &Target) -> Result<Seen> {
    let identity = || {
        let found = fs::metadata(host.file()).map_err(Error::io("examine the file"))?;
        Ok((found.ino(), found.dev()))
    };
    let before = identity()?;
    let load = Load::start(&host.file(), THREADS, BYTES)?;
    let client = Verifying::start(export, NBD_REGION[0], NBD_REGION[1])?;
    let begin = monotonic_ns();
    host.interrupt.sleep(CALM)?;
    let events = script::play(host, &load)?;
    host.interrupt.sleep(CALM)?;
    let end = monotonic_ns();
    let carried = host.interface().status()?.nbd.iter().map(|place| place.carried).sum();
    let nbd = client.finish().map_err(|error| error.to_string());
    let tally = load.finish(FINISH_WITHIN);
    Ok(Seen { events, tally, span: [begin, end], identity: [before, identity()?], nbd, carried })
}
