//! The write buffer: what it gains, what it costs, and what it does to upgrades and crashes.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use everdisk_sys::memory::LockedBuffer;

use super::{Scope, VOLUME_BYTES, VOLUME_SIZE, memory_directory};
use crate::{
    Error, Result,
    block::{BLOCK_BYTES, Noise},
    fio::{self, Measured},
    host::Host,
};

pub mod coalescing;
pub mod kill;
pub mod quick_nodes;
pub mod slow_nodes;
pub mod takeover;
pub mod upgrade;

/// A storage node that takes 1 ms per write.
const SLOW: &str = "write delay_us=1000";
/// Nothing arrives on the storage nodes and nothing becomes durable there; they can be read.
const HUNG: &str = "write hang\nflush hang";
/// A buffer that holds 64 MiB without sending any of it for lack of room.
const ROOMY: [&str; 2] = ["--buffer", "512M"];
/// Everything buffered is sent within this time.
const SYNC_WITHIN: Duration = Duration::from_secs(60);
/// What has room in the buffer is written within this time.
const WRITE_WITHIN: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Two prefilled volumes on hosts of their own: one with the default write buffer, one without any.
struct Both {
    buffered: Host,
    synchronous: Host,
}

impl Both {
    fn start(scope: &Scope, host: impl Fn(&Scope) -> Result<Host>) -> Result<Self> {
        let start = |options: &[&str]| {
            let mut host = host(scope)?;
            host.attach_with(VOLUME_SIZE, 1, options)?;
            fio::prefill(&host.target(), VOLUME_BYTES)?;
            sync(&host)?;
            Ok(host)
        };
        Ok(Self { buffered: start(&[])?, synchronous: start(&["--buffer", "0"])? })
    }

    /// One round on each, nothing buffered at its beginning; who begins alternates.
    fn measure(&self, round: usize, run: impl Fn(&Host) -> Result<Measured>) -> Result<Pair> {
        let run = |host: &Host| {
            host.interrupt.check()?;
            let measured = run(host)?;
            sync(host)?;
            Ok(measured)
        };
        if round.is_multiple_of(2) {
            let buffered = run(&self.buffered)?;
            return Ok(Pair { buffered, synchronous: run(&self.synchronous)? });
        }
        let synchronous = run(&self.synchronous)?;
        Ok(Pair { buffered: run(&self.buffered)?, synchronous })
    }
}

/// One round on both volumes.
#[derive(Clone, Copy, Debug)]
struct Pair {
    buffered: Measured,
    synchronous: Measured,
}

/// A host whose storage nodes are directories and nothing else.
fn plain(scope: &Scope) -> Result<Host> {
    Host::start(&scope.interrupt, Some(&memory_directory()?))
}

/// A host whose storage nodes obey faults.
fn faulty(scope: &Scope) -> Result<Host> {
    Host::faulty(&scope.interrupt, Some(&memory_directory()?))
}

fn open(host: &Host) -> Result<File> {
    let path = host.file();
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    let file = OpenOptions::new().read(true).write(true).custom_flags(direct).open(&path);
    file.map_err(Error::io(format!("open {} with O_DIRECT", path.display())))
}

/// I/O on a thread of its own: where it hangs, the bench does not hang with it but ends the faults and tells.
struct Waiting<T> {
    what: &'static str,
    thread: JoinHandle<std::io::Result<T>>,
}

impl<T: Send + 'static> Waiting<T> {
    fn start(what: &'static str, io: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Self {
        Self { what, thread: thread::spawn(io) }
    }

    fn finish(self, host: &Host, limit: Duration) -> Result<T> {
        let deadline = Instant::now() + limit;
        while !self.thread.is_finished() {
            host.interrupt.sleep(POLL_INTERVAL)?;
            if Instant::now() >= deadline {
                return Err(Error::Failed(format!("cannot {} within {limit:?}\n{}", self.what, host.log())));
            }
        }
        let done = self.thread.join().map_err(|_| Error::Failed(format!("cannot {}", self.what)))?;
        done.map_err(Error::io(self.what))
    }
}

/// Waits until nothing is buffered any more.
pub(super) fn sync(host: &Host) -> Result<()> {
    flushing(host)?.finish(host, SYNC_WITHIN)
}

/// A flush that goes on.
fn flushing(host: &Host) -> Result<Waiting<()>> {
    let file = open(host)?;
    Ok(Waiting::start("make the volume durable", move || file.sync_data()))
}

/// Writes the first `bytes` of the volume in blocks of 4 KiB, no two neighbours in a row.
fn fill(host: &Host, bytes: u64) -> Result<()> {
    let file = open(host)?;
    let mut block = LockedBuffer::new(BLOCK_BYTES).map_err(Error::io("lock memory"))?;
    let writing = Waiting::start("write what the buffer has room for", move || {
        let blocks = bytes / BLOCK_BYTES as u64;
        for index in 0..blocks {
            // An odd stride visits each of a power of two blocks once.
            let at = index.wrapping_mul(2_654_435_761) % blocks;
            let (stamp, number) = (index.to_le_bytes(), at.to_le_bytes());
            let head = stamp.into_iter().chain(number);
            block.iter_mut().zip(head).for_each(|(byte, new)| *byte = new);
            file.write_all_at(&block, at * BLOCK_BYTES as u64)?;
        }
        Ok(())
    });
    writing.finish(host, WRITE_WITHIN)
}

/// Threads that read random blocks all the time: they measure the pause, and reads do not change what is buffered.
struct Readers {
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    threads: Vec<Waiting<()>>,
}

impl Readers {
    const THREADS: u64 = 2;

    fn start(host: &Host) -> Result<Self> {
        let mut readers = Self { stop: Arc::default(), reads: Arc::default(), threads: Vec::new() };
        for index in 0..Self::THREADS {
            let file = open(host)?;
            let mut block = LockedBuffer::new(BLOCK_BYTES).map_err(Error::io("lock memory"))?;
            let (stop, reads) = (Arc::clone(&readers.stop), Arc::clone(&readers.reads));
            readers.threads.push(Waiting::start("read the volume", move || {
                let mut noise = Noise(index);
                while !stop.load(Relaxed) {
                    let at = noise.below(VOLUME_BYTES / BLOCK_BYTES as u64) * BLOCK_BYTES as u64;
                    file.read_exact_at(&mut block, at)?;
                    reads.fetch_add(1, Relaxed);
                }
                Ok(())
            }));
        }
        Ok(readers)
    }

    /// Ends them; how many reads there were.
    fn finish(mut self, host: &Host) -> Result<u64> {
        self.stop.store(true, Relaxed);
        for thread in std::mem::take(&mut self.threads) {
            thread.finish(host, SYNC_WITHIN)?;
        }
        Ok(self.reads.load(Relaxed))
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}
