//! What the load saw, told plainly.

use std::io;

use super::{Event, Kind, Seen};
use crate::{
    chart::{self, Mark},
    load::Io,
    say,
    stats::{Sorted, time},
    table::{row, table},
};

/// I/Os this long before and after an event count as around it.
const AROUND_NS: u64 = 250_000_000;
/// Pauses that are longer are worth a remark: the goal of an upgrade at p99, of a crash at the median.
const UPGRADE_PAUSE_NS: u64 = 1_000_000;
const CRASH_PAUSE_NS: u64 = 10_000_000;
/// An I/O around an event may be this many times as long as the longest of nine tenths of the calm slices.
const REMARKABLE: u64 = 2;

impl Kind {
    /// In tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Upgrade => "upgrade",
            Self::Rollback => "rollback",
            Self::Kill => "kill -9",
            Self::Suspend => "suspend",
        }
    }

    const fn letter(self) -> char {
        match self {
            Self::Upgrade => 'U',
            Self::Rollback => 'R',
            Self::Kill => 'K',
            Self::Suspend => 'S',
        }
    }
}

impl Event {
    fn around(&self) -> [u64; 2] {
        [self.at_ns.saturating_sub(AROUND_NS), self.at_ns + self.pause_ns.unwrap_or(0) + AROUND_NS]
    }
}

/// Prints it; whether all was well.
pub fn tell(seen: &Seen) -> bool {
    let [begin, end] = seen.span;
    let marks: Vec<Mark> = seen.events.iter().map(|e| Mark { at_ns: e.at_ns, letter: e.kind.letter() }).collect();
    say("\nLongest I/O over time   (U upgrade · R rollback · K kill -9 of the core · S suspend and resume)\n");
    chart::draw(&seen.tally.log, begin, end, &marks, width()).into_iter().for_each(say);

    let around: Vec<u64> = seen.events.iter().map(|event| longest(&seen.tally.log, event.around())).collect();
    let calm = calm(seen);
    say(format!("\n{}", table(&rows(seen, &around), &[0, 2, 3])));
    say(format!(
        "\n  for comparison, the longest I/O of {} ms without any event: median {}, p90 {}, longest {}",
        2 * AROUND_NS / 1_000_000,
        time(calm.median()),
        time(calm.at(900)),
        time(calm.max())
    ));
    say("\nWhat it saw");
    let mut well = totals(seen);
    for event in seen.events.iter().filter(|event| !event.well) {
        well = false;
        say(format!("  FAILED: {} {} → {}: {}", event.kind.name(), event.from, event.to, event.outcome));
    }
    pauses(seen);
    remarks(seen, &around, &calm).iter().for_each(|remark| say(format!("  worse than hoped: {remark}")));
    well
}

/// Columns of the terminal, or of a page.
fn width() -> usize {
    let columns = rustix::termios::tcgetwinsize(io::stdout()).map_or(0, |size| usize::from(size.ws_col));
    if columns == 0 { 110 } else { columns.clamp(60, 160) }
}

fn longest(log: &[Io], [from, to]: [u64; 2]) -> u64 {
    let from = log.partition_point(|io| io.end_ns < from);
    // What ended later may have been under way before.
    let under_way = log.iter().skip(from).filter(|io| io.end_ns - io.latency_ns < to);
    under_way.map(|io| io.latency_ns).max().unwrap_or(0)
}

/// The longest I/O of each slice that touches no event.
fn calm(seen: &Seen) -> Sorted {
    let [begin, end] = seen.span;
    let slices = (0..).map(|n| begin + n * 2 * AROUND_NS).take_while(|from| from + 2 * AROUND_NS <= end);
    slices
        .map(|from| [from, from + 2 * AROUND_NS])
        .filter(|[from, to]| !seen.events.iter().any(|e| e.around()[0] < *to && e.around()[1] > *from))
        .map(|slice| longest(&seen.tally.log, slice))
        .collect()
}

