//! The pause of an upgrade under a client of the NBD front end, by either hand-over; beside it the same volume's file, in
//! rounds between.

use serde_json::{Value, json};

use crate::{
    Result, fio,
    host::{Host, VOLUME},
    measure::{
        Scope, VOLUME_BYTES, VOLUME_SIZE, memory_directory,
        pause::{ROUND, Rounds, Way, inside, outside},
        windows,
    },
    nbd::target,
    say,
};

const TARGET_MEDIAN_US: f64 = 200.0;
const HANDOVERS: [&str; 2] = ["flush", "carry"];
/// One round on the file precedes this many rounds over NBD.
const FILE_EVERY: usize = 2;

/// Measures.
///
/// # Errors
/// Whatever went wrong: an upgrade that was not committed, an I/O error. fio's NBD engine does not reconnect: a
/// connection that breaks is an error.
pub fn run(scope: &Scope) -> Result<Value> {
    let mut host = Host::start(&scope.interrupt, Some(&memory_directory()?))?;
    let nbd = host.attach_nbd(VOLUME_SIZE, 1, &[])?;
    fio::prefill(&host.target(), VOLUME_BYTES)?;
    say(format!(
        "\nPause over NBD: {} upgrades back and forth by flush and by carry, under fio randrw 4k QD16 over a UNIX \
         socket; the volume's file, O_DIRECT, for comparison",
        scope.upgrades
    ));
    let ways = [target(&nbd.unix), host.target()].map(|target| Way { target, handovers: &HANDOVERS });
    let [over_nbd, on_file] = &ways;
    let (mut nbd, mut file) = (Rounds::default(), Rounds::default());
    for round in 0.. {
        let left = scope.upgrades.saturating_sub(nbd.reports.len());
        if left == 0 {
            break;
        }
        if round % FILE_EVERY == 0 {
            file.add(&host, "file", on_file, left.min(ROUND))?;
        }
        nbd.add(&host, "NBD", over_nbd, left.min(ROUND))?;
    }
    let mut results = serde_json::Map::new();
    for (name, rounds) in [("nbd", &nbd), ("file", &file)] {
        let mut pauses = serde_json::Map::new();
        for handover in HANDOVERS {
            let by = |report: &&Value| report.get("handover").and_then(Value::as_str) == Some(handover);
            let reports: Vec<Value> = rounds.reports.iter().filter(by).cloned().collect();
            say(format!("\n  {name}, by {handover}: {} upgrades", reports.len()));
            pauses.insert(handover.to_owned(), inside(&reports, TARGET_MEDIAN_US));
        }
        say(format!("\n  {name}: what the application saw"));
        let outside = outside(&rounds.windows);
        results.insert(
            name.to_owned(),
            json!({"upgrades": rounds.reports, "inside_us": pauses, "outside": outside,
                   "windows": rounds.windows.json(), "rounds_left_out": rounds.left_out}),
        );
    }
    results.insert("window_ms".to_owned(), json!(windows::WINDOW_NS / 1_000_000));
    let status = host.do_everdisk(&["status", VOLUME])?;
    results.insert("frontends".to_owned(), status.get("frontends").cloned().unwrap_or_default());
    Ok(results.into())
}
