//! Several workers of one connection, and a storage node that answers on the test's command.

use std::collections::HashSet;

use parking_lot::Condvar;

use super::*;

mod large;
mod rings;
mod room;

/// The node's behaviour at some offsets.
#[derive(Default)]
struct Node {
    /// Requests wait.
    held: HashSet<u64>,
    /// They fail.
    bad: HashSet<u64>,
    /// Requests at the node.
    there: HashSet<u64>,
    /// A worker that comes back to a closed gate waits before it leaves its request.
    lingers: bool,
    /// The disk announces that its requests take long, before they do.
    is_known_to_be_slow: bool,
    /// Number of requests that have arrived.
    visits: u32,
}

struct SlowDisk {
    file: FileDisk,
    node: Mutex<Node>,
    changed: Condvar,
}

impl SlowDisk {
    fn with<T>(&self, change: impl FnOnce(&mut Node) -> T) -> T {
        let result = change(&mut self.node.lock());
        self.changed.notify_all();
        result
    }

    fn hold(&self, offset: u64) {
        self.with(|node| node.held.insert(offset));
    }

    /// Releases the requests at an offset.
    fn release(&self, offset: u64) {
        self.with(|node| node.held.remove(&offset));
    }

    fn await_request(&self, offset: u64) {
        until("a request is at the node", || self.with(|node| node.there.contains(&offset)));
    }

    fn visit(&self, hold: &dyn Hold, offset: u64, access: impl FnOnce()) -> Result<(), Stopped> {
        if self.with(|node| node.is_known_to_be_slow) {
            hold.waits();
        }
        let mut node = self.node.lock();
        node.there.insert(offset);
        node.visits += 1;
        while node.held.contains(&offset) {
            self.changed.wait(&mut node);
        }
        node.there.remove(&offset);
        let is_bad = node.bad.contains(&offset);
        drop(node);
        access();
        if !hold.back() {
            let mut node = self.node.lock();
            while node.lingers {
                self.changed.wait(&mut node);
            }
            return Err(Stopped::Abandoned);
        }
        if is_bad { Err(Stopped::Failed(Errno(Os::IO.raw_os_error()))) } else { Ok(()) }
    }
}

impl Disk for SlowDisk {
    fn size(&self) -> u64 {
        SIZE
    }
    fn read(&self, hold: &dyn Hold, offset: u64, buf: &mut [u8]) -> Result<(), Stopped> {
        hold.away();
        self.visit(hold, offset, || self.file.0.read_exact_at(buf, offset).unwrap())
    }
    fn write(&self, hold: &dyn Hold, offset: u64, data: &[u8]) -> Result<(), Stopped> {
        hold.writing();
        self.visit(hold, offset, || self.file.0.write_all_at(data, offset).unwrap())
    }
    fn flush(&self, hold: &dyn Hold) -> Result<(), Stopped> {
        self.file.flush(hold)
    }
    fn discard(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped> {
        self.file.discard(hold, offset, len)
    }
    fn write_zeroes(&self, hold: &dyn Hold, offset: u64, len: u64) -> Result<(), Stopped> {
        self.file.discard(hold, offset, len)
    }
    fn allocate(&self, _: &dyn Hold, _: u64, _: u64) -> Result<(), Stopped> {
        Ok(())
    }
    fn seek(&self, hold: &dyn Hold, offset: u64, hole: bool) -> Result<u64, Stopped> {
        self.file.seek(hold, offset, hole)
    }
    fn adopt(&self, _: u64) {}
    fn probe(&self) -> Result<u32, Errno> {
        Ok(0)
    }
    fn version(&self) -> &'static str {
        "test"
    }
}

/// A connection in its transmission phase, and its workers in one core.
struct Team {
    segment: Arc<SharedSegment>,
    connection: Arc<Connection>,
    disk: Arc<SlowDisk>,
    client: UnixStream,
    stop: Arc<AtomicBool>,
    workers: Vec<Option<JoinHandle<Ended>>>,
}

