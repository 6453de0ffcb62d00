//! The client's side of the control socket.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;

use crate::{
    answer::{Line, Progress, Refusal},
    request::Request,
};

/// The control module sends a line at least every second. After this silence the client gives up.
pub const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process listens.
    #[error(
        "everdiskd is not running (no answer at {}): start it with `everdisk daemon` or your service manager, or give the right --run-dir",
        path.display()
    )]
    NotRunning {
        /// The control socket.
        path: PathBuf,
    },
    /// The socket is there and cannot be used.
    #[error("cannot talk to everdiskd at {}: {source}", path.display())]
    Socket {
        /// The control socket.
        path: PathBuf,
        /// The operating system's word.
        source: io::Error,
    },
    /// It ended or went silent in the middle.
    #[error(
        "everdiskd stopped answering ({0}); what it was doing goes on or is taken up when it is started again: see `everdisk status`"
    )]
    Lost(String),
    /// The answer is none.
    #[error(
        "everdiskd sent an unexpected answer ({0}): check with `everdisk version` that it has the version of this command"
    )]
    Strange(serde_json::Error),
    /// It refused or failed.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// Sends `request` and waits for the end of its answer; every progress line goes to `watch`.
///
/// # Errors
/// [`ClientError`].
pub fn ask(socket: &Path, request: &Request, mut watch: impl FnMut(&Progress)) -> Result<Value, ClientError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            ClientError::NotRunning { path: socket.to_owned() }
        }
        _ => ClientError::Socket { path: socket.to_owned(), source },
    };
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(SILENCE_MAX)).map_err(failed)?;
    stream.set_write_timeout(Some(SILENCE_MAX)).map_err(failed)?;
    let mut line = serde_json::to_vec(request).map_err(ClientError::Strange)?;
    line.push(b'\n');
    // A daemon that refuses closes without reading: its answer says more than the broken pipe.
    let sent = stream.write_all(&line);
    let mut reader = BufReader::new(stream);
    let mut text = String::new();
    loop {
        text.clear();
        match reader.read_line(&mut text) {
            Ok(0) => {
                return Err(match sent {
                    Err(source) => ClientError::Socket { path: socket.to_owned(), source },
                    Ok(()) => ClientError::Lost("it closed the connection".to_owned()),
                });
            }
            Ok(_) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Err(ClientError::Lost(format!("nothing for {} s", SILENCE_MAX.as_secs())));
            }
            Err(e) => return Err(ClientError::Lost(e.to_string())),
        }
        match serde_json::from_str(&text).map_err(ClientError::Strange)? {
            Line::Progress(progress) => watch(&progress),
            Line::Ok(value) => return Ok(value),
            Line::Error(refusal) => return Err(refusal.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, thread};

    use super::*;
    use crate::answer::Kind;

    fn scripted(answer: &'static str) -> Result<Value, ClientError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            line
        });
        let mut steps = 0;
        let result = ask(&path, &Request::Version, |_| steps += 1);
        assert_eq!(server.join().unwrap(), "{\"op\":\"version\"}\n");
        assert_eq!(steps, answer.matches("progress").count());
        result
    }

    #[test]
    fn answers_of_every_kind() {
        let ok = scripted("{\"progress\":{\"step\":\"a\",\"elapsed_ms\":1}}\n{\"ok\":5}\n").unwrap();
        assert_eq!(ok, Value::from(5));
        let refused = scripted("{\"error\":{\"kind\":\"busy\",\"message\":\"later\"}}\n").unwrap_err();
        assert!(matches!(refused, ClientError::Refused(Refusal { kind: Kind::Busy, .. })));
        assert!(matches!(scripted("").unwrap_err(), ClientError::Lost(_)));
        assert!(matches!(scripted("hello\n").unwrap_err(), ClientError::Strange(_)));
    }

    #[test]
    fn nobody_there() {
        let dir = tempfile::tempdir().unwrap();
        let error = ask(&dir.path().join("s"), &Request::Version, |_| {}).unwrap_err();
        assert!(error.to_string().starts_with("everdiskd is not running"), "{error}");
    }
}
