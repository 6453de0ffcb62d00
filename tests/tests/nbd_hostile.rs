//! NBD clients that mean no good, or are broken: the others go on, and nothing is left of the bad ones.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::limits::CONNECTIONS_MAX;
use everdisk_testkit::at_end::at_end;
use everdisk_tests::{
    bytes::{Random, pattern},
    fio::{Job, Load, Target},
    host::Host,
    nbd::{Client, Exported, Front, Kind, go, greet, option, option_reply, request, wire},
    wait::{SOON, until_true, until_within},
};

/// A handshake has to be over by then.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// What the programs of a volume may have grown by when the bad clients have gone: allocators keep a little.
const GROWTH_MAX: u64 = 48 << 20;

/// Descriptors, threads and resident bytes of the programs of a volume.
#[derive(Clone, Copy, Debug)]
struct Held {
    descriptors: usize,
    threads: usize,
    resident: u64,
}

fn held(exported: &Exported<'_>) -> Held {
    let status = exported.volume.settled();
    let mut sum = Held { descriptors: 0, threads: 0, resident: 0 };
    for pid in status.cores().into_iter().chain(status.interface()) {
        let entries = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, Iterator::count);
        sum.descriptors += entries("fd");
        sum.threads += entries("task");
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let resident = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = resident.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
        sum.resident += kib << 10;
    }
    sum
}

/// A volume, with a well-behaved client beside all that comes.
struct Bystander<'a> {
    exported: Exported<'a>,
    before: Held,
    client: Client,
    turn: u64,
}

impl<'a> Bystander<'a> {
    fn new(host: &'a Host) -> Self {
        let exported = Exported::new(host, "v", "128M");
        let mut client = exported.unix.client();
        client.write(0, &[1; 4096]);
        // One of each kind, so that what is made once is there.
        exported.tcp.client().end();
        until_true("one client is left", || exported.connections() == 1);
        let before = held(&exported);
        Self { exported, before, client, turn: 0 }
    }

    /// The good client goes on, and a new one is let in, quickly.
    fn goes_on(&mut self) {
        let began = Instant::now();
        for _ in 0..50 {
            self.turn += 1;
            let data = pattern(self.turn, 8192);
            self.client.write((self.turn % 1000) * 8192, &data);
            assert!(self.client.read((self.turn % 1000) * 8192, 8192) == data);
        }
        let took = began.elapsed();
        assert!(took < Duration::from_secs(2), "a hundred requests of the good client took {took:?}");
    }

    fn lets_in(&mut self) {
        for front in self.exported.both() {
            let began = Instant::now();
            front.client().end();
            assert!(began.elapsed() < Duration::from_secs(2), "a new client was let in after {:?}", began.elapsed());
        }
    }

    /// Nothing is left of any other client; then everything works as before.
    fn end(mut self) {
        self.goes_on();
        until_true("the bad clients have gone", || self.exported.connections() == 1);
        let before = self.before;
        let within = |now: &Held| {
            let (fds, threads) = (now.descriptors <= before.descriptors, now.threads <= before.threads);
            fds && threads && now.resident <= before.resident + GROWTH_MAX
        };
        let mut now = held(&self.exported);
        let deadline = Instant::now() + SOON;
        while !within(&now) {
            assert!(Instant::now() < deadline, "something was left: before {before:?}, now {now:?}");
            now = held(&self.exported);
        }
        println!("before {before:?}, after {now:?}");
        self.exported.volume.turn();
        self.goes_on();
        assert_eq!(self.exported.volume.settled().crashes(), 0);
        self.client.end();
        self.exported.detach();
    }
}

/// Sends what a server closes upon, perhaps before all of it is sent.
fn say(front: &Front, bytes: &[u8]) -> fs::File {
    let mut stream = front.stream();
    let _ = stream.write_all(bytes);
    stream
}

/// Waits until the server has hung up.
fn is_closed(mut stream: &fs::File, limit: Duration) {
    let began = Instant::now();
    let mut sink = [0; 4096];
    loop {
        match stream.read(&mut sink) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return,
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock, "{e}"),
        }
        assert!(began.elapsed() < limit, "the server has not hung up within {limit:?}");
    }
}

