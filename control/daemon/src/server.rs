//! The control socket.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::{
        fd::AsFd,
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use everdisk_api::{
    answer::{Kind, Line, Refusal},
    request::{REQUEST_BYTES_MAX, Request},
};
use everdisk_sys::packet;
use parking_lot::Mutex;
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
/// Clients at a time. One more is served in the place of the client that has been silent for longest; when every client has
/// sent its request, the one more is refused.
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
    let clients = Arc::new(Clients::default());
    for (number, connection) in (0..).zip(listener.incoming()) {
        let stream = match connection {
            Ok(stream) => stream,
            Err(e) => {
                // Out of descriptors, most likely; others will be closed.
                warn!("cannot take a connection: {e}");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let place = Place::take(&clients, number, &stream);
        let catalogue = Arc::clone(catalogue);
        let spawned = thread::Builder::new().name("client".to_owned()).spawn(move || match place {
            Ok(place) => answer(stream, &place, &catalogue),
            Err(refusal) => refuse(stream, refusal),
        });
        if let Err(e) = spawned {
            warn!("cannot start a thread: {e}");
        }
    }
}

/// The clients that have a place, keyed by number, in order of arrival. A client is silent until its request has arrived. Until
/// then its stream is kept here, so that the client can be told to leave.
#[derive(Default)]
struct Clients(Mutex<BTreeMap<u64, Option<UnixStream>>>);

/// One of the places for clients, until it is dropped.
struct Place {
    clients: Arc<Clients>,
    number: u64,
}

impl Place {
    /// A place for `stream`. When there is none, the client that has been silent for longest loses its own: clients that say
    /// nothing keep nobody out.
    ///
    /// # Errors
    /// Every client has sent its request; or the stream cannot be duplicated.
    fn take(clients: &Arc<Clients>, number: u64, stream: &UnixStream) -> Result<Self, Refusal> {
        let busy = |why: String| Refusal::new(Kind::Busy, format!("{why}: try again"));
        let silent = stream.try_clone().map_err(|e| busy(format!("out of descriptors ({e})")))?;
        let mut places = clients.0.lock();
        if places.len() >= CLIENTS_MAX {
            let first = places.iter().find_map(|(number, silent)| Some((*number, silent.as_ref()?)));
            let (first, silent) =
                first.ok_or_else(|| busy(format!("{CLIENTS_MAX} clients are being served already")))?;
            // Its thread reads the end of the stream. The client may have gone by itself.
            let _ = silent.shutdown(Shutdown::Read);
            places.remove(&first);
        }
        places.insert(number, Some(silent));
        Ok(Self { clients: Arc::clone(clients), number })
    }

    /// The client is not silent any more: its request has come, or never will. False when it has lost its place.
    fn keep(&self) -> bool {
        self.clients.0.lock().get_mut(&self.number).map(Option::take).is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clients.0.lock().remove(&self.number);
    }
}

fn answer(stream: UnixStream, place: &Place, catalogue: &Catalogue) {
    let Ok(reader) = stream.try_clone() else { return };
    if stream.set_write_timeout(Some(WRITE_WITHIN)).is_err() {
        return;
    }
    let request = admit(&stream).and_then(|who| Ok((who, read_request(reader)?)));
    let request = if place.keep() {
        request
    } else {
        let why = format!("no request came, and more than {CLIENTS_MAX} clients are connected: try again");
        Err(Refusal::new(Kind::Busy, why))
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
    fn a_client_that_says_nothing_gives_its_place_to_the_next_one() {
        let (_dir, path) = daemon();
        let mut silent: Vec<_> = (0..CLIENTS_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
        // The connections are taken in order: this one is the last.
        assert!(raw(&path, b"{\"op\":\"version\"}\n").contains("\"version\""));
        let mut text = String::new();
        silent[0].read_to_string(&mut text).unwrap();
        assert!(text.contains("\"kind\":\"busy\"") && text.contains("no request came"), "{text}");
        // The others have theirs still.
        let last = &mut silent[CLIENTS_MAX - 1];
        last.write_all(b"{\"op\":\"version\"}\n").unwrap();
        text.clear();
        last.read_to_string(&mut text).unwrap();
        assert!(text.contains("\"version\""), "{text}");
    }

    #[test]
    fn there_is_room_for_a_bounded_number_of_requests() {
        let clients = Arc::new(Clients::default());
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let take = |number: usize| Place::take(&clients, number as u64, &ours);
        let mut places: Vec<_> = (0..CLIENTS_MAX).map(|number| take(number).ok().unwrap()).collect();
        assert!(places.iter().all(Place::keep));
        let refusal = take(CLIENTS_MAX).err().unwrap();
        assert!(refusal.to_string().contains("clients are being served already"), "{refusal}");
        places.pop();
        places.push(take(CLIENTS_MAX + 1).ok().unwrap());
        assert_eq!(clients.0.lock().len(), CLIENTS_MAX);
        // The one that is silent leaves, and its end does not free the place that another has now.
        let next = take(CLIENTS_MAX + 2).ok().unwrap();
        assert!(!places.pop().unwrap().keep());
        assert_eq!(clients.0.lock().len(), CLIENTS_MAX);
        drop((places, next));
        assert!(clients.0.lock().is_empty());
    }
}
