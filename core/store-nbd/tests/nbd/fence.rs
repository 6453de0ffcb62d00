//! A client is killed with changes in flight, at servers that go on executing them. Its connections are drained; then another
//! client overwrites everything. Nothing of the dead one may land after that.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    process::{Child, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use everdisk_drain::{Drain, Drained};
use everdisk_harness::processes;
use everdisk_store_nbd::{Client, Command, Completion, Config, Keeper};
use everdisk_sys::{in_flight::InFlight, link::wait_readable, packet};

use crate::{
    kit::{LIMIT, begin, read, succeed},
    servers::Server,
};

/// The victim's server and the socket of its keeper.
const VICTIM: &str = "EVERDISK_TEST_FENCE";
const SIZE: u64 = 16 << 20;
/// What each write takes at the server.
const DELAY: Duration = Duration::from_millis(100);
/// Bytes of one place. Each is written again and again.
const PLACE: u64 = 256 << 10;
const DEAD: u8 = 1;
const LIVING: u8 = 2;

/// Sends the descriptors to the process that keeps them.
#[derive(Debug)]
struct Sending(OwnedFd);

impl Keeper for Sending {
    fn keep(&self, connection: u64, socket: BorrowedFd<'_>, table: BorrowedFd<'_>) -> io::Result<()> {
        packet::send(self.0.as_fd(), &connection.to_ne_bytes(), &[socket, table])
    }

    fn drop(&self, _connection: u64) {}
}

/// The process that dies: it writes to every place, in pieces of all sizes, as fast as it can.
#[test]
#[ignore = "started by the tests below"]
fn victim() {
    let Ok(told) = std::env::var(VICTIM) else { return };
    let (address, keeper) = told.split_once('\n').unwrap();
    let address = crate::servers::parse(address);
    let keeper = Arc::new(Sending(packet::connect(Path::new(keeper)).unwrap()));
    let client = Client::connect_kept(address, Config { connections: 2, ..Config::default() }, Some(keeper)).unwrap();
    let client = Arc::new(client);
    for place in 0..SIZE / PLACE {
        again(&client, place, u64::from(std::process::id()) ^ place);
    }
    thread::sleep(LIMIT);
}

/// Writes to a place, for ever.
fn again(client: &Arc<Client>, place: u64, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let longest = if random.u8(..) < 32 { PLACE } else { 9000 };
    let len = random.u64(1..=longest);
    let offset = place * PLACE + random.u64(0..=PLACE - len);
    let memory = vec![DEAD; usize::try_from(len).unwrap()];
    let next = Arc::downgrade(client);
    let then = Completion::new(move |_| {
        if let Some(client) = next.upgrade() {
            again(&client, place, random.u64(..));
        }
    });
    client.begin(Command::Write { offset, memory, fua: false }, then);
}

fn start(server: &Server, socket: &Path) -> Child {
    let mut victim = std::process::Command::new(std::env::current_exe().unwrap());
    victim.args(["--ignored", "--exact", "fence::victim"]);
    victim.env(VICTIM, format!("{}\n{}", server.address.server, socket.display()));
    victim.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// What the victim gives to its keeper.
fn kept(keeper: &OwnedFd, limit: Duration) -> Option<(OwnedFd, OwnedFd)> {
    if !wait_readable(keeper.as_fd(), limit).unwrap() {
        return None;
    }
    let [socket, table] = <[OwnedFd; 2]>::try_from(packet::recv(keeper.as_fd()).unwrap()?.fds).unwrap();
    Some((socket, table))
}

/// Reads on until everything is answered. Returns how many changes were waited for.
fn drain(socket: &OwnedFd, table: OwnedFd) -> usize {
    let mut drain = Drain::new(&InFlight::adopt(table).unwrap()).unwrap();
    let (awaited, end) = (drain.left(), Instant::now() + LIMIT);
    loop {
        match drain.step(socket.as_fd()).unwrap() {
            Some(Drained::Answered) => return awaited,
            Some(Drained::Broken(left)) => panic!("the server lives and has hung up, {left} changes unanswered"),
            None => assert!(Instant::now() < end, "{} of {awaited} changes are not answered", drain.left()),
        }
    }
}

fn nothing_lands_after_the_fence(server: &Server, rounds: u64) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keeper");
    let listener = packet::listen(&path).unwrap();
    let mut waited_for = 0;
    for round in 0..rounds {
        let mut victim = start(server, &path);
        assert!(wait_readable(listener.as_fd(), LIMIT).unwrap());
        let keeper = packet::accept(listener.as_fd()).unwrap();
        let mut connections = vec![kept(&keeper, LIMIT).expect("the victim connects")];
        // Some die while they connect a second time, some before a write was answered, some after many were.
        thread::sleep(Duration::from_micros(500 + 6100 * round));
        processes::kill(victim.id());
        victim.wait().unwrap();
        while let Some(connection) = kept(&keeper, Duration::ZERO) {
            connections.push(connection);
        }
        let client = server.client(Config::default());
        for (socket, table) in connections {
            waited_for += drain(&socket, table);
        }
        let memory = vec![LIVING; usize::try_from(PLACE).unwrap()];
        let write =
            |place| begin(&client, Command::Write { offset: place * PLACE, memory: memory.clone(), fua: false });
        let writes: Vec<_> = (0..SIZE / PLACE).map(write).collect();
        writes.into_iter().for_each(|write| drop(write.wait().result.unwrap()));
        succeed(&client, Command::Flush);
        // What is still on its way takes at most twice as long.
        thread::sleep(2 * DELAY);
        let found = read(&client, 0, usize::try_from(SIZE).unwrap());
        let old = found.iter().position(|byte| *byte != LIVING);
        assert_eq!(old, None, "round {round}: a write of the dead client has landed after its successor's");
    }
    assert!(waited_for > 0, "changes were in flight");
}

const ROUNDS: u64 = 20;

#[test]
fn g_nothing_of_a_dead_client_lands_after_the_fence_nbdkit_on_unix() {
    let server = Server::nbdkit(&["--filter=delay", "memory", "16M", "delay-write=100ms"]);
    nothing_lands_after_the_fence(&server, ROUNDS);
}

#[test]
fn g_nothing_of_a_dead_client_lands_after_the_fence_nbdkit_on_tcp() {
    let server = Server::nbdkit_tcp(&["--filter=delay", "memory", "16M", "delay-write=100ms"]);
    nothing_lands_after_the_fence(&server, ROUNDS);
}

/// qemu-nbd, in front of a slow disk.
#[test]
fn g_nothing_of_a_dead_client_lands_after_the_fence_qemu_nbd() {
    let disk = Server::nbdkit(&["--filter=delay", "memory", "16M", "delay-write=100ms"]);
    let server = Server::qemu_nbd_on(&disk);
    nothing_lands_after_the_fence(&server, ROUNDS);
}

/// A request that the server has in part: its socket is full when the client dies.
#[test]
fn g_a_request_that_was_sent_in_part_is_not_waited_for() {
    let server = Server::nbdkit_file(SIZE, &[]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keeper");
    let listener = packet::listen(&path).unwrap();
    let frozen = processes::freeze(server.pid());
    drop(frozen);
    let mut victim = start(&server, &path);
    assert!(wait_readable(listener.as_fd(), LIMIT).unwrap());
    let keeper = packet::accept(listener.as_fd()).unwrap();
    let (socket, table) = kept(&keeper, LIMIT).expect("the victim connects");
    let frozen = processes::freeze(server.pid());
    thread::sleep(Duration::from_millis(50));
    processes::kill(victim.id());
    victim.wait().unwrap();
    drop(frozen);
    drain(&socket, table);
}
