//! The pause of an upgrade, by how much is buffered and by what the storage nodes do: by `carry` neither may matter. And
//! by `flush`, for the record.

use everdisk_harness::programs::FAULTY;
use serde_json::{Value, json};

use super::{HUNG, ROOMY, Readers, SYNC_WITHIN, faulty, fill, flushing, sync};
use crate::{
    Error, Result, fio,
    host::Host,
    interface::Interface,
    measure::{SETTLE, Scope, VOLUME_BYTES, VOLUME_SIZE, pause::number},
    say,
    stats::{Sorted, ratio},
    table::{at_most, row, table},
};

const TARGET_RATIO: f64 = 2.0;

struct Case {
    name: &'static str,
    handover: &'static str,
    bytes: u64,
    hung: bool,
}

const CASES: [Case; 5] = [
    Case { name: "carry, nothing buffered", handover: "carry", bytes: 0, hung: false },
    Case { name: "carry, 8 MiB", handover: "carry", bytes: 8 << 20, hung: false },
    Case { name: "carry, 64 MiB", handover: "carry", bytes: 64 << 20, hung: false },
    Case { name: "carry, 64 MiB, nodes hung, a flush waits", handover: "carry", bytes: 64 << 20, hung: true },
    Case { name: "flush, 64 MiB", handover: "flush", bytes: 64 << 20, hung: false },
];

/// Measures.
///
/// # Errors
/// Whatever went wrong: an upgrade that was not committed, an I/O error.
pub fn run(scope: &Scope) -> Result<Value> {
    let mut host = faulty(scope)?;
    host.attach_with(VOLUME_SIZE, 1, &ROOMY)?;
    fio::prefill(&host.target(), VOLUME_BYTES)?;
    sync(&host)?;
    say(format!(
        "\nWrite buffer, upgrades: {} of each kind in turn, under two threads that read 4k; extents of 4 KiB in a buffer of \
         512 MiB",
        scope.repetitions
    ));
    let readers = Readers::start(&host)?;
    let mut interface = host.interface();
    let mut results: [Vec<Value>; CASES.len()] = Default::default();
    let mut turn = 0;
    for _ in 0..scope.repetitions {
        for (case, reports) in CASES.iter().zip(&mut results) {
            turn += 1;
            let program = FAULTY.get(turn % 2).copied().unwrap_or_default();
            reports.push(upgrade(&host, &mut interface, case, program)?);
        }
    }
    let reads = readers.finish(&host)?;
    let mut rows = vec![row(["µs", "p50", "p90", "p99", "max", "adopted p50", "carried MiB", "flush ms p50"])];
    let mut medians = Vec::new();
    for (case, reports) in CASES.iter().zip(&results) {
        let of = |key: &str| reports.iter().map(|report| number(report, key)).collect::<Sorted>();
        let pause = of("suspended_us");
        let cells = [500, 900, 990, 1000].map(|permille| pause.at(permille).to_string());
        let flush = if case.handover == "flush" { of("flush_ms").median().to_string() } else { String::new() };
        let others = [of("adopted_us").median().to_string(), (of("carried_bytes").median() >> 20).to_string(), flush];
        rows.push([vec![case.name.to_owned()], cells.to_vec(), others.to_vec()].concat());
        if case.handover == "carry" {
            medians.push(pause.median());
        }
    }
    let medians: Sorted = medians.into_iter().collect();
    let reached = ratio(medians.max() as f64, medians.at(0) as f64);
    say(format!("\n{}", table(&rows, &[0])));
    say(format!(
        "  by carry, largest median to smallest: {reached:.2} (target ≤ 2: {}); {reads} reads without an error",
        at_most(reached, TARGET_RATIO)
    ));
    let cases = CASES.iter().zip(results).map(|(case, reports)| {
        json!({"case": case.name, "handover": case.handover, "bytes": case.bytes, "hung": case.hung, "upgrades": reports})
    });
    Ok(json!({
        "cases": cases.collect::<Vec<_>>(), "ratio_of_medians": reached, "target": TARGET_RATIO,
        "met": reached <= TARGET_RATIO, "reads": reads,
    }))
}

fn upgrade(host: &Host, interface: &mut Interface, case: &Case, program: &str) -> Result<Value> {
    interface.standby(&host.interrupt)?;
    host.interrupt.sleep(SETTLE)?;
    fill(host, case.bytes)?;
    // The oldest is sent after 5 s: it is upgraded at once.
    let flush = if case.hung {
        host.fault(HUNG)?;
        let flush = flushing(host)?;
        host.interrupt.sleep(SETTLE / 10)?;
        Some(flush)
    } else {
        None
    };
    let said = host.upgrade_with(&host.program(program), &["--handover", case.handover])?;
    host.heal();
    if !said.done {
        return Err(Error::Failed(format!("an upgrade failed: {}\n{}", said.complaint, host.log())));
    }
    let carried = if case.handover == "carry" { case.bytes } else { 0 };
    if number(&said.json, "carried_bytes") != carried {
        return Err(Error::Failed(format!("{carried} bytes should have been carried over: {}", said.json)));
    }
    if let Some(flush) = flush {
        flush.finish(host, SYNC_WITHIN)?;
    }
    sync(host)?;
    Ok(said.json)
}