fn rows(seen: &Seen, around: &[u64]) -> Vec<Vec<String>> {
    let mut rows =
        vec![row(["event", "at", "core before → after", "outcome", "held for", "requests held", "longest I/O around"])];
    for (event, longest) in seen.events.iter().zip(around) {
        rows.push(vec![
            event.kind.name().to_owned(),
            format!("{:.1} s", event.at_ns.saturating_sub(seen.span[0]) as f64 / 1e9),
            format!("{} → {}", event.from, event.to),
            event.outcome.clone(),
            event.pause_ns.map_or_else(|| "not told".to_owned(), time),
            event.held.to_string(),
            time(*longest),
        ]);
    }
    rows
}

fn totals(seen: &Seen) -> bool {
    let tally = &seen.tally;
    let seconds = (seen.span[1] - seen.span[0]) as f64 / 1e9;
    say(format!(
        "  {} I/Os in {seconds:.0} s ({} reads, {} writes): {} errors, {} mismatches; {} blocks compared again at the end",
        tally.ios(),
        tally.reads,
        tally.writes,
        tally.errors,
        tally.mismatches,
        tally.compared_at_end
    ));
    for fault in &tally.faults {
        say(format!("    {fault}"));
    }
    if tally.hanging > 0 {
        say(format!("  {} threads HANG in an I/O", tally.hanging));
    }
    let same = seen.identity[0] == seen.identity[1];
    let identity = if same { "the same all the time" } else { "NOT THE SAME" };
    say(format!("  the file's inode and mount, and every thread's open file: {identity}"));
    tally.is_clean() && same && connection(seen)
}

fn connection(seen: &Seen) -> bool {
    match &seen.nbd {
        Ok([reads, writes]) => say(format!(
            "  the NBD client: {reads} reads and {writes} writes verified, no error, on one connection that went on in another \
             core {} times",
            seen.carried
        )),
        Err(why) => say(format!("  the NBD client FAILED: {why}")),
    }
    seen.nbd.is_ok()
}

fn pauses(seen: &Seen) {
    let of = |kinds: &[Kind]| {
        seen.events.iter().filter(|e| kinds.contains(&e.kind)).filter_map(|e| e.pause_ns).collect::<Sorted>()
    };
    let (planned, crash) = (of(&[Kind::Upgrade, Kind::Rollback]), of(&[Kind::Kill]));
    say(format!(
        "  {} replacements of the core: I/O was held for {} (median), at most {}",
        planned.len(),
        time(planned.median()),
        time(planned.max())
    ));
    say(format!("  kill -9 of the core: {} until another core executed the first request", time(crash.max())));
}

fn remarks(seen: &Seen, around: &[u64], calm: &Sorted) -> Vec<String> {
    let mut remarks = Vec::new();
    for (event, longest) in seen.events.iter().zip(around) {
        let (name, seconds) = (event.kind.name(), event.at_ns.saturating_sub(seen.span[0]) as f64 / 1e9);
        let limit = match event.kind {
            Kind::Upgrade | Kind::Rollback => UPGRADE_PAUSE_NS,
            Kind::Kill => CRASH_PAUSE_NS,
            // As long as the operator wished.
            Kind::Suspend => continue,
        };
        match event.pause_ns {
            Some(pause) if pause > limit => remarks.push(format!(
                "the {name} at {seconds:.1} s held I/O for {}, more than {}",
                time(pause),
                time(limit)
            )),
            None => remarks.push(format!("it is not known how long the {name} at {seconds:.1} s held I/O")),
            Some(_) => {}
        }
        let usual = calm.at(900);
        if usual > 0 && *longest > REMARKABLE * usual && *longest > limit {
            remarks.push(format!(
                "around the {name} at {seconds:.1} s an I/O took {}; without an event nine slices of ten stay below {}",
                time(*longest),
                time(usual)
            ));
        }
    }
    remarks
}
