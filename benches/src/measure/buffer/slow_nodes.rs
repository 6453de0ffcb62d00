//! What the buffer is for: small writes, one at a time, to storage nodes that take 1 ms for each.

use serde_json::{Value, json};

use super::{Both, Pair, SLOW, faulty};
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

const JOB: Job = Job { pattern: "randwrite", block: "4k", depth: 1 };
/// A burst fits the buffer; without one it is cut off after some time.
const BURST_BYTES: u64 = 48 << 20;
const BURST_SECONDS: u64 = 2;
/// More than any load writes in its time.
const ENDLESS: u64 = 1 << 40;
const TARGET: f64 = 20.0;

/// Measures.
///
/// # Errors
/// Whatever went wrong, an I/O error among it.
pub fn run(scope: &Scope) -> Result<Value> {
    let both = Both::start(scope, faulty)?;
    let rounds = scope.rounds.div_ceil(2).max(2);
    say(format!(
        "\nWrite buffer, slow storage nodes: 4k random write QD1, O_DIRECT, every write to a node takes 1 ms; {rounds} \
         alternating rounds, 64 MiB (the default) against no buffer"
    ));
    both.buffered.fault(SLOW)?;
    both.synchronous.fault(SLOW)?;
    let phases = [
        ("burst of 48 MiB".to_owned(), BURST_BYTES, BURST_SECONDS),
        (format!("sustained, {} s on 1 GiB", scope.sustained), ENDLESS, scope.sustained),
    ];
    let mut results: [Vec<Pair>; 2] = Default::default();
    for round in 0..rounds {
        for ((name, bytes, seconds), pairs) in phases.iter().zip(&mut results) {
            let pair = both.measure(round, |host| fio::burst(&host.target(), VOLUME_BYTES, JOB, *bytes, *seconds))?;
            say(format!(
                "  round {} {name}: {} against {}",
                round + 1,
                shown(JOB, pair.buffered),
                shown(JOB, pair.synchronous)
            ));
            pairs.push(pair);
        }
    }
    let mut rows = vec![row(["4k random write, QD1", "64 MiB buffer", "no buffer", "ratio", "target", ""])];
    let mut values = Vec::new();
    for ((name, ..), pairs) in phases.iter().zip(&results) {
        let of = |one: fn(&Pair) -> Measured| median(&pairs.iter().map(|p| amount(JOB, one(p))).collect::<Vec<_>>());
        let (buffered, synchronous) = (of(|p| p.buffered), of(|p| p.synchronous));
        let reached = ratio(buffered, synchronous);
        rows.push(vec![
            (*name).to_owned(),
            in_words(JOB, buffered),
            in_words(JOB, synchronous),
            format!("{reached:.1} ×"),
            format!("{TARGET:.0} ×"),
            at_least(reached, TARGET),
        ]);
        values.push(json!({
            "job": name, "ratio": reached, "target": TARGET, "met": reached >= TARGET,
            "buffered": pairs.iter().map(|p| p.buffered.json()).collect::<Vec<_>>(),
            "synchronous": pairs.iter().map(|p| p.synchronous.json()).collect::<Vec<_>>(),
        }));
    }
    say(format!("\n{}", table(&rows, &[0, 5])));
    Ok(json!({"fault": SLOW, "jobs": values}))
}
