//! How large the writes are that reach the storage nodes, when random blocks of 4 KiB cover a region wholly.

use everdisk_testkit::fault_store::Operation;
use serde_json::{Value, json};

use super::{SLOW, faulty, sync};
use crate::{
    Result,
    fio::{self, Job},
    measure::{Scope, VOLUME_BYTES, VOLUME_SIZE},
    say,
    stats::median,
    table::{at_least, row, table},
};

const JOB: Job = Job { pattern: "randwrite", block: "4k", depth: 4 };
/// MiB of the region; whether it has to reach the target. Sending to slow nodes begins at a quarter of the buffer: of a larger
/// region the neighbours of what is sent are not there yet.
const REGIONS: [(u64, bool); 5] = [(8, true), (16, true), (32, true), (64, false), (256, false)];
const TARGET_KIB: f64 = 64.0;

/// Measures.
///
/// # Errors
/// Whatever went wrong, an I/O error among it.
pub fn run(scope: &Scope) -> Result<Value> {
    let mut host = faulty(scope)?;
    host.attach(VOLUME_SIZE, 1)?;
    fio::prefill(&host.target(), VOLUME_BYTES)?;
    sync(&host)?;
    let rounds = scope.rounds.min(3);
    say(format!(
        "\nWrite buffer, coalescing: random 4k writes that cover a region once, then a flush; 64 MiB buffer, medians of \
         {rounds} rounds"
    ));
    let mut rows = vec![row(["storage nodes", "region", "mean write", "writes ≥ 64 KiB", "target", ""])];
    let mut values = Vec::new();
    for (nodes, fault) in [("1 ms per write", SLOW), ("quick", "")] {
        host.fault(fault)?;
        for (mib, judged) in REGIONS {
            let (mut means, mut large) = (Vec::new(), Vec::new());
            for _ in 0..rounds {
                host.interrupt.check()?;
                let before = host.counts();
                fio::cover(&host.target(), mib << 20, JOB)?;
                sync(&host)?;
                let after = host.counts();
                let writes = (after.operations(Operation::Write) - before.operations(Operation::Write)) as f64;
                let bytes = (after.bytes(Operation::Write) - before.bytes(Operation::Write)) as f64;
                means.push(bytes / writes / 1024.0);
                large.push((after.writes_from(64 << 10) - before.writes_from(64 << 10)) as f64 / writes);
            }
            let (mean, share) = (median(&means), median(&large));
            rows.push(vec![
                nodes.to_owned(),
                format!("{mib} MiB"),
                format!("{mean:.0} KiB"),
                format!("{:.0} %", share * 100.0),
                if judged { format!("{TARGET_KIB:.0} KiB") } else { String::new() },
                if judged { at_least(mean, TARGET_KIB) } else { String::new() },
            ]);
            values.push(json!({
                "nodes": nodes, "fault": fault, "region_bytes": mib << 20, "mean_write_kib": means,
                "share_of_writes_from_64_kib": large, "target_kib": judged.then_some(TARGET_KIB),
                "met": judged.then_some(mean >= TARGET_KIB),
            }));
        }
    }
    say(format!("\n{}", table(&rows, &[0, 5])));
    Ok(Value::Array(values))
}
