//! `kill -9` of the serving core under clients of the NBD front end, each with a connection of its own.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use everdisk_proto::limits::BUFFER_DEFAULT;
use serde_json::Value;

use crate::{
    Error, Result,
    host::Host,
    load::Load,
    measure::{LOAD_BYTES, LOAD_THREADS, Scope, kill::crashes, memory_directory},
    nbd::disk::NbdDisk,
    say,
};

/// Measures.
///
/// # Errors
/// Whatever went wrong. Errors and mismatches of the load are counted, printed and returned.
pub fn run(scope: &Scope) -> Result<Value> {
    let mut host = Host::start(&scope.interrupt, Some(&memory_directory()?))?;
    let addresses = host.attach_nbd("512M", 1, &[])?;
    say(format!(
        "\nCrash over NBD: kill -9 of the serving core, {} times, under {LOAD_THREADS} verifying clients, half of them \
         over TCP; write buffer of {} MiB (the default)",
        scope.kills,
        BUFFER_DEFAULT >> 20
    ));
    let broken = Arc::new(AtomicU64::new(0));
    let connect = |index: u64| {
        let address = if index.is_multiple_of(2) { &addresses.unix } else { &addresses.tcp };
        NbdDisk::connect(address, &broken).map_err(Error::io("connect to the NBD front end"))
    };
    let disks: Vec<NbdDisk> = (0..LOAD_THREADS).map(connect).collect::<Result<_>>()?;
    let mut values = crashes(scope, &host, Load::start_on(disks, LOAD_BYTES)?)?;
    let connections = scope.kills as u64 * LOAD_THREADS;
    say(format!("  connections broken: {} of {connections}, {LOAD_THREADS} at each kill", broken.load(Relaxed)));
    if let Some(values) = values.as_object_mut() {
        values.insert("connections".to_owned(), connections.into());
        values.insert("connections_broken".to_owned(), broken.load(Relaxed).into());
    }
    Ok(values)
}
