//! Measures Everdisk on this machine, beside its peer where there is one, and prints what it found.
#![forbid(unsafe_code)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use clap::{Parser, ValueEnum};
use everdisk_benches::{
    Error, Result, machine,
    measure::{Scope, buffer, kill, memory, nbd, pause, throughput},
    say,
};
use everdisk_harness::interrupt::Interrupt;
use serde_json::{Map, Value, json};

/// Measures Everdisk on this machine.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// What to measure
    #[arg(value_enum, default_value = "all")]
    what: What,
    /// Alternating rounds of the throughput measurements [default: 7, of NBD servers 5, with --quick 2]
    #[arg(long)]
    rounds: Option<usize>,
    /// Of `nbd`: a volume without a write buffer, too
    #[arg(long)]
    unbuffered: bool,
    /// Where the results go, every raw round in it
    #[arg(long, value_name = "FILE", default_value = "target/bench.json")]
    json: PathBuf,
    /// Fewer and shorter rounds: to see that it works, not to quote
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// Against qemu-storage-daemon's FUSE export
    Throughput,
    /// Of an upgrade, inside and as the application saw it
    Pause,
    /// Of the serving core, with a warm standby
    Kill,
    /// Of the processes of one volume
    Memory,
    /// Throughput of the NBD front end, against nbdkit, qemu-nbd and nbd-server
    Nbd,
    /// Reads over NBD from storage nodes that take 1 ms each, against nbdkit with such a delay
    NbdSlowNodes,
    /// Of an upgrade under an NBD client, inside and as the client saw it
    NbdPause,
    /// Of NBD clients that do nothing: CPU time of the serving core
    NbdIdle,
    /// Of the serving core under NBD clients, with a warm standby
    NbdKill,
    /// The write buffer: the six below
    Buffer,
    /// Small writes to storage nodes that take 1 ms each, buffered and synchronous
    BufferSlowNodes,
    /// Throughput where the storage nodes are as quick as memory, buffered and synchronous
    BufferQuickNodes,
    /// How large the writes are that small ones become
    BufferCoalescing,
    /// How long a successor reads a full buffer
    BufferTakeover,
    /// The pause of upgrades with more or less buffered, and with storage nodes that hang
    BufferUpgrade,
    /// Death of a core with buffered data
    BufferKill,
    /// All of these
    All,
}

impl What {
    const BUFFER: [Self; 6] = [
        Self::BufferSlowNodes,
        Self::BufferQuickNodes,
        Self::BufferCoalescing,
        Self::BufferTakeover,
        Self::BufferUpgrade,
        Self::BufferKill,
    ];

    fn contains(self, other: Self) -> bool {
        self == other || self == Self::All || (self == Self::Buffer && Self::BUFFER.contains(&other))
    }
}

/// A load average above this is worth a remark.
const BUSY: f64 = 0.5;

type Measurement = fn(&Scope) -> Result<Value>;

const MEASUREMENTS: [(What, &str, Measurement); 15] = [
    (What::Memory, "memory", memory::run),
    (What::Throughput, "throughput", throughput::run),
    (What::Pause, "pause", pause::run),
    (What::Kill, "kill", kill::run),
    (What::Nbd, "nbd", nbd::throughput::run),
    (What::NbdSlowNodes, "nbd_slow_nodes", nbd::slow_nodes::run),
    (What::NbdPause, "nbd_pause", nbd::pause::run),
    (What::NbdIdle, "nbd_idle", nbd::idle::run),
    (What::NbdKill, "nbd_kill", nbd::kill::run),
    (What::BufferSlowNodes, "buffer_slow_nodes", buffer::slow_nodes::run),
    (What::BufferQuickNodes, "buffer_quick_nodes", buffer::quick_nodes::run),
    (What::BufferCoalescing, "buffer_coalescing", buffer::coalescing::run),
    (What::BufferTakeover, "buffer_takeover", buffer::takeover::run),
    (What::BufferUpgrade, "buffer_upgrade", buffer::upgrade::run),
    (What::BufferKill, "buffer_kill", buffer::kill::run),
];

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Error::Interrupted) => {
            eprintln!("everdisk-bench: interrupted; everything was cleared away");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("everdisk-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// False when a measurement failed; the others are still made and written.
fn run(arguments: &Arguments) -> Result<bool> {
    let quick = |thorough, quick| if arguments.quick { quick } else { thorough };
    let scope = Scope {
        rounds: arguments.rounds.unwrap_or(quick(7, 2)).max(1),
        nbd_rounds: arguments.rounds.unwrap_or(quick(5, 2)).max(1),
        unbuffered: arguments.unbuffered,
        seconds: if arguments.quick { 1 } else { 2 },
        upgrades: quick(200, 20),
        kills: quick(100, 10),
        sustained: if arguments.quick { 3 } else { 10 },
        repetitions: quick(24, 3),
        interrupt: Interrupt::install()?,
    };
    let machine = machine::describe();
    say(machine::line(&machine));
    if machine::load_average() > BUSY {
        say(format!(
            "  another program is using this machine (load {:.1}): the numbers will show it",
            machine::load_average()
        ));
    }
    let mut results = Map::new();
    results.insert("machine".to_owned(), machine);
    results.insert("quick".to_owned(), json!(arguments.quick));
    let mut well = true;
    for (what, name, measure) in MEASUREMENTS {
        if !arguments.what.contains(what) {
            continue;
        }
        let began = Instant::now();
        let result = match measure(&scope) {
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            Err(error) => {
                eprintln!("everdisk-bench: {name}: {error}");
                well = false;
                json!({"failed": error.to_string()})
            }
            Ok(result) => result,
        };
        say(format!("  ({name}: {:.0} s)", began.elapsed().as_secs_f64()));
        results.insert(name.to_owned(), result);
        write(&arguments.json, &results)?;
    }
    say(format!("\nWritten to {}", arguments.json.display()));
    Ok(well)
}

fn write(path: &Path, results: &Map<String, Value>) -> Result<()> {
    let doing = || format!("write {}", path.display());
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(Error::io(doing()))?;
    }
    let mut text = serde_json::to_string_pretty(results).map_err(|e| Error::Failed(e.to_string()))?;
    text.push('\n');
    fs::write(path, text).map_err(Error::io(doing()))
}
