//! The core's own socket: requests that the control module sends to a core directly (flush, verify, status).

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use everdisk_engine::{Engine, IoError, WriteBack};
use everdisk_proto::frame::{CoreAnswer, CoreRequest};
use everdisk_sys::{
    link::{Link, LinkError},
    packet, robust,
};
use parking_lot::{Mutex, MutexGuard};

/// A connection without a request for this long is closed.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// Connections at once. The connection that has been idle for longest gives up its place to a newcomer.
const CONNECTIONS_MAX: usize = 8;

/// A flush is answered within this time, done or not.
const FLUSH_LIMIT_MAX: Duration = Duration::from_secs(30);

/// The socket's file; removed when the core ends.
#[derive(Debug)]
pub(crate) struct ControlSocket(PathBuf);

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // The directory may have been removed already.
        let _ = fs::remove_file(&self.0);
    }
}

/// Answers at `dir/core-PID.sock` from threads of its own.
pub(crate) fn listen(
    dir: &Path,
    engine: Arc<Engine>,
    joined: Arc<OnceLock<Arc<WriteBack>>>,
) -> io::Result<ControlSocket> {
    let path = dir.join(format!("core-{}.sock", std::process::id()));
    let listener = packet::listen(&path)?;
    let connections = Arc::new(Connections::default());
    #[expect(
        clippy::disallowed_methods,
        reason = "no thread touches a node but under `robust::enter`, in `answer_all`"
    )]
    thread::Builder::new().name("control".to_owned()).spawn(move || {
        loop {
            match packet::accept(listener.as_fd()) {
                Ok(socket) if may_ask(&socket) => {
                    let Some(busy) = connections.enter(&socket) else { continue };
                    let (engine, joined, connections) =
                        (Arc::clone(&engine), Arc::clone(&joined), Arc::clone(&connections));
                    thread::spawn(move || {
                        answer_all(&Link::new(socket), &engine, joined.get(), &busy);
                        connections.leave(&busy);
                    });
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "a connection of the control module could not be taken");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    })?;
    Ok(ControlSocket(path))
}

/// The open connections, the oldest first.
#[derive(Debug, Default)]
struct Connections(Mutex<Vec<Connection>>);

#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    /// An answer is being prepared. The pointer also identifies the connection.
    busy: Arc<AtomicBool>,
}

impl Connections {
    fn list(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.0.lock()
    }

    /// Adds a connection; `None` when there is no room.
    fn enter(&self, socket: &OwnedFd) -> Option<Arc<AtomicBool>> {
        let mut list = self.list();
        if list.len() >= CONNECTIONS_MAX {
            let idle = list.iter().position(|connection| !connection.busy.load(SeqCst))?;
            // Its thread reads the end of the connection and ends.
            let _ = rustix::net::shutdown(&list.remove(idle).socket, rustix::net::Shutdown::Both);
        }
        let busy = Arc::new(AtomicBool::new(false));
        list.push(Connection { socket: socket.try_clone().ok()?, busy: Arc::clone(&busy) });
        Some(busy)
    }

    fn leave(&self, busy: &Arc<AtomicBool>) {
        self.list().retain(|connection| !Arc::ptr_eq(&connection.busy, busy));
    }
}

fn may_ask(socket: &OwnedFd) -> bool {
    let ours = rustix::process::geteuid().as_raw();
    packet::peer(socket.as_fd()).is_ok_and(|peer| peer.uid == 0 || peer.uid == ours)
}

fn answer_all(
    link: &Link<CoreAnswer, CoreRequest>,
    engine: &Engine,
    volume: Option<&Arc<WriteBack>>,
    busy: &AtomicBool,
) {
    loop {
        let (frame, _) = match link.recv_within(IDLE_LIMIT) {
            Ok(received) => received,
            Err(LinkError::Closed | LinkError::Deadline(_)) => return,
            Err(error) => {
                tracing::warn!(%error, "a peer sent an invalid frame on the core's socket");
                return;
            }
        };
        busy.store(true, SeqCst);
        let entered = robust::enter();
        let answer = match frame.body {
            CoreRequest::Flush { limit_ms } => {
                flush(engine, volume, Duration::from_millis(limit_ms).min(FLUSH_LIMIT_MAX))
            }
            CoreRequest::Follow => {
                Ok(CoreAnswer::Following { buffered_bytes: volume.map_or(0, |volume| volume.follow()) })
            }
            CoreRequest::Verify { blocks } => engine.verify(blocks).map(|blocks| CoreAnswer::Verified { blocks }),
            CoreRequest::Status => Ok(CoreAnswer::Status { nodes: engine.nodes() }),
        };
        drop(entered);
        let answer = answer.unwrap_or_else(|error| CoreAnswer::Failed { reason: error.to_string() });
        if link.send(frame.id, answer, &[]).is_err() {
            return;
        }
        busy.store(false, SeqCst);
    }
}

fn flush(engine: &Engine, volume: Option<&Arc<WriteBack>>, limit: Duration) -> Result<CoreAnswer, IoError> {
    let Some(volume) = volume else {
        return engine.flush().map(|()| CoreAnswer::Flushed).map_err(|failed| failed.error);
    };
    match volume.flush_within(limit)? {
        true => Ok(CoreAnswer::Flushed),
        false => Ok(CoreAnswer::Flushing { buffered_bytes: volume.buffered_bytes() }),
    }
}
