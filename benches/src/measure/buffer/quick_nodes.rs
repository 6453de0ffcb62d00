//! What the buffer costs where there is nothing to gain: storage nodes in memory, as quick as the buffer itself.

use serde_json::{Value, json};

use super::{Both, Pair, plain};
use crate::{
    Result,
    fio::{self, Job, Measured},
    measure::{
        Scope, VOLUME_BYTES,
        throughput::{amount, in_words, shown},
    },
    say,
    stats::{median, ratio},
    table::{at_least, row, table},
};

/// The jobs, each with the ratio that it must reach, if any.
const JOBS: [(&str, Job, Option<f64>); 4] = [
    ("4k random write, QD32", Job { pattern: "randwrite", block: "4k", depth: 32 }, Some(1.0)),
    ("4k random write, QD1", Job { pattern: "randwrite", block: "4k", depth: 1 }, None),
    ("1M sequential write, QD8", Job { pattern: "write", block: "1M", depth: 8 }, None),
    ("4k random read, QD32", Job { pattern: "randread", block: "4k", depth: 32 }, None),
];

/// Measures.
///
/// # Errors
/// Whatever went wrong, an I/O error among it.
pub fn run(scope: &Scope) -> Result<Value> {
    let both = Both::start(scope, plain)?;
    say(format!(
        "\nWrite buffer, quick storage nodes: {} alternating rounds of {} s, O_DIRECT, 64 MiB (the default) against no \
         buffer",
        scope.rounds, scope.seconds
    ));
    let mut results: [Vec<Pair>; JOBS.len()] = Default::default();
    for round in 0..scope.rounds {
        for ((name, job, _), pairs) in JOBS.iter().zip(&mut results) {
            let pair = both.measure(round, |host| fio::measure(&host.target(), VOLUME_BYTES, *job, scope.seconds))?;
            say(format!(
                "  round {} {name}: {} against {}",
                round + 1,
                shown(*job, pair.buffered),
                shown(*job, pair.synchronous)
            ));
            pairs.push(pair);
        }
    }
    let mut rows =
        vec![row(["job", "64 MiB buffer", "no buffer", "ratio of medians", "median of ratios", "target", ""])];
    let mut values = Vec::new();
    for ((name, job, target), pairs) in JOBS.iter().zip(&results) {
        let all = |one: fn(&Pair) -> Measured| pairs.iter().map(|p| amount(*job, one(p))).collect::<Vec<_>>();
        let (buffered, synchronous) = (all(|p| p.buffered), all(|p| p.synchronous));
        let each: Vec<f64> = buffered.iter().zip(&synchronous).map(|(a, b)| ratio(*a, *b)).collect();
        let reached = ratio(median(&buffered), median(&synchronous));
        rows.push(vec![
            (*name).to_owned(),
            in_words(*job, median(&buffered)),
            in_words(*job, median(&synchronous)),
            format!("{reached:.2} ×"),
            format!("{:.2} ×", median(&each)),
            target.map_or_else(String::new, |target| format!("{target:.1} ×")),
            target.map_or_else(String::new, |target| at_least(reached, target)),
        ]);
        values.push(json!({
            "job": name, "ratio": reached, "median_of_ratios": median(&each), "target": target,
            "met": target.map(|target| reached >= target),
            "buffered": pairs.iter().map(|p| p.buffered.json()).collect::<Vec<_>>(),
            "synchronous": pairs.iter().map(|p| p.synchronous.json()).collect::<Vec<_>>(),
        }));
    }
    say(format!("\n{}", table(&rows, &[0, 6])));
    Ok(json!({"seconds": scope.seconds, "jobs": values}))
}
