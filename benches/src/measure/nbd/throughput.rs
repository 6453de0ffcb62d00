//! The NBD front end beside other NBD servers: the same fio jobs on all, in alternating rounds of one run, over a UNIX
//! socket and over TCP. Every server keeps its data in memory, ours on a storage node that is a directory.

use everdisk_harness::nbd::Address;
use everdisk_proto::limits::BUFFER_DEFAULT;
use serde_json::{Value, json};

use crate::measure::{
    Scope, VOLUME_BYTES, VOLUME_SIZE,
    buffer::sync,
    memory_directory_for,
    throughput::{amount, in_words, shown},
};
use crate::{
    Result,
    fio::{self, Job, Measured, Target},
    host::Host,
    machine::{load_average, version},
    nbd::{
        peer::{Kind, Peer},
        target,
    },
    say,
    stats::{median, ratio},
    table::{at_least, row, table},
};

/// The jobs, each with the ratio to the best peer that it must reach.
const JOBS: [(&str, Job, f64); 6] = [
    ("4k random read, QD1", Job { pattern: "randread", block: "4k", depth: 1 }, 1.8),
    ("4k random read, QD32", Job { pattern: "randread", block: "4k", depth: 32 }, 1.4),
    ("4k random write, QD1", Job { pattern: "randwrite", block: "4k", depth: 1 }, 1.8),
    ("4k random write, QD32", Job { pattern: "randwrite", block: "4k", depth: 32 }, 1.15),
    ("1M sequential read, QD8", Job { pattern: "read", block: "1M", depth: 8 }, 1.5),
    ("1M sequential write, QD8", Job { pattern: "write", block: "1M", depth: 8 }, 1.5),
];
const TRANSPORTS: [&str; 2] = ["UNIX socket", "TCP loopback"];

/// Our volumes, with their addresses: the default one, and one without a write buffer when asked for.
struct Ours {
    name: &'static str,
    host: Host,
    addresses: [Address; TRANSPORTS.len()],
}

/// A server of one transport.
struct Server<'a> {
    name: &'static str,
    target: Target,
    /// Ours: it may not go on writing back while the next one is measured.
    host: Option<&'a Host>,
}

/// What one job measured of each server, in each round.
type Rounds = Vec<Vec<Measured>>;

/// Measures.
///
/// # Errors
/// Whatever went wrong, an I/O error among it.
pub fn run(scope: &Scope) -> Result<Value> {
    let mut ours = vec![start(scope, "Everdisk", &[])?];
    if scope.unbuffered {
        ours.push(start(scope, "--buffer 0", &["--buffer", "0"])?);
    }
    say(format!(
        "\nNBD: {} rounds of {} s, fio's NBD engine, one job, images of {VOLUME_SIZE} in memory, written once\n  \
         Everdisk with a write buffer of {} MiB (the default); nbdkit's file plugin, 16 threads; qemu-nbd --shared=8, \
         cache writeback, aio threads;\n  nbd-server, 4 threads, simple replies only; all by their defaults, without \
         flushes by the client",
        scope.nbd_rounds,
        scope.seconds,
        BUFFER_DEFAULT >> 20,
    ));
    let mut results = serde_json::Map::new();
    for (index, transport) in TRANSPORTS.into_iter().enumerate() {
        results.insert(transport.to_owned(), over(scope, transport, index, &ours)?);
    }
    let versions = Kind::ALL.map(|kind| version(kind.program()));
    Ok(json!({
        "seconds": scope.seconds, "buffer_bytes": BUFFER_DEFAULT, "peers": versions, "transports": results,
    }))
}

fn start(scope: &Scope, name: &'static str, options: &[&str]) -> Result<Ours> {
    let images = Kind::ALL.len() + 1 + usize::from(scope.unbuffered);
    let mut host = Host::start(&scope.interrupt, Some(&memory_directory_for(images as u64)?))?;
    let at = host.attach_nbd(VOLUME_SIZE, 1, options)?;
    Ok(Ours { name, host, addresses: [at.unix, at.tcp] })
}