/// Bytes that are no handshake, options that are too long, or lie about their length.
#[test]
fn garbage_in_the_handshake_closes_that_connection_alone() {
    let host = Host::new();
    let mut good = Bystander::new(&host);
    let flags = 3u32.to_be_bytes();
    let mut huge = option(wire::GO, &[]);
    huge[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut name = 100_000u32.to_be_bytes().to_vec();
    name.resize(100_004, b'x');
    let endless: Vec<u8> = (0..20_000).flat_map(|_| option(99, &[0; 100])).collect();
    let bad = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        pattern(1, 1 << 20),
        [&flags[..], &pattern(2, 1 << 20)].concat(),
        [&flags[..], &huge, &vec![0; 8 << 20]].concat(),
        [&flags[..], &option(wire::GO, &name)].concat(),
        [&flags[..], &option(wire::LIST, &vec![0; 1 << 20])].concat(),
        [&flags[..], &endless].concat(),
        // The old kind of client, without fixed newstyle.
        [&0u32.to_be_bytes()[..], &option(wire::EXPORT_NAME, &[0xff; 5000])].concat(),
    ];
    let mut streams = Vec::new();
    for bytes in &bad {
        for front in good.exported.both() {
            streams.push(say(front, bytes));
        }
        good.goes_on();
        good.lets_in();
    }
    // Some are shown out at once, and those that only stopped at the handshake's limit.
    streams.iter().for_each(|stream| is_closed(stream, HANDSHAKE_LIMIT + Duration::from_secs(5)));
    good.end();
}

/// Half-open: a client that connects and sends nothing, or stops in the middle of the handshake, is disconnected after a while.
#[test]
fn a_handshake_that_does_not_go_on_is_ended_after_its_limit() {
    let host = Host::new();
    let mut good = Bystander::new(&host);
    let began = Instant::now();
    let part = [&3u32.to_be_bytes()[..], &option(wire::GO, &go(""))[..12]].concat();
    let mut streams: Vec<fs::File> = Vec::new();
    for front in good.exported.both() {
        streams.extend([front.stream(), say(front, &part)]);
    }
    while began.elapsed() < HANDSHAKE_LIMIT - Duration::from_secs(3) {
        good.goes_on();
        good.lets_in();
        thread::sleep(Duration::from_millis(500));
    }
    streams.iter().for_each(|stream| is_closed(stream, Duration::from_secs(8)));
    let took = began.elapsed();
    assert!(took > HANDSHAKE_LIMIT - Duration::from_secs(2), "shown out too early, after {took:?}");
    // A client that has shaken hands may be silent for longer.
    good.end();
}

/// Slow readers: thousands of reads whose replies are not taken. Only their connections stop.
#[test]
fn clients_that_never_read_their_replies_do_not_stall_the_others() {
    let host = Host::new();
    let mut good = Bystander::new(&host);
    let fronts = good.exported.both().map(Front::clone);
    let load = Load::start(&Job::writes(8, true), Target::Nbd { uri: good.exported.tcp.uri(), offset: "64m" });
    let mut bad = Vec::new();
    for front in &fronts {
        for _ in 0..4 {
            let mut client = front.client();
            rustix::io::ioctl_fionbio(&client.stream, true).unwrap();
            for cookie in 0..2000 {
                if client.send(Kind::Read, cookie, 0, 1 << 20, &[]).is_err() {
                    break;
                }
            }
            bad.push(client);
        }
    }
    for _ in 0..20 {
        good.goes_on();
        good.lets_in();
    }
    let now = held(&good.exported);
    println!("with {} bad clients {now:?}", bad.len());
    assert!(now.resident < good.before.resident + (256 << 20), "{now:?}, before {:?}", good.before);
    // An upgrade does not wait for them, either.
    good.exported.volume.turn();
    good.goes_on();
    load.stop();
    drop(bad);
    good.end();
}

