//! A load that knows what was acknowledged: every thread has a region of its own and a copy of what it must hold.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
};

use crate::{
    bytes::{Random, pattern},
    volume::Volume,
    wait::until,
};

/// Bytes of a thread's region.
pub const REGION: u64 = 4 << 20;
/// Largest request.
const REQUEST_MAX: u64 = 64 << 10;

/// What one thread ended with.
type Ended = Result<Vec<u8>, String>;

/// Threads that write, read back and fsync until they are stopped or see an error.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    operations: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Ended>>,
    file: Arc<File>,
}

impl Load {
    /// Starts `threads` threads on the first `threads` × [`REGION`] bytes of a volume, through one descriptor.
    pub fn start(volume: &Volume<'_>, threads: u64) -> Self {
        let file = Arc::new(volume.open());
        let stop = Arc::new(AtomicBool::new(false));
        let operations = Arc::new(AtomicU64::new(0));
        let threads = (0..threads).map(|thread| {
            let (file, stop, operations) = (Arc::clone(&file), Arc::clone(&stop), Arc::clone(&operations));
            thread::spawn(move || work(thread, &file, &stop, &operations).map_err(|e| e.to_string()))
        });
        let threads = threads.collect();
        Self { stop, operations, threads, file }
    }

    /// Operations that were acknowledged so far.
    pub fn operations(&self) -> u64 {
        self.operations.load(SeqCst)
    }

    /// Waits until `more` further operations were acknowledged: I/O goes on.
    pub fn goes_on(&self, more: u64) {
        let wanted = self.operations() + more;
        until("I/O goes on", || {
            assert!(self.threads.iter().all(|thread| !thread.is_finished()), "a thread of the load has ended");
            (self.operations() >= wanted).then_some(())
        });
    }

    /// Ends the load, fails if any thread saw an error, reads everything back, and returns the operations.
    pub fn stop(mut self) -> u64 {
        for (thread, ended) in (0..).zip(self.join()) {
            let expected = ended.unwrap_or_else(|error| panic!("thread {thread} of the load saw an error: {error}"));
            let mut found = vec![0; expected.len()];
            self.file.read_exact_at(&mut found, thread * REGION).expect("read everything back");
            let differs = expected.iter().zip(&found).position(|(a, b)| a != b);
            assert_eq!(differs, None, "thread {thread}: acknowledged data is not there");
        }
        self.operations()
    }

    /// Ends the load where errors are expected; returns them.
    pub fn stop_with_errors(mut self) -> Vec<String> {
        self.join().into_iter().filter_map(Result::err).collect()
    }

    fn join(&mut self) -> Vec<Ended> {
        self.stop.store(true, SeqCst);
        let threads = std::mem::take(&mut self.threads);
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("it panicked".to_owned()))).collect()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        // In a test that fails the storage nodes may hang until a `Faults` is dropped, after this.
        if !thread::panicking() {
            self.join();
        }
    }
}

fn work(thread: u64, file: &File, stop: &AtomicBool, operations: &AtomicU64) -> io::Result<Vec<u8>> {
    let mut random = Random::new(thread + 1);
    let mut model = vec![0; usize::try_from(REGION).expect("a small region")];
    file.read_exact_at(&mut model, thread * REGION)?;
    while !stop.load(SeqCst) {
        let len = 1 + random.below(REQUEST_MAX);
        let offset = random.below(REGION - len);
        let (start, end) = (index(offset), index(offset + len));
        let action = random.below(16);
        let doing = |e: io::Error| io::Error::other(format!("action {action} of {len} bytes at {offset}: {e}"));
        match action {
            0 => file.sync_data().map_err(doing)?,
            1..8 => {
                let data = pattern(random.next(), end - start);
                file.write_all_at(&data, thread * REGION + offset).map_err(doing)?;
                model[start..end].copy_from_slice(&data);
            }
            _ => {
                let mut data = vec![0; end - start];
                file.read_exact_at(&mut data, thread * REGION + offset).map_err(doing)?;
                if data != model[start..end] {
                    return Err(doing(io::Error::other("other bytes than were acknowledged")));
                }
            }
        }
        operations.fetch_add(1, SeqCst);
    }
    Ok(model)
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("a small region")
}
