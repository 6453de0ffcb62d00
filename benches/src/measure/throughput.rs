//! Throughput beside the peer: the same fio jobs on both, in alternating rounds of one run.

use everdisk_proto::limits::BUFFER_DEFAULT;
use serde_json::{Value, json};

use super::{Scope, VOLUME_BYTES, VOLUME_SIZE, memory_directory};
use crate::{
    Result,
    fio::{self, Job, Measured, Target},
    host::Host,
    peer::Peer,
    say,
    stats::{median, ratio},
    table::{at_least, row, table},
};

/// The jobs, each with the ratio to the peer that it must reach.
const JOBS: [(&str, Job, f64); 6] = [
    ("4k random read, QD1", Job { pattern: "randread", block: "4k", depth: 1 }, 2.0),
    ("4k random read, QD32", Job { pattern: "randread", block: "4k", depth: 32 }, 4.0),
    ("4k random write, QD1", Job { pattern: "randwrite", block: "4k", depth: 1 }, 2.0),
    ("4k random write, QD32", Job { pattern: "randwrite", block: "4k", depth: 32 }, 4.0),
    ("1M sequential read, QD8", Job { pattern: "read", block: "1M", depth: 8 }, 1.2),
    ("1M sequential write, QD8", Job { pattern: "write", block: "1M", depth: 8 }, 1.2),
];

/// The rounds of one job.
#[derive(Clone, Debug, Default)]
struct Rounds {
    ours: Vec<Measured>,
    peers: Vec<Measured>,
}

/// Measures.
///
/// # Errors
/// Whatever went wrong, an I/O error among it.
pub fn run(scope: &Scope) -> Result<Value> {
    let mut host = Host::start(&scope.interrupt, Some(&memory_directory()?))?;
    host.attach(VOLUME_SIZE, 1)?;
    let (ours, peers) = (host.file(), host.path("peer.img"));
    let peer = Peer::start(&scope.interrupt, &host.node("peer.raw"), &peers, VOLUME_BYTES)?;
    let direct = peer.takes_direct();
    let [ours, peers] = [ours, peers].map(|path| Target::File { path, direct });
    say(format!(
        "\nThroughput: {} rounds of {} s, fio libaio, one job, write buffer of {} MiB (the default), {}",
        scope.rounds,
        scope.seconds,
        BUFFER_DEFAULT >> 20,
        if direct { "O_DIRECT on both" } else { "buffered on both (the peer refuses O_DIRECT)" }
    ));
    fio::prefill(&ours, VOLUME_BYTES)?;
    fio::prefill(&peers, VOLUME_BYTES)?;

    let mut results = vec![Rounds::default(); JOBS.len()];
    for round in 0..scope.rounds {
        for ((name, job, _), rounds) in JOBS.iter().zip(&mut results) {
            let run = |target| {
                scope.interrupt.check()?;
                fio::measure(target, VOLUME_BYTES, *job, scope.seconds)
            };
            // The one that begins alternates too.
            let (first, second) = if round % 2 == 0 { (&ours, &peers) } else { (&peers, &ours) };
            let (first, second) = (run(first)?, run(second)?);
            let (mine, theirs) = if round % 2 == 0 { (first, second) } else { (second, first) };
            say(format!("  round {} {name}: {} against {}", round + 1, shown(*job, mine), shown(*job, theirs)));
            rounds.ours.push(mine);
            rounds.peers.push(theirs);
        }
    }
    let (rows, rounds) = summary(&results);
    say(format!("\n{}", table(&rows, &[0, 5])));
    drop(peer);
    Ok(json!({"direct": direct, "seconds": scope.seconds, "buffer_bytes": BUFFER_DEFAULT, "jobs": rounds}))
}

pub(super) fn amount(job: Job, measured: Measured) -> f64 {
    if job.block == "4k" { measured.iops } else { measured.bytes }
}

pub(super) fn in_words(job: Job, amount: f64) -> String {
    if job.block == "4k" {
        format!("{:.1}k IOPS", amount / 1e3)
    } else {
        format!("{:.2} GiB/s", amount / f64::from(1_u32 << 30))
    }
}

pub(super) fn shown(job: Job, measured: Measured) -> String {
    in_words(job, amount(job, measured))
}

fn summary(results: &[Rounds]) -> (Vec<Vec<String>>, Vec<Value>) {
    let mut rows = vec![row(["job", "Everdisk", "QSD FUSE export", "ratio", "target", ""])];
    let mut rounds = Vec::new();
    for ((name, job, target), result) in JOBS.iter().zip(results) {
        let amounts = |all: &[Measured]| median(&all.iter().map(|one| amount(*job, *one)).collect::<Vec<_>>());
        let (ours, peers) = (amounts(&result.ours), amounts(&result.peers));
        let reached = ratio(ours, peers);
        rows.push(vec![
            (*name).to_owned(),
            in_words(*job, ours),
            in_words(*job, peers),
            format!("{reached:.2} ×"),
            format!("{target:.1} ×"),
            at_least(reached, *target),
        ]);
        let raw = |all: &[Measured]| all.iter().map(|one| one.json()).collect::<Vec<_>>();
        rounds.push(json!({
            "job": name, "ratio": reached, "target": target, "met": reached >= *target,
            "everdisk_median": ours, "peer_median": peers,
            "everdisk": raw(&result.ours), "peer": raw(&result.peers),
        }));
    }
    (rows, rounds)
}
