//! The control socket.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::AsFd,
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use everdisk_api::{
    answer::{Kind, Line, Refusal},
    request::{REQUEST_BYTES_MAX, Request},
};
use everdisk_sys::packet;
use tracing::warn;

use crate::{
    audit::{Audit, Who},
    catalogue::Catalogue,
    commands::carry_out,
    progress::Progress,
};

/// A client has this long to send its line.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// The connection of a client that does not read its answer is closed after this time.
const WRITE_WITHIN: Duration = Duration::from_secs(2);
/// Clients at a time.
const CLIENTS_MAX: usize = 64;

/// Listens at `path`, which only the owner can reach.
///
/// # Errors
/// The operating system's.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves clients for ever, each in a thread of its own.
pub fn serve(listener: &UnixListener, catalogue: &Arc<Catalogue>) {
    let clients = Arc::new(AtomicUsize::new(0));
    for connection in listener.incoming() {
        let stream = match connection {
            Ok(stream) => stream,
            Err(e) => {
                // Out of descriptors, most likely; others will be closed.
                warn!("cannot take a connection: {e}");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let place = Permit::take(&clients);
        let catalogue = Arc::clone(catalogue);
        let spawned = thread::Builder::new().name("client".to_owned()).spawn(move || {
            let full = place.is_none();
            answer(stream, full, &catalogue);
            drop(place);
        });
        if let Err(e) = spawned {
            warn!("cannot start a thread: {e}");
        }
    }
}

/// One of the places for clients.
struct Permit(Arc<AtomicUsize>);

impl Permit {
    fn take(clients: &Arc<AtomicUsize>) -> Option<Self> {
        let place = Self(Arc::clone(clients));
        (clients.fetch_add(1, Ordering::Relaxed) < CLIENTS_MAX).then_some(place)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn answer(stream: UnixStream, full: bool, catalogue: &Catalogue) {
    let Ok(reader) = stream.try_clone() else { return };
    if stream.set_write_timeout(Some(WRITE_WITHIN)).is_err() {
        return;
    }
    let request = if full {
        Err(Refusal::new(Kind::Busy, format!("{CLIENTS_MAX} clients are being served already: try again")))
    } else {
        admit(&stream).and_then(|who| Ok((who, read_request(reader)?)))
    };
    let (who, request) = match request {
        Ok(asked) => asked,
        Err(refusal) => return refuse(stream, refusal),
    };
    let progress = Progress::new(stream);
    let heart = progress.heartbeat();
    let audit = Audit::begin(&request, who);
    let ended = carry_out(catalogue, request, &progress);
    audit.end(&ended);
    let end = match ended {
        Ok(value) => Line::Ok(value),
        Err(e) => Line::Error(e.into()),
    };
    drop(heart);
    progress.finish(&end);
}

fn refuse(mut stream: UnixStream, refusal: Refusal) {
    if let Ok(mut bytes) = serde_json::to_vec(&Line::Error(refusal)) {
        bytes.push(b'\n');
        // The client may have gone.
        let _ = stream.write_all(&bytes);
    }
}

/// Only the user who runs the control module, and root, are served.
fn admit(stream: &UnixStream) -> Result<Who, Refusal> {
    let own = rustix::process::geteuid().as_raw();
    match packet::peer(stream.as_fd()) {
        Ok(peer) if peer.uid == own || peer.uid == 0 => Ok(Who { uid: peer.uid, pid: peer.pid }),
        Ok(peer) => Err(Refusal::new(
            Kind::BadRequest,
            format!("user {} may not command this everdiskd, which runs as user {own}", peer.uid),
        )),
        Err(e) => Err(Refusal::new(Kind::BadRequest, format!("the client's user is not known: {e}"))),
    }
}

fn read_request(stream: UnixStream) -> Result<Request, Refusal> {
    let bad = |why: String| Refusal::new(Kind::BadRequest, why);
    let mut line = Vec::new();
    let mut reader = BufReader::new(Within { stream, until: Instant::now() + REQUEST_WITHIN });
    let limit = REQUEST_BYTES_MAX as u64 + 1;
    reader.by_ref().take(limit).read_until(b'\n', &mut line).map_err(|e| bad(format!("no request came: {e}")))?;
    if line.len() > REQUEST_BYTES_MAX {
        return Err(bad(format!("the request is longer than {REQUEST_BYTES_MAX} bytes")));
    }
    serde_json::from_slice(&line).map_err(|e| bad(format!("not a request: {e}")))
}

/// A stream whose reads together end at an instant, so that a client that sends a byte now and then is given up too.
struct Within {
    stream: UnixStream,
    until: Instant,
}

impl Read for Within {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use everdisk_api::{client, directories::Directories};

    use super::*;
    use crate::programs::Programs;

    fn daemon() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories { run: dir.path().join("r"), state: dir.path().join("s") };
        std::fs::create_dir(&directories.run).unwrap();
        let path = directories.control_socket();
        let catalogue = Arc::new(Catalogue::load(directories, Programs::find().unwrap()).unwrap());
        let listener = listen(&path).unwrap();
        thread::spawn(move || serve(&listener, &catalogue));
        (dir, path)
    }

    fn raw(path: &Path, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).unwrap();
        let _ = stream.write_all(bytes);
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    }

    #[test]
    fn garbage_is_refused_and_the_next_client_is_served() {
        let (_dir, path) = daemon();
        for garbage in [&b"\n"[..], b"{}\n", b"\xff\xfe\n", b"{\"op\":\"explode\"}\n"] {
            assert!(raw(&path, garbage).contains("\"kind\":\"bad-request\""));
        }
        let long = vec![b' '; REQUEST_BYTES_MAX + 1];
        assert!(raw(&path, &long).contains("longer than"));
        assert!(client::ask(&path, &Request::Version, |_| {}).unwrap()["version"].is_string());
        assert_eq!(client::ask(&path, &Request::VolumeList, |_| {}).unwrap(), serde_json::json!([]));
    }

    #[test]
    fn a_volume_that_is_not_there_is_not_found() {
        let (_dir, path) = daemon();
        let request = Request::Status { name: Some("none".parse().unwrap()) };
        let error = client::ask(&path, &request, |_| {}).unwrap_err();
        assert!(error.to_string().contains("there is no volume none"), "{error}");
    }

    #[test]
    fn there_is_room_for_a_bounded_number_of_clients() {
        let (_dir, path) = daemon();
        let idle: Vec<_> = (0..CLIENTS_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
        // The connections are counted as they are taken, in order: this one is the last.
        assert!(raw(&path, b"{\"op\":\"version\"}\n").contains("\"kind\":\"busy\""));
        drop(idle);
    }
}
