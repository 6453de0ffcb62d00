//! Memory of the processes of one volume, fresh and after load.

use everdisk_harness::processes::Memory;
use everdisk_proto::frame::InterfaceStatus;
use serde_json::{Value, json};

use super::{LOAD_BYTES, LOAD_THREADS, SETTLE, Scope, memory_directory};
use crate::{
    Error, Result,
    host::Host,
    load::Load,
    machine::json_of,
    say,
    table::{at_most, row, table},
};

const CORE_MAX_KIB: f64 = 64.0 * 1024.0;
const INTERFACE_MAX_KIB: f64 = 8.0 * 1024.0;

/// Measures.
///
/// # Errors
/// Whatever went wrong.
pub fn run(scope: &Scope) -> Result<Value> {
    let mut host = Host::start(&scope.interrupt, Some(&memory_directory()?))?;
    host.attach("512M", 1)?;
    let mut rows = vec![row(["KiB at rest", "RSS", "PSS", "private", "locked", "target", ""])];
    let fresh = look(&host, "fresh", &mut rows)?;
    let load = Load::start(&host.file(), LOAD_THREADS, LOAD_BYTES)?;
    scope.interrupt.sleep(SETTLE * 8)?;
    let tally = load.finish(SETTLE * 100);
    if !tally.is_clean() {
        return Err(Error::Failed(format!("the load saw errors: {:?}", tally.faults)));
    }
    let used = look(&host, "after load", &mut rows)?;
    say(format!("\nMemory\n\n{}", table(&rows, &[0, 6])));
    Ok(json!({"fresh": fresh, "after_load": used}))
}

fn look(host: &Host, when: &str, rows: &mut Vec<Vec<String>>) -> Result<Value> {
    let mut interface = host.interface();
    let pair = interface.standby(&host.interrupt)?;
    host.interrupt.sleep(SETTLE * 4)?;
    let InterfaceStatus { pid, .. } = interface.status()?;
    let mut values = serde_json::Map::new();
    let processes = [
        ("core", pair.serving.pid, CORE_MAX_KIB),
        ("standby", pair.standby.pid, CORE_MAX_KIB),
        ("interface", pid, INTERFACE_MAX_KIB),
    ];
    for (name, pid, limit) in processes {
        let memory = Memory::of(pid)?;
        rows.push(vec![
            format!("{name}, {when}"),
            memory.rss.to_string(),
            memory.pss.to_string(),
            memory.private.to_string(),
            memory.locked.to_string(),
            format!("≤ {limit:.0}"),
            at_most(memory.rss as f64, limit),
        ]);
        values.insert(name.to_owned(), json_of(memory));
    }
    Ok(values.into())
}
