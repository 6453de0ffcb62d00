//! `kill -9` of the serving core with much buffered: what a warm standby still has to do before it serves. Beside it the
//! same with a larger buffer: a process that dies unmaps the whole segment while the standby begins to serve.

use serde_json::{Value, json};

use super::{HUNG, ROOMY, Readers, faulty, fill, sync};
use crate::{
    Result, fio,
    host::Host,
    measure::{
        Scope, VOLUME_BYTES, VOLUME_SIZE,
        kill::{Killed, kill},
    },
    say,
    stats::{Sorted, time},
    table::{at_most, row, table},
};

/// Bytes that are buffered: none, and many. The storage nodes take no writes during the measurement, so the number does not change.
const FILLS: [u64; 2] = [0, 32 << 20];

/// Kill → first request: the targets.
const TARGET_MEDIAN_NS: f64 = 1.5e6;
const TARGET_P99_NS: f64 = 5e6;

/// Measures.
///
/// # Errors
/// Whatever went wrong, an I/O error among it.
pub fn run(scope: &Scope) -> Result<Value> {
    let kills = scope.kills.div_ceil(2);
    say(format!(
        "\nWrite buffer, crash: {kills} × kill -9 of the serving core of each kind, under two threads that read 4k; \
         extents of 4 KiB"
    ));
    let head = ["kill → first request", "p50", "p90", "p99", "max", "≤ 1.5 ms", "p99 ≤ 5 ms", "noticed p50", "p99"];
    let mut rows = vec![row(head)];
    let mut values = Vec::new();
    for (buffer, options) in [("64 MiB (the default)", &[][..]), ("512 MiB", &ROOMY)] {
        let mut host = faulty(scope)?;
        host.attach_with(VOLUME_SIZE, 1, options)?;
        for (bytes, kills) in FILLS.into_iter().zip(round(&host, kills)?) {
            let sorted: Sorted = kills.iter().map(Killed::first_request_ns).collect();
            let noticed: Sorted = kills.iter().map(Killed::closed_ns).collect();
            let cells = [500, 900, 990, 1000].map(|permille| time(sorted.at(permille)));
            let verdicts = [(500, TARGET_MEDIAN_NS), (990, TARGET_P99_NS)]
                .map(|(at, target)| at_most(sorted.at(at) as f64, target));
            let noticed_at = [500, 990].map(|permille| time(noticed.at(permille)));
            let name = format!("{} MiB in a buffer of {buffer}", bytes >> 20);
            rows.push([vec![name.clone()], cells.to_vec(), verdicts.to_vec(), noticed_at.to_vec()].concat());
            values.push(json!({
                "case": name, "bytes": bytes, "ns": sorted.summary(), "noticed_ns": noticed.summary(),
                "kills": kills.iter().map(Killed::json).collect::<Vec<_>>(),
            }));
        }
    }
    say(format!("\n{}", table(&rows, &[0, 5, 6])));
    Ok(Value::Array(values))
}

/// The kills of one volume, by what was buffered, in turn.
fn round(host: &Host, kills: usize) -> Result<[Vec<Killed>; FILLS.len()]> {
    fio::prefill(&host.target(), VOLUME_BYTES)?;
    sync(host)?;
    let readers = Readers::start(host)?;
    let mut interface = host.interface();
    let mut results: [Vec<Killed>; FILLS.len()] = Default::default();
    for _ in 0..kills {
        for (bytes, killed) in FILLS.into_iter().zip(&mut results) {
            interface.standby(&host.interrupt)?;
            host.fault(HUNG)?;
            fill(host, bytes)?;
            killed.push(kill(host, &mut interface)?);
            host.heal();
            sync(host)?;
        }
    }
    readers.finish(host)?;
    Ok(results)
}
