//! What clients of the NBD front end cost that are connected and do nothing, right after they did I/O: a server that
//! spins for the next request must give up soon.

use std::time::{Duration, Instant};

use everdisk_harness::{
    nbd::{Address, Client},
    processes::cpu_time,
};
use serde_json::{Value, json};

use crate::{
    Error, Result,
    block::{BLOCK_BYTES, Noise},
    host::Host,
    measure::{SETTLE, Scope, memory_directory},
    nbd::disk::{connect, leave},
    say,
    table::{at_most, row, table},
};

/// Idle clients of each case; none, to tell what the core costs by itself.
const CLIENTS: [usize; 3] = [0, 1, 16];
/// Every client does I/O for this long, all at once.
const BUSY: Duration = Duration::from_secs(1);
const VOLUME_SIZE: &str = "512M";
const BLOCKS: u64 = (512 << 20) / BLOCK_BYTES as u64;
const TARGET_PERCENT: f64 = 1.0;

/// Measures.
///
/// # Errors
/// Whatever went wrong, an I/O error among it.
pub fn run(scope: &Scope) -> Result<Value> {
    let mut host = Host::start(&scope.interrupt, Some(&memory_directory()?))?;
    let addresses = host.attach_nbd(VOLUME_SIZE, 1, &[])?;
    let pid = host.interface().standby(&host.interrupt)?.serving.pid;
    let over = Duration::from_secs(scope.sustained);
    say(format!(
        "\nNBD at rest: CPU time of the serving core over {} s, right after its clients did 4k reads and writes, QD1",
        over.as_secs()
    ));
    let mut rows = vec![row(["idle clients", "CPU time", "of one CPU", "target", ""])];
    let mut values = Vec::new();
    for (transport, address) in [("UNIX socket", &addresses.unix), ("TCP loopback", &addresses.tcp)] {
        for clients in CLIENTS {
            host.interrupt.sleep(SETTLE * 4)?;
            let mut connected = busy_for_a_while(address, clients)?;
            let before = (cpu_time(pid)?, Instant::now());
            host.interrupt.sleep(over)?;
            let used = cpu_time(pid)?.saturating_sub(before.0);
            let percent = used.as_secs_f64() / before.1.elapsed().as_secs_f64() * 100.0;
            connected.iter_mut().for_each(leave);
            drop(connected);
            rows.push(vec![
                format!("{clients}, {transport}"),
                format!("{} ms", used.as_millis()),
                format!("{percent:.2} %"),
                format!("< {TARGET_PERCENT:.0} %"),
                at_most(percent, TARGET_PERCENT),
            ]);
            values.push(json!({
                "clients": clients, "transport": transport, "cpu_ms": used.as_millis(), "percent_of_one_cpu": percent,
                "target_percent": TARGET_PERCENT, "met": percent < TARGET_PERCENT,
            }));
        }
    }
    say(format!("\n{}", table(&rows, &[0, 4])));
    Ok(Value::Array(values))
}

/// Connects clients and lets each do I/O; gives them back as soon as the last has its last reply.
fn busy_for_a_while(address: &Address, clients: usize) -> Result<Vec<Client>> {
    let until = Instant::now() + BUSY;
    let work = |index: usize| -> std::io::Result<Client> {
        let mut client = connect(address)?;
        let mut block = vec![7; BLOCK_BYTES];
        let mut noise = Noise(index as u64);
        while Instant::now() < until {
            client.try_write(noise.below(BLOCKS) * BLOCK_BYTES as u64, &block)?;
            client.try_read(noise.below(BLOCKS) * BLOCK_BYTES as u64, &mut block)?;
        }
        Ok(client)
    };
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..clients).map(|index| scope.spawn(move || work(index))).collect();
        threads
            .into_iter()
            .map(|thread| {
                let done = thread.join().map_err(|_| Error::Failed("a client ended too soon".to_owned()))?;
                done.map_err(Error::io("do I/O over NBD"))
            })
            .collect()
    })
}
