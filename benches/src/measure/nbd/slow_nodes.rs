//! Requests that wait for slow storage nodes: how many of one connection do so at once. Beside nbdkit, whose 16 threads take turns
//! at the connection as well.

use everdisk_harness::nbd::Address;
use serde_json::{Value, json};

use crate::{
    Result,
    fio::{self, Job, Measured, Target},
    host::Host,
    measure::{
        Scope, VOLUME_BYTES, VOLUME_SIZE, memory_directory_for,
        throughput::{amount, in_words, shown},
    },
    nbd::{
        peer::{Kind, Peer},
        target,
    },
    say,
    stats::{median, ratio},
    table::{row, table},
};

/// Every read from a node takes 1 ms longer.
const SLOW: &str = "read delay_us=1000";
const JOBS: [(&str, Job); 3] = [
    ("4k random read, QD1", Job { pattern: "randread", block: "4k", depth: 1 }),
    ("4k random read, QD8", Job { pattern: "randread", block: "4k", depth: 8 }),
    ("4k random read, QD32", Job { pattern: "randread", block: "4k", depth: 32 }),
];

/// Measures.
///
/// # Errors
/// Whatever went wrong, an I/O error among it.
pub fn run(scope: &Scope) -> Result<Value> {
    let mut host = Host::faulty(&scope.interrupt, Some(&memory_directory_for(2)?))?;
    let ours = target(&host.attach_nbd(VOLUME_SIZE, 1, &[])?.unix);
    let address = Address::Unix(host.path("nbdkit.sock"));
    let image = host.node("nbdkit.raw");
    let peer = Peer::start(&scope.interrupt, Kind::NbdkitDelayed, &image, VOLUME_BYTES, &address)?;
    say(format!(
        "\nNBD, slow storage nodes: every read takes 1 ms longer; {} alternating rounds of {} s, one connection on a UNIX socket",
        scope.nbd_rounds, scope.seconds,
    ));
    host.fault(SLOW)?;
    let targets: [&Target; 2] = [&ours, peer.target()];
    let mut results: Vec<Vec<[Measured; 2]>> = vec![Vec::new(); JOBS.len()];
    for round in 0..scope.nbd_rounds {
        for ((name, job), rounds) in JOBS.iter().zip(&mut results) {
            let mut pair = [Measured::default(); 2];
            for turn in 0..2 {
                let index = (turn + round) % 2;
                scope.interrupt.check()?;
                if let (Some(target), Some(place)) = (targets.get(index), pair.get_mut(index)) {
                    *place = fio::measure(target, VOLUME_BYTES, *job, scope.seconds)?;
                }
            }
            let [a, b] = pair.map(|one| shown(*job, one));
            say(format!("  round {} {name}: {a} against {b}", round + 1));
            rounds.push(pair);
        }
    }
    host.heal();
    drop(peer);
    let mut rows = vec![row(["one connection, nodes of 1 ms", "Everdisk", Kind::NbdkitDelayed.name(), "ratio"])];
    let mut values = Vec::new();
    for ((name, job), rounds) in JOBS.iter().zip(&results) {
        let [ours, peers]: [Vec<f64>; 2] =
            [0, 1].map(|n: usize| rounds.iter().filter_map(|pair| pair.get(n)).map(|one| amount(*job, *one)).collect());
        let ratios: Vec<f64> = ours.iter().zip(&peers).map(|(a, b)| ratio(*a, *b)).collect();
        rows.push(vec![
            (*name).to_owned(),
            in_words(*job, median(&ours)),
            in_words(*job, median(&peers)),
            format!("{:.2} ×", median(&ratios)),
        ]);
        values.push(json!({"job": name, "ratio": median(&ratios), "everdisk": ours, "nbdkit": peers}));
    }
    say(format!("\n{}", table(&rows, &[0])));
    Ok(json!({"fault": SLOW, "jobs": values}))
}
