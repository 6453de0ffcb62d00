//! The resolution of a host's name. getaddrinfo(3) knows no deadline, so it runs on a thread of its own.

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::AcqRel, Ordering::Release},
        mpsc::{self, RecvTimeoutError},
    },
    time::Instant,
};

use everdisk_sys::robust;

/// Resolves names, one at a time: a resolution that was given up still has its thread until it ends.
#[derive(Debug, Default)]
pub(crate) struct Resolver {
    busy: Arc<AtomicBool>,
}

impl Resolver {
    /// The addresses of a host.
    pub(crate) fn resolve(&self, host: &str, port: u16, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
        if let Ok(address) = host.parse() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        if self.busy.swap(true, AcqRel) {
            return Err(io::Error::other("an earlier resolution of the name has not ended yet"));
        }
        let (found, result) = mpsc::channel();
        let (busy, name) = (Arc::clone(&self.busy), host.to_owned());
        let resolve = move || {
            let addresses = (name.as_str(), port).to_socket_addrs().map(Iterator::collect);
            busy.store(false, Release);
            // Nobody waits any more if the deadline is over.
            let _ = found.send(addresses);
        };
        robust::start("nbd-resolve", resolve).inspect_err(|_| self.busy.store(false, Release))?;
        match result.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(addresses) => addresses,
            Err(RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
            Err(RecvTimeoutError::Disconnected) => unreachable!("the thread sends before it ends, and a panic aborts"),
        }
    }
}