/// All jobs over one transport.
fn over(scope: &Scope, transport: &str, index: usize, ours: &[Ours]) -> Result<Value> {
    let mut servers = Vec::new();
    for our in ours {
        let Some(address) = our.addresses.get(index) else { continue };
        servers.push(Server { name: our.name, target: target(address), host: Some(&our.host) });
    }
    let mut peers = Vec::new();
    let Some(directories) = ours.first().map(|our| &our.host) else { return Ok(Value::Null) };
    for kind in Kind::ALL {
        let name = format!("{}-{index}", kind.name().replace(' ', "-"));
        let address =
            if index == 0 { Address::Unix(directories.path(&format!("{name}.sock"))) } else { Address::free_port()? };
        let image = directories.node(&format!("{}.raw", kind.name().replace(' ', "-")));
        let peer = Peer::start(&scope.interrupt, kind, &image, VOLUME_BYTES, &address)?;
        servers.push(Server { name: kind.name(), target: peer.target().clone(), host: None });
        peers.push(peer);
    }
    for server in &servers {
        fio::prefill(&server.target, VOLUME_BYTES)?;
        server.host.map_or(Ok(()), sync)?;
    }
    let mut results = vec![Rounds::new(); JOBS.len()];
    for round in 0..scope.nbd_rounds {
        for ((name, job, _), rounds) in JOBS.iter().zip(&mut results) {
            let measured = one_round(scope, round, *job, &servers)?;
            let each: Vec<String> =
                servers.iter().zip(&measured).map(|(s, m)| format!("{} {}", s.name, shown(*job, *m))).collect();
            say(format!("  {transport}, round {} {name}: {} (load {:.1})", round + 1, each.join(", "), load_average()));
            rounds.push(measured);
        }
    }
    drop(peers);
    Ok(summary(transport, &servers, ours.len(), &results))
}

/// Every server once; who begins changes from round to round.
fn one_round(scope: &Scope, round: usize, job: Job, servers: &[Server<'_>]) -> Result<Vec<Measured>> {
    let mut measured = vec![Measured::default(); servers.len()];
    for turn in 0..servers.len() {
        let index = (turn + round) % servers.len();
        let (Some(server), Some(place)) = (servers.get(index), measured.get_mut(index)) else { continue };
        scope.interrupt.check()?;
        *place = fio::measure(&server.target, VOLUME_BYTES, job, scope.seconds)?;
        server.host.map_or(Ok(()), sync)?;
    }
    Ok(measured)
}

/// The first `ours` servers are ours; what is judged is the first.
fn summary(transport: &str, servers: &[Server<'_>], ours: usize, results: &[Rounds]) -> Value {
    let mut heading = vec![transport.to_owned()];
    heading.extend(servers.iter().map(|server| server.name.to_owned()));
    heading.extend(row(["ratio to the best peer", "target", ""]));
    let columns = heading.len();
    let mut rows = vec![heading];
    let mut values = Vec::new();
    for ((name, job, target), rounds) in JOBS.iter().zip(results) {
        let amounts = |index: usize| -> Vec<f64> {
            rounds.iter().filter_map(|round| round.get(index)).map(|one| amount(*job, *one)).collect()
        };
        let best: Vec<f64> = rounds
            .iter()
            .map(|round| round.iter().skip(ours).map(|one| amount(*job, *one)).fold(0.0, f64::max))
            .collect();
        let to_best =
            |index: usize| -> Vec<f64> { amounts(index).iter().zip(&best).map(|(a, b)| ratio(*a, *b)).collect() };
        let reached = median(&to_best(0));
        let mut cells = vec![(*name).to_owned()];
        cells.extend((0..servers.len()).map(|index| in_words(*job, median(&amounts(index)))));
        cells.extend([format!("{reached:.2} ×"), format!("{target:.2} ×"), at_least(reached, *target)]);
        rows.push(cells);
        let each: serde_json::Map<String, Value> = servers
            .iter()
            .enumerate()
            .map(|(index, server)| {
                let raw: Vec<Value> =
                    rounds.iter().filter_map(|round| round.get(index)).map(|one| one.json()).collect();
                let value =
                    json!({"median": median(&amounts(index)), "ratios_to_best_peer": to_best(index), "rounds": raw});
                (server.name.to_owned(), value)
            })
            .collect();
        values.push(json!({
            "job": name, "ratio": reached, "target": target, "met": reached >= *target, "servers": each,
        }));
    }
    say(format!("\n{}\n", table(&rows, &[0, columns - 1])));
    Value::Array(values)
}
