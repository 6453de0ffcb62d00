//! How many commands per second, next to fio's NBD client, on one server: nbdkit with its memory plugin, a UNIX socket.
//!
//! `cargo run --release -p everdisk-store-nbd --example iops [ROUNDS]`. Rounds of the two alternate; each figure is the
//! median of its rounds.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a bench ends by panicking when its servers do not run")]

use std::{
    env, fs,
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command as Program, Stdio},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use everdisk_proto::nbd::NbdAddress;
use everdisk_store_nbd::{Address, Client, Command, Completion, Config, Outcome, Tls};

const SIZE: u64 = 256 << 20;
const TIME: Duration = Duration::from_secs(2);

/// A load: what fio calls it, bytes of a command, commands in flight.
#[derive(Clone, Copy)]
struct Load {
    kind: &'static str,
    bytes: usize,
    depth: u64,
}

const LOADS: [Load; 6] = [
    Load { kind: "randread", bytes: 4096, depth: 1 },
    Load { kind: "randwrite", bytes: 4096, depth: 1 },
    Load { kind: "randread", bytes: 4096, depth: 32 },
    Load { kind: "randwrite", bytes: 4096, depth: 32 },
    Load { kind: "randread", bytes: 1 << 20, depth: 8 },
    Load { kind: "randwrite", bytes: 1 << 20, depth: 8 },
];

fn main() {
    let rounds: usize = env::args().nth(1).map_or(5, |text| text.parse().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut server = serve(&socket);
    for load in LOADS {
        let mut results = [const { Vec::new() }; 3];
        for _ in 0..rounds {
            results[0].push(ours(&socket, load, 1));
            results[1].push(fio(&socket, load));
            results[2].push(ours(&socket, load, 4));
        }
        let [one, fio, four] = results.map(median);
        let Load { kind, bytes, depth } = load;
        println!(
            "{kind:9} {bytes:7} bytes, {depth:2} in flight: 1 connection {one:8.0}/s, 4 connections {four:8.0}/s, \
             fio {fio:8.0}/s: {:.2} ×, {:.2} ×",
            one / fio,
            four / fio
        );
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

fn serve(socket: &Path) -> Child {
    let mut nbdkit = Program::new("nbdkit");
    nbdkit.args(["--foreground", "--exit-with-parent", "--unix"]).arg(socket).args(["memory", &SIZE.to_string()]);
    let child = nbdkit.spawn().unwrap();
    while UnixStream::connect(socket).is_err() {
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// What the completions of a load share.
struct Run {
    client: Client,
    load: Load,
    done: AtomicU64,
    over: AtomicBool,
    left: Mutex<u64>,
    all: Condvar,
}

fn ours(socket: &Path, load: Load, connections: usize) -> f64 {
    let address = Address { server: NbdAddress::Unix(socket.to_owned()), export: String::new(), tls: Tls::Off };
    let client = Client::connect(address, Config { connections, ..Config::default() }).unwrap();
    while client.connections() < connections {
        std::thread::yield_now();
    }
    let (left, all) = (Mutex::new(load.depth), Condvar::new());
    let run = Arc::new(Run { client, load, done: AtomicU64::new(0), over: AtomicBool::new(false), left, all });
    let began = Instant::now();
    if load.depth == 1 {
        // As fio: one thread that waits for each.
        let mut memory = vec![0x5a; load.bytes];
        while began.elapsed() < TIME {
            memory = run.client.call(command(load, memory)).memory;
            run.done.fetch_add(1, Relaxed);
        }
        return rate(&run, began);
    }
    for _ in 0..load.depth {
        next(&run, vec![0x5a; load.bytes]);
    }
    std::thread::sleep(TIME);
    run.over.store(true, Relaxed);
    let rate = rate(&run, began);
    let mut left = run.left.lock().unwrap();
    while *left > 0 {
        left = run.all.wait(left).unwrap();
    }
    rate
}

fn rate(run: &Run, began: Instant) -> f64 {
    run.done.load(Relaxed) as f64 / began.elapsed().as_secs_f64()
}

fn command(load: Load, memory: Vec<u8>) -> Command {
    let bytes = u64::try_from(load.bytes).unwrap();
    let offset = fastrand::u64(..SIZE / bytes) * bytes;
    if load.kind == "randread" {
        Command::Read { offset, memory }
    } else {
        Command::Write { offset, memory, fua: false }
    }
}

/// Each completion begins the next command.
fn next(run: &Arc<Run>, memory: Vec<u8>) {
    let again = Arc::clone(run);
    let then = move |outcome: Outcome| {
        outcome.result.unwrap();
        if again.over.load(Relaxed) {
            *again.left.lock().unwrap() -= 1;
            again.all.notify_all();
        } else {
            again.done.fetch_add(1, Relaxed);
            next(&again, outcome.memory);
        }
    };
    run.client.begin(command(run.load, memory), Completion::new(then));
}

fn fio(socket: &Path, load: Load) -> f64 {
    let uri = format!("--uri=nbd+unix:///?socket={}", socket.display());
    let output = socket.with_extension("json");
    let mut fio = Program::new("fio");
    fio.args(["--name=iops", "--ioengine=nbd", "--time_based", "--output-format=json", &uri])
        .arg(format!("--output={}", output.display()))
        .arg(format!("--rw={}", load.kind))
        .arg(format!("--bs={}", load.bytes))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--size={SIZE}"))
        .arg(format!("--runtime={}", TIME.as_secs()));
    assert!(fio.stdout(Stdio::null()).status().unwrap().success(), "fio fails");
    let text = fs::read_to_string(output).unwrap();
    // It prints a line of its own before the JSON.
    let json: serde_json::Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
    let direction = if load.kind == "randread" { "read" } else { "write" };
    json["jobs"][0][direction]["iops"].as_f64().unwrap()
}