/// Thousands of clients come and go, some politely, some at any point of what they had to say.
#[test]
fn two_thousand_clients_come_and_go_and_leave_nothing() {
    let host = Host::new();
    let mut good = Bystander::new(&host);
    let mut random = Random::new(1);
    for number in 0..2000 {
        let front = good.exported.both()[number % 2].clone();
        match random.below(5) {
            0 => drop(front.stream()),
            1 => {
                let mut stream = front.stream();
                greet(&mut stream).unwrap();
                let _ = stream.write_all(&option(wire::GO, &go(""))[..5]);
            }
            2 => front.client().end(),
            3 => {
                let mut client = front.client();
                let mut bytes = request(Kind::Write as u16, 0, 1, 40 << 20, 65536).to_vec();
                bytes.resize(28 + 65536, 7);
                let len = usize::try_from(random.below(bytes.len() as u64)).unwrap();
                client.stream.write_all(&bytes[..len]).unwrap();
            }
            _ => {
                let mut client = front.client();
                for cookie in 0..8 {
                    client.send(Kind::Read, cookie, cookie << 20, 1 << 17, &[]).unwrap();
                }
            }
        }
        if number % 200 == 0 {
            good.goes_on();
        }
    }
    good.end();
}

/// The limit: a client beyond it waits or is refused, the clients within it work, and a place that becomes free is taken.
#[test]
fn one_connection_more_than_may_be_is_kept_out_until_another_one_goes() {
    const PLACE: u64 = 64 << 20;
    let host = Host::new();
    let mut good = Bystander::new(&host);
    let mut clients: Vec<Client> = Vec::new();
    while clients.len() < CONNECTIONS_MAX - 1 {
        let front = good.exported.both()[clients.len() % 2];
        clients.push(front.client());
    }
    for (number, client) in (0..).zip(&mut clients) {
        client.write(PLACE + number * 4096, &pattern(number, 4096));
    }
    assert_eq!(good.exported.connections(), CONNECTIONS_MAX as u64);
    for front in good.exported.both() {
        let Ok(mut stream) = front.try_stream() else { continue };
        rustix::net::sockopt::set_socket_timeout(
            &stream,
            rustix::net::sockopt::Timeout::Recv,
            Some(Duration::from_millis(300)),
        )
        .unwrap();
        let mut byte = [0];
        let found = stream.read(&mut byte);
        assert!(!matches!(found, Ok(1)) || greet(&mut stream).is_err(), "one too many was let in");
    }
    good.goes_on();
    for (number, client) in (0..).zip(&mut clients) {
        assert!(client.read(PLACE + number * 4096, 4096) == pattern(number, 4096));
    }
    good.exported.volume.turn();
    clients.drain(..2).for_each(Client::end);
    for front in good.exported.both() {
        until_within(SOON, "a place that was left is taken", || {
            front.try_stream().ok().and_then(|stream| Client::over(stream).ok())
        })
        .end();
    }
    clients.into_iter().for_each(Client::end);
    good.end();
}

/// A client that hangs up in the middle of a request, again and again, also while the core is replaced.
#[test]
fn disconnects_in_the_middle_of_requests_do_no_harm_through_upgrades() {
    let host = Host::new();
    let good = Bystander::new(&host);
    let fronts = good.exported.both().map(Front::clone);
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        let _let_go = at_end(|| stop.store(true, std::sync::atomic::Ordering::SeqCst));
        for front in &fronts {
            let stop = &stop;
            scope.spawn(move || {
                let mut random = Random::new(9);
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    let mut client = front.client();
                    // Not so much that the server would wait for them to be taken before it reads on.
                    for cookie in 0..4 {
                        client.send(Kind::Read, cookie, cookie << 20, 1 << 15, &[]).unwrap();
                    }
                    let mut bytes = request(Kind::Write as u16, 0, 99, 40 << 20, 1 << 20).to_vec();
                    bytes.resize(28 + usize::try_from(random.below(1 << 20)).unwrap(), 7);
                    let _ = client.stream.write_all(&bytes);
                }
            });
        }
        for _ in 0..8 {
            good.exported.volume.turn();
        }
    });
    good.end();
}

/// Options may be asked one after another, but not for ever; a client that does so is bounded by the handshake's limit.
#[test]
fn a_handshake_that_never_ends_is_ended() {
    let host = Host::new();
    let mut good = Bystander::new(&host);
    let mut stream = good.exported.tcp.stream();
    greet(&mut stream).unwrap();
    let began = Instant::now();
    while stream.write_all(&option(99, &[])).is_ok() && option_reply(&mut stream, 99).is_ok() {
        assert!(began.elapsed() < HANDSHAKE_LIMIT * 2, "options are answered for ever");
        thread::sleep(Duration::from_millis(20));
    }
    good.lets_in();
    good.end();
}
