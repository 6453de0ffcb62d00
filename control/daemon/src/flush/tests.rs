use std::{
    io::{BufRead, BufReader},
    os::unix::net::UnixStream,
    sync::Arc,
};

use everdisk_proto::frame::{CoreAnswer, CoreRequest};

use super::*;
use crate::{fake, volume::tests::volume};

/// A volume with a write buffer that a core with this process id serves.
fn served(root: &std::path::Path, pid: u32) -> (Arc<Volume>, fake::Interface) {
    let volume = volume(root);
    let interface = fake::Interface::start(&volume);
    interface.set(|status| {
        status.serving = Some(pid);
        status.buffer = Some(fake::buffer(5 << 20));
    });
    (volume, interface)
}

const SHORT: Patience = Patience::Whole(Duration::from_millis(100));

fn limits(core: &fake::Core) -> Vec<u64> {
    let limit = |request: &CoreRequest| match request {
        CoreRequest::Flush { limit_ms } => Some(*limit_ms),
        _ => None,
    };
    core.asked().iter().filter_map(limit).collect()
}

#[test]
fn asks_get_longer_until_everything_is_durable_and_what_is_left_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, _interface) = served(dir.path(), 7);
    let mut left = 3;
    let core = fake::Core::start(&volume, 7, move |_| {
        left -= 1;
        // The last is slower than a beat of the heart.
        thread::sleep(if left == 0 { Duration::from_millis(1200) } else { Duration::ZERO });
        Some(if left == 0 { CoreAnswer::Flushed } else { CoreAnswer::Flushing { buffered_bytes: (left << 20) + 1 } })
    });
    let (ours, theirs) = UnixStream::pair().unwrap();
    let progress = Progress::new(ours);
    let heart = progress.heartbeat();
    flush(&volume, Patience::OPERATOR, &progress).unwrap();
    assert_eq!(limits(&core), [250, 500, 1000]);
    drop((heart, progress));
    let told: Vec<String> = BufReader::new(theirs).lines().map(Result::unwrap).collect();
    assert!(told.iter().any(|line| line.contains("flush, 5 MiB left")), "by the interface, while it waits: {told:?}");
}

#[test]
fn a_flush_that_fails_or_takes_too_long_says_that_the_data_is_kept_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, _interface) = served(dir.path(), 7);
    let failing = fake::Core::start(&volume, 7, |_| Some(CoreAnswer::Failed { reason: "node a is full".to_owned() }));
    let told = flush(&volume, Patience::OPERATOR, &Progress::silent()).unwrap_err().to_string();
    assert!(told.contains("v could not be flushed: node a is full; 5 MiB are kept"), "{told}");
    assert!(!told.contains("nothing is lost"), "that is more than is known: {told}");
    assert!(told.contains("everdisk status v"), "{told}");
    drop(failing);

    let slow = |_: &CoreRequest| Some(CoreAnswer::Flushing { buffered_bytes: 2 << 20 });
    let _slow = fake::Core::start(&volume, 7, slow);
    let told = flush(&volume, SHORT, &Progress::silent()).unwrap_err().to_string();
    assert!(told.contains("not done within 100ms, 2 MiB are left"), "{told}");
}

/// A node that takes a little at a time is waited for, longer than one that takes nothing.
#[test]
fn patience_is_measured_from_the_last_progress() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, _interface) = served(dir.path(), 7);
    let patience = Patience::Still(Duration::from_secs(1));
    for ends in [true, false] {
        let mut left = 6;
        let began = Instant::now();
        let _core = fake::Core::start(&volume, 7, move |_| {
            thread::sleep(Duration::from_millis(300));
            left -= u64::from(ends || left > 1);
            Some(if left == 0 { CoreAnswer::Flushed } else { CoreAnswer::Flushing { buffered_bytes: left << 20 } })
        });
        let ended = flush(&volume, patience, &Progress::silent());
        assert!(began.elapsed() > Duration::from_millis(1500));
        assert_eq!(ended.is_ok(), ends);
        let told = ended.map_or_else(|e| e.to_string(), |()| String::new());
        assert!(ends || told.contains("nothing more was sent for 1s, 1 MiB are left"), "{told}");
    }
}

#[test]
fn a_core_that_hangs_is_asked_once_and_a_flush_that_is_not_wanted_any_more_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, _interface) = served(dir.path(), 7);
    let core = fake::Core::start(&volume, 7, |_| {
        thread::sleep(Duration::from_secs(60));
        None
    });
    let began = Instant::now();
    let told =
        flush(&volume, Patience::Whole(Duration::from_millis(600)), &Progress::silent()).unwrap_err().to_string();
    assert!(told.contains("not done within 600ms, 5 MiB are left"), "{told}");
    assert_eq!(limits(&core), [250]);
    let unwanted = send(&volume, Patience::OPERATOR, &Progress::silent(), &|| true).unwrap_err();
    assert!(unwanted.to_string().contains("stopped"), "{unwanted}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[test]
fn the_core_that_serves_after_the_death_of_the_first_ends_the_flush() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, interface) = served(dir.path(), 7);
    let interface = Arc::new(interface);
    let heir = Arc::clone(&interface);
    let dying = fake::Core::start(&volume, 7, move |_| {
        heir.set(|status| status.serving = None);
        None
    });
    let next = fake::Core::start(&volume, 8, |_| Some(CoreAnswer::Flushed));
    let late = Arc::clone(&interface);
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        late.set(|status| status.serving = Some(8));
    });
    flush(&volume, Patience::OPERATOR, &Progress::silent()).unwrap();
    assert_eq!((limits(&dying).len(), limits(&next).len()), (1, 1));
    interface.set(|status| status.serving = None);
    assert!(matches!(flush(&volume, Patience::OPERATOR, &Progress::silent()), Err(Error::State(_))));
}

#[test]
fn writes_go_through_while_it_is_wanted_and_only_where_there_is_a_buffer() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, interface) = served(dir.path(), 7);
    let through = Synchronous::begin(&volume).unwrap();
    assert!(interface.status().buffer.unwrap().synchronous);
    drop(through);
    assert_eq!(interface.modes(), [true, false]);
    Synchronous::begin(&volume).unwrap().keep();
    assert_eq!(interface.modes(), [true, false, true]);
    interface.set(|status| status.buffer = None);
    drop(Synchronous::begin(&volume).unwrap());
    assert_eq!(interface.modes().len(), 3);
}