impl Team {
    fn new(workers: usize, structured: bool) -> Self {
        signal::install_evict().unwrap();
        let disk = SlowDisk { file: FileDisk::new(), node: Mutex::default(), changed: Condvar::new() };
        let (client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        client.set_write_timeout(Some(SOON)).unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&server, 1).unwrap();
        let lent = LentConnection { number: 1, listener: 0 };
        let connection = Connection::new(lent, server.into(), ConnectionMemory::create().unwrap(), 0).unwrap();
        let mut team = Self {
            segment: Arc::new(SharedSegment::create(0).unwrap()),
            connection: Arc::new(connection),
            disk: Arc::new(disk),
            client,
            stop: Arc::default(),
            workers: Vec::new(),
        };
        team.set_gate(Mode::Open);
        for index in 0..workers {
            let (segment, connection) = (Arc::clone(&team.segment), Arc::clone(&team.connection));
            let (disk, stop) = (Arc::clone(&team.disk), Arc::clone(&team.stop));
            let work = move || {
                let access = GateAccess::take(&segment, Slot::FIRST, index, &stop);
                serve(&access, &connection, "v", &*disk, &mut Buffers::default())
            };
            team.workers.push(Some(thread::spawn(work)));
        }
        team.client.write_all(&handshake(structured)).unwrap();
        until("the handshake is over", || {
            let record = team.connection.lock().record;
            State::from_word(record.negotiated).is_some_and(|state| state.phase == Phase::Transmission)
        });
        let greeting = team.connection.lock().record.committed;
        team.read(usize::try_from(greeting).unwrap());
        team
    }

    fn set_gate(&self, mode: Mode) {
        let word = GateWord { mode, slot: Slot::FIRST, generation: Generation(1) };
        ticket::set(&self.segment.gate.word, word);
        let area = &self.segment.cores[0];
        area.wake.fetch_add(1, Release);
        wake::wake(&area.wake, Who::All);
    }

    /// What the watch does when the leader's request takes long, or did until a moment ago.
    fn lead(&self, worker: usize) {
        self.connection.lead.give(worker);
    }

    fn state(&self, worker: usize) -> &std::sync::atomic::AtomicU32 {
        &self.segment.cores[0].tickets[worker].state
    }

    /// Whether it has a request in hand.
    fn is_at_work(&self, worker: usize) -> bool {
        self.connection.lock().mine(worker).is_some()
    }

    fn is_out_of_poll(&self, worker: usize) -> bool {
        let ticket = &self.segment.cores[0].tickets[worker];
        if ticket::may_be_reading(&ticket.state) {
            signal::evict(std::process::id(), ticket.tid.load(Relaxed));
            thread::sleep(Duration::from_micros(50));
        }
        ticket::is_in(&ticket.state)
    }

    fn send(&mut self, command: u16, cookie: u64, offset: u64, len: u32, data: &[u8]) {
        let mut bytes = Vec::new();
        request(&mut bytes, command, 0, offset, len, data);
        bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
        self.client.write_all(&bytes).unwrap();
    }

