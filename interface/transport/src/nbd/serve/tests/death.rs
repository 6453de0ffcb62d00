//! A core dies right after any of its stores to a connection's memory, and the next one goes on: no byte of the replies
//! or of the disk changes.

use super::*;

impl Stage {
    /// What the interface does when the core that serves has died: it waits for no worker.
    fn succeed(&mut self) {
        let dead = self.slot();
        let core = self.cores[dead].1.take().unwrap();
        assert!(core.join().is_err(), "it was to die");
        self.generation += 1;
        let slot = self.slot();
        let word =
            GateWord { mode: Mode::Open, slot: Slot::new(slot).unwrap(), generation: Generation(self.generation) };
        ticket::set(&self.segment.gate.word, word);
        self.rouse(slot);
    }
}

fn contents(disk: &FileDisk) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    disk.0.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// The conversation with a core that dies after this number of stores: the replies, the disk's bytes, and whether the
/// core died.
fn with_death_after(stores: u64, bytes: &[u8]) -> (Vec<u8>, Vec<u8>, bool) {
    let (disk, died) = (Arc::new(FileDisk::new()), Arc::<AtomicBool>::default());
    let mut stage = Stage::with(&disk, Some(Death { stores, died: Arc::clone(&died) }));
    let (mut left, mut got, mut is_alive) = (bytes, Vec::new(), true);
    let begin = Instant::now();
    loop {
        if let Ok(n) = stage.client.write(left) {
            left = &left[n..];
        }
        if is_alive && died.load(Acquire) {
            stage.succeed();
            is_alive = false;
        }
        let goes_on = stage.read(&mut got, 1 << 16);
        assert!(begin.elapsed() < SOON, "after {stores} stores: no end of the stream after {} bytes", got.len());
        if !goes_on {
            break;
        }
    }
    if is_alive && died.load(Acquire) {
        stage.succeed();
        is_alive = false;
    }
    drop(stage);
    (got, contents(&disk), !is_alive)
}

/// Dies at each store of a conversation in turn, until there are no more stores. `step`: at one store in this many.
fn dies_after_each_store(bytes: &[u8], step: usize) -> u64 {
    let (expected, content, died) = with_death_after(u64::MAX, bytes);
    assert!(expected.starts_with(b"NBDMAGIC") && !died);
    for stores in (0..).step_by(step) {
        let (got, found, died) = with_death_after(stores, bytes);
        assert!(got == expected, "after {stores} stores: {} bytes instead of {}", got.len(), expected.len());
        assert!(found == content, "after {stores} stores: the disk holds something else");
        if !died {
            return stores;
        }
    }
    unreachable!("a conversation has an end")
}

/// beyond 2, beyond 7: every command, every kind of reply, requests put aside for their large replies, and errors.
#[test]
fn beyond2_beyond7_a_death_after_any_store_changes_no_byte() {
    for structured in [false, true] {
        let stores = dies_after_each_store(&conversation(structured), 1);
        assert!(stores > 300, "{stores} stores");
    }
}

/// beyond 2, beyond 7: the same with writes in pieces and replies in chunks, with data to be discarded, and with input
/// that wraps round its ring.
#[test]
fn beyond2_beyond7_a_death_in_long_writes_and_reads_changes_no_byte() {
    let mut bytes = handshake(true);
    write(&mut bytes, 1, 1000, (1 << 20) + 5000);
    request(&mut bytes, cmd::READ, 0, 3, (1 << 20) + 5, b"");
    write(&mut bytes, 0, SIZE - 4096, 200_000);
    write(&mut bytes, 0, 5000, (1 << 20) - 100_000);
    request(&mut bytes, cmd::READ, 0, 1000, 64, b"");
    request(&mut bytes, cmd::DISC, 0, 0, 0, b"");
    let stores = dies_after_each_store(&bytes, 1);
    assert!(stores > 200, "{stores} stores");
}
