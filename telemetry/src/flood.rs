//! One line a second from each place in a program, with the number of those that were left out: what a client can have us write is
//! bounded, however often it tries. A line with an `event` is told every time: there is one for what happened, not for each try.

use std::{
    collections::HashMap,
    fmt,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tracing::{Event, Level, Subscriber, callsite::Identifier, field::Visit};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// Between two lines from one place.
const PAUSE: Duration = Duration::from_secs(1);

/// Formats lines as `F` does, those that are not too many.
pub(crate) struct Flood<F> {
    inner: F,
    places: Mutex<HashMap<Identifier, CallSite>>,
}

/// What a place has written.
#[derive(Debug)]
struct CallSite {
    since: Instant,
    left_out: u64,
}

impl<F> Flood<F> {
    pub(crate) fn new(inner: F) -> Self {
        Self { inner, places: Mutex::default() }
    }

    /// Whether a line may be written now, and how many before it were not.
    fn admit(&self, place: Identifier, now: Instant) -> Option<u64> {
        let mut places = self.places.lock();
        let Some(seen) = places.get_mut(&place) else {
            places.insert(place, CallSite { since: now, left_out: 0 });
            return Some(0);
        };
        if now.saturating_duration_since(seen.since) < PAUSE {
            seen.left_out += 1;
            return None;
        }
        seen.since = now;
        Some(std::mem::take(&mut seen.left_out))
    }
}

/// Finds out whether the field `event` is there.
struct HasEvent(bool);

impl Visit for HasEvent {
    fn record_debug(&mut self, field: &tracing::field::Field, _: &dyn fmt::Debug) {
        self.0 |= field.name() == "event";
    }
}

impl<S, N, F> FormatEvent<S, N> for Flood<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut has_event = HasEvent(false);
        event.record(&mut has_event);
        // A user who asks for more than the default level usually wants all of it.
        if has_event.0 || *event.metadata().level() > Level::INFO {
            return self.inner.format_event(ctx, writer, event);
        }
        match self.admit(event.metadata().callsite(), Instant::now()) {
            None => Ok(()),
            Some(0) => self.inner.format_event(ctx, writer, event),
            Some(left_out) => {
                let mut line = String::new();
                self.inner.format_event(ctx, Writer::new(&mut line), event)?;
                writeln!(writer, "{} left_out={left_out}", line.trim_end())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Write},
        sync::Arc,
    };

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_flood_is_a_line_a_second_with_a_count_and_events_are_all_told() {
        let lines = Lines::default();
        let written = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || written.clone())
            .event_format(Flood::new(tracing_subscriber::fmt::format()))
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let began = Instant::now();
            while began.elapsed() < PAUSE * 5 / 2 {
                tracing::info!("nonsense");
            }
            (0..5).for_each(|n| tracing::info!(event = "crash", n, "a core has died"));
        });
        let text = String::from_utf8(lines.0.lock().clone()).unwrap();
        assert_eq!(text.matches("nonsense").count(), 3, "{text}");
        assert_eq!((text.matches("left_out=").count(), text.matches("crash").count()), (2, 5), "{text}");
    }
}