    fn read(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.client.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// A simple reply; its cookie and error.
    fn reply(&mut self) -> (u64, u32) {
        let bytes = self.read(16);
        assert_eq!(bytes[..4], crate::nbd::protocol::SIMPLE_REPLY_MAGIC.to_be_bytes());
        let number = |range: std::ops::Range<usize>| bytes[range].iter().fold(0, |n, b| n << 8 | u64::from(*b));
        (number(8..16), u32::try_from(number(4..8)).unwrap())
    }

    /// A chunk; its flags, type, cookie, and what follows.
    fn chunk(&mut self) -> (u64, u64, u64, Vec<u8>) {
        let bytes = self.read(20);
        assert_eq!(bytes[..4], crate::nbd::protocol::STRUCTURED_REPLY_MAGIC.to_be_bytes());
        let number = |range: std::ops::Range<usize>| bytes[range].iter().fold(0, |n, b| n << 8 | u64::from(*b));
        let rest = self.read(usize::try_from(number(16..20)).unwrap());
        (number(4..6), number(6..8), number(8..16), rest)
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.disk.with(|node| *node = Node::default());
        let _ = self.client.shutdown(std::net::Shutdown::Both);
        self.stop.store(true, Release);
        self.set_gate(Mode::Closed);
        self.connection.lead.rouse();
        for (index, worker) in self.workers.iter_mut().enumerate() {
            let Some(worker) = worker.take() else { continue };
            until("a worker ends", || {
                signal::evict(std::process::id(), self.segment.cores[0].tickets[index].tid.load(Relaxed));
                self.connection.lead.rouse();
                thread::sleep(Duration::from_millis(1));
                worker.is_finished()
            });
            assert!(worker.join().is_ok() || thread::panicking());
        }
    }
}

/// Where a node is known to be slow, requests wait for it together. No worker has to find out first that one takes
/// long.
#[test]
fn beyond4_requests_wait_for_a_slow_node_at_once() {
    let mut team = Team::new(6, false);
    team.disk.with(|node| node.is_known_to_be_slow = true);
    let offsets = || (0..6_u64).map(|n| n << 16);
    offsets().for_each(|offset| team.disk.hold(offset));
    offsets().for_each(|offset| team.send(cmd::READ, offset, offset, 4096, b""));
    until("all of them are at the node", || {
        team.disk.with(|node| offsets().all(|offset| node.there.contains(&offset)))
    });
    for offset in offsets().rev() {
        team.disk.release(offset);
        assert_eq!(team.reply(), (offset, 0));
        team.read(4096);
    }
    // A long write is done piece by piece, by the same worker.
    team.send(cmd::WRITE, 7, 0, 3 << 20, &vec![7; 3 << 20]);
    assert_eq!(team.reply(), (7, 0));
}

/// The lead is passed on while its holder already waits for the client. One of the two receives, and nothing is lost.
#[test]
fn beyond4_a_lead_that_changes_while_its_holder_receives_loses_no_byte() {
    let mut team = Team::new(2, false);
    for round in 0..2000_u64 {
        let leader = usize::try_from(round % 2).unwrap();
        until("the leader waits for the client", || ticket::may_be_reading(team.state(leader)));
        if round % 3 == 0 {
            thread::sleep(Duration::from_micros(100));
        }
        // It may have slept while the other received the last message.
        until("the other is idle", || team.is_out_of_poll(1 - leader));
        team.lead(1 - leader);
        until("the next leader waits for the client", || ticket::may_be_reading(team.state(1 - leader)));
        let data = vec![u8::try_from(round % 251).unwrap(); 30_000];
        team.send(cmd::WRITE, round, 4096, 30_000, &data);
        assert_eq!(team.reply(), (round, 0), "round {round}");
        let mut there = vec![0; data.len()];
        team.disk.file.0.read_exact_at(&mut there, 4096).unwrap();
        assert!(there == data, "round {round}");
    }
}

#[test]
fn beyond4_a_request_that_is_let_go_after_the_gate_is_open_again_is_answered_though_the_client_says_nothing() {
    let mut team = Team::new(2, false);
    team.disk.hold(0);
    team.send(cmd::READ, 1, 0, 4096, b"");
    team.disk.await_request(0);
    team.lead(1);
    until("it is put aside", || team.connection.lock().record.aside != 0);
    team.disk.with(|node| node.lingers = true);
    team.set_gate(Mode::Closed);
    until("the leader is in", || team.is_out_of_poll(1));
    team.disk.release(0);
    until("the first is back", || team.state(0).load(Acquire) == everdisk_proto::segment::ticket_state::BUSY);
    team.set_gate(Mode::Open);
    until("the leader reads", || ticket::may_be_reading(team.state(1)));
    thread::sleep(Duration::from_millis(50));
    team.disk.with(|node| node.lingers = false);
    assert_eq!(team.reply(), (1, 0));
    team.read(4096);
}

/// Reads that are at a node known to be slow, all of them at the same time. Their cookies are the numbers from 0 on.
fn reads_at_the_node(team: &mut Team, count: u64, len: u32) {
    team.disk.with(|node| node.is_known_to_be_slow = true);
    (0..count).for_each(|n| team.disk.hold(n << 16));
    (0..count).for_each(|n| team.send(cmd::READ, n, n << 16, len, b""));
    until("all of them are at the node", || team.disk.with(|node| (0..count).all(|n| node.there.contains(&(n << 16)))));
}
