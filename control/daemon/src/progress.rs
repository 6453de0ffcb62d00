//! Tells the client the current step, and repeats it at least every second.

use std::{
    io::Write,
    os::unix::net::UnixStream,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use everdisk_api::answer;

use parking_lot::Mutex;

/// Interval at which a client gets a sign of life.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// The line to a client; a client that has gone is no reason to stop.
#[derive(Clone, Debug)]
pub struct Progress {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    stream: Option<UnixStream>,
    step: String,
    began: Instant,
}

impl Progress {
    /// Speaks on `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self::with(Some(stream))
    }

    /// Reports to no client.
    pub fn silent() -> Self {
        Self::with(None)
    }

    fn with(stream: Option<UnixStream>) -> Self {
        let shared = Shared { stream, step: "start".to_owned(), began: Instant::now() };
        Self { shared: Arc::new(Mutex::new(shared)) }
    }

    /// A step begins.
    pub fn step(&self, step: &str) {
        let mut shared = self.shared.lock();
        step.clone_into(&mut shared.step);
        shared.tell();
    }

    /// Changes the text of the step, from the next heartbeat on.
    pub fn amend(&self, step: String) {
        self.shared.lock().step = step;
    }

    /// Ends the answer.
    pub fn finish(&self, end: &answer::Line) {
        let mut shared = self.shared.lock();
        shared.send(end);
        shared.stream = None;
    }

    /// Repeats the step every second until the returned guard is dropped.
    pub fn heartbeat(&self) -> Heartbeat {
        let (stop, stopped) = mpsc::channel::<()>();
        let progress = self.clone();
        // Without a thread the step is not repeated, and the operation goes on.
        let _ = thread::Builder::new().spawn(move || {
            while stopped.recv_timeout(HEARTBEAT) == Err(mpsc::RecvTimeoutError::Timeout) {
                progress.shared.lock().tell();
            }
        });
        Heartbeat { _stop: stop }
    }
}

impl Shared {
    fn tell(&mut self) {
        let elapsed_ms = milliseconds(self.began.elapsed());
        let progress = answer::Progress { step: self.step.clone(), elapsed_ms };
        self.send(&answer::Line::Progress(progress));
    }

    fn send(&mut self, line: &answer::Line) {
        let Some(stream) = &mut self.stream else { return };
        let Ok(mut bytes) = serde_json::to_vec(line) else { return };
        bytes.push(b'\n');
        if stream.write_all(&bytes).is_err() {
            self.stream = None;
        }
    }
}

/// A time in the unit of messages and records.
pub fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).expect("no time here is longer than 500 million years")
}

/// The heart beats while this lives.
#[derive(Debug)]
pub struct Heartbeat {
    _stop: mpsc::Sender<()>,
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    #[test]
    fn steps_heartbeats_and_the_end_arrive_in_order() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let progress = Progress::new(ours);
        let heart = progress.heartbeat();
        progress.step("soak");
        let mut lines = BufReader::new(theirs).lines();
        assert!(lines.next().unwrap().unwrap().contains("soak"));
        assert!(lines.next().unwrap().unwrap().contains("soak"), "the heartbeat");
        progress.amend("soak, 3 left".to_owned());
        assert!(lines.next().unwrap().unwrap().contains("soak, 3 left"), "the heartbeat");
        drop(heart);
        progress.finish(&answer::Line::Ok(serde_json::Value::Null));
        assert_eq!(lines.next().unwrap().unwrap(), "{\"ok\":null}");
        assert!(lines.next().is_none());
    }

    #[test]
    fn a_client_that_went_away_stops_nothing() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let progress = Progress::new(ours);
        progress.step("a");
        progress.step("b");
    }
}
