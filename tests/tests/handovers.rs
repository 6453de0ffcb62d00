//! The hand-over policies, and what happens to buffered data that is damaged or cannot be sent.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::{buffer::Geometry, segment::SEGMENT_BYTES};
use everdisk_testkit::at_end::at_end;
use everdisk_tests::{
    bytes::pattern,
    faults::Faults,
    host::Host,
    processes,
    programs::core_without_buffer,
    status::Status,
    volume::{Volume, report},
};
use rustix::io::Errno;

const BLOCK: usize = 4096;
/// Where the scattered blocks begin.
const SCATTERED: u64 = 16 << 20;
const HUNG: &str = "write hang\nflush hang";

fn host() -> Host {
    let host = Host::faulty();
    host.create_with("v", "128M", 2, &["--buffer", "32M"]).attach(&[]);
    host
}

/// Every second block of a range, so that none can be sent together with another.
fn scatter(file: &File, from: u64, blocks: u64) {
    for block in 0..blocks {
        file.write_all_at(&pattern(block, BLOCK), from + 2 * block * BLOCK as u64).unwrap();
    }
}

fn is_there(file: &File, from: u64, blocks: u64) {
    let mut found = vec![0; BLOCK];
    for block in 0..blocks {
        file.read_exact_at(&mut found, from + 2 * block * BLOCK as u64).unwrap();
        assert!(found == pattern(block, BLOCK), "block {block} of {from}");
    }
}

/// M2 M3 M7 M8: the upgrade instruction has the buffered data sent to the storage nodes before the suspension, while I/O goes
/// on. Until then writes go through, so the buffered data only shrinks; at the switch nothing of it is left.
#[test]
fn m2_m3_m7_m8_buffered_data_is_sent_before_the_suspension_while_writes_go_through() {
    let host = host();
    let volume = Volume::new(&host, "v");
    let faults = Faults::new(&volume);
    let file = volume.open();
    faults.set("write delay_us=20000");
    scatter(&file, SCATTERED, 1500);
    let before = volume.status();
    assert_eq!(before.mode(), "write-back");
    assert!(before.buffered() >= 1400 * BLOCK as u64, "{before:?}");

    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let (output, shrinking, went_on) = thread::scope(|scope| {
        let _let_go = at_end(|| stop.store(true, SeqCst));
        // No client flushes: the upgrade has the data sent.
        let writer = scope.spawn(|| {
            while !stop.load(SeqCst) {
                let block = written.load(SeqCst);
                file.write_all_at(&pattern(block, BLOCK), (block % 1000) * BLOCK as u64).unwrap();
                written.store(block + 1, SeqCst);
            }
        });
        let core = host.core_next();
        let upgrade = volume.upgrading(&core, &["--handover", "flush", "--soak", "0s"]);
        let (mut shrinking, mut went_on) = (Vec::new(), 0);
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            let seen = written.load(SeqCst);
            let status = volume.status();
            if status.mode() == "synchronous" {
                shrinking.push(status.buffered());
                went_on += written.load(SeqCst) - seen;
            } else if !shrinking.is_empty() {
                break;
            }
        }
        let output = upgrade.end(Duration::from_secs(30));
        stop.store(true, SeqCst);
        writer.join().unwrap();
        (output, shrinking, went_on)
    });
    let report = report(&output);
    assert_eq!((output.code(), report.outcome()), (0, "committed"), "{report:?} {}", output.stderr);
    println!("buffered bytes in synchronous mode: {shrinking:?}; {went_on} writes during the upgrade");
    assert!(shrinking.len() >= 3, "the synchronous mode was hardly seen: {shrinking:?}");
    assert!(shrinking.windows(2).all(|pair| pair[1] <= pair[0]), "the buffer grew: {shrinking:?}");
    assert!(went_on > 0, "no write was done while the buffer was sent");
    assert_eq!(report.0["handover"].as_str(), Some("flush"), "{report:?}");
    assert!(
        report.0["buffered_bytes"].as_u64().unwrap() > 0 && report.0["flush_ms"].as_u64().unwrap() > 0,
        "{report:?}"
    );
    assert_eq!(report.0["carried_bytes"].as_u64(), Some(0), "{report:?}");
    let step = |name: &str| report.steps().iter().position(|step| *step == name).unwrap();
    assert!(step("flush") < step("suspend"), "{report:?}");
    assert_eq!(volume.settled().mode(), "write-back", "the next core buffers again");
    faults.clear();
    is_there(&file, SCATTERED, 1500);
    let mut found = vec![0; BLOCK];
    let written = written.load(SeqCst);
    for block in written.saturating_sub(1000)..written {
        file.read_exact_at(&mut found, (block % 1000) * BLOCK as u64).unwrap();
        assert!(found == pattern(block, BLOCK), "block {block} of the writer");
    }
    drop(file);
    volume.detach();
}

/// D5, beyond 4: a flush that does not end in time becomes a hand-over by carry, and the report says so.
#[test]
fn d5_a_flush_that_takes_too_long_becomes_a_carry() {
    let host = host();
    let volume = Volume::new(&host, "v");
    let faults = Faults::new(&volume);
    let file = volume.open();
    for (text, limit) in [(HUNG, "500ms"), ("write fail=EIO", "10s"), ("flush fail=EIO", "10s")] {
        faults.set(text);
        scatter(&file, 0, 300);
        let core = volume.other_core();
        let output = volume.try_upgrade(&core, &["--soak", "0s", "--handover", "flush", "--flush-limit", limit]);
        let report = report(&output);
        assert_eq!((output.code(), report.outcome()), (0, "committed"), "{report:?} {}", output.stderr);
        assert_eq!(report.0["handover"].as_str(), Some("carry"), "{report:?}");
        assert_eq!(report.0["handover_asked"].as_str(), Some("flush"), "{report:?}");
        assert!(!report.0["notes"].as_array().unwrap().is_empty(), "{report:?}");
        assert_eq!(volume.settled().mode(), "write-back");
        is_there(&file, 0, 300);
        faults.clear();
        if text.starts_with("flush") {
            // The upgrade's flush failed: the application is told of it at its own next one (semantics 7).
            file.sync_all().unwrap_err();
        }
        file.sync_all().unwrap();
    }
    drop(file);
    volume.detach();
}

/// D4, D5: a core that cannot adopt the buffer gets the volume only when the buffer is empty; else the old core serves on, and
/// buffers again.
#[test]
fn d4_a_core_that_cannot_adopt_the_buffer_gets_the_volume_only_without_buffered_data() {
    let host = host();
    let volume = Volume::new(&host, "v");
    let faults = Faults::new(&volume);
    let file = volume.open();
    let old = core_without_buffer(host.root());
    scatter(&file, 0, 100);
    let refused = volume.upgrade_fails(&old, &["--soak", "0s", "--handover", "carry"], "aborted", &["buffer", "flush"]);
    assert_eq!(refused.0["failed_step"].as_str(), Some("verify"), "{refused:?}");
    faults.set(HUNG);
    scatter(&file, 0, 100);
    let options = ["--soak", "0s", "--handover", "flush", "--flush-limit", "500ms"];
    volume.upgrade_fails(&old, &options, "aborted", &[]);
    let status = volume.settled();
    assert_eq!((status.mode(), status.last_outcome()), ("write-back", Some("aborted")), "{status:?}");
    scatter(&file, 1 << 24, 100);
    faults.clear();
    let output = volume.try_upgrade(&old, &options);
    let report = report(&output);
    assert_eq!((output.code(), report.outcome()), (0, "committed"), "{report:?} {}", output.stderr);
    assert_eq!(report.0["carried_bytes"].as_u64(), Some(0), "{report:?}");
    is_there(&file, 0, 100);
    is_there(&file, 1 << 24, 100);
    drop(file);
    volume.detach();
}

/// The volume's segment, by the interface's descriptor of it.
fn segment(status: &Status) -> File {
    let directory = format!("/proc/{}/fd", status.interface().unwrap());
    let is_segment = |path: &std::path::Path| {
        std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:everdisk-segment"))
    };
    let mut entries = std::fs::read_dir(directory).unwrap().flatten().map(|entry| entry.path());
    let path = entries.find(|path| is_segment(path)).expect("the segment's descriptor");
    File::options().read(true).write(true).open(path).unwrap()
}

/// D5, beyond 8: the core dies, and some of what it had buffered is damaged. The next core reports it, serves the rest, gives an
/// error for what is lost, and none any more once it is written anew.
#[test]
fn d5_damaged_buffered_data_is_reported_and_never_served() {
    let host = host();
    let volume = Volume::new(&host, "v");
    let faults = Faults::new(&volume);
    let file = volume.open();
    file.sync_all().unwrap();
    faults.set(HUNG);
    // The standby does not verify again what it has read and verified before the damage. So it is frozen and reads nothing.
    let standby = processes::freeze(volume.settled().standby().unwrap());
    scatter(&file, 0, 64);
    let data_start = SEGMENT_BYTES as u64 + Geometry::new(32 << 20).data_start();
    let memory = segment(&volume.status());
    // One byte of the tenth block, wherever it lies in the ring.
    let mut ring = vec![0; 1 << 20];
    memory.read_exact_at(&mut ring, data_start).unwrap();
    let wanted = pattern(10, BLOCK);
    let at = ring.windows(BLOCK).position(|window| window == wanted).expect("the tenth block in the ring") + 77;
    memory.write_all_at(&[!ring[at]], data_start + at as u64).unwrap();
    drop(standby);

    volume.kill_core();
    let status = volume.settled();
    assert_eq!(status.0["damaged_ranges"].as_u64(), Some(1), "{status:?}");
    assert!(status.0["reason"].as_str().unwrap_or("").contains("damaged"), "{status:?}");
    let offset = |block: u64| 2 * block * BLOCK as u64;
    let read = |block| file.read_exact_at(&mut [0; BLOCK], offset(block)).map_err(|e| Errno::from_io_error(&e));
    assert_eq!(read(10), Err(Some(Errno::IO)));
    is_there(&file, 0, 10);
    is_there(&file, offset(11), 0);
    assert_eq!(read(11), Ok(()));
    faults.clear();
    let error: io::Error = file.sync_all().expect_err("what was acknowledged is not durable");
    assert_eq!(Errno::from_io_error(&error), Some(Errno::IO));
    volume.ask("flush", &[]).refused(1, &["damaged"]);
    // The next core knows it as well.
    volume.kill_core();
    assert_eq!(read(10), Err(Some(Errno::IO)));
    file.write_all_at(&pattern(10, BLOCK), offset(10)).unwrap();
    file.sync_all().unwrap();
    is_there(&file, 0, 64);
    assert_eq!(volume.settled().0["damaged_ranges"].as_u64(), Some(0));
    drop(file);
    volume.detach();
}

/// D5: a volume whose buffered data cannot be sent is not detached, and says where the data is. Once the node works again, it is detached.
#[test]
fn d5_a_detach_that_cannot_flush_keeps_the_volume_and_its_data() {
    let host = host();
    let volume = Volume::new(&host, "v");
    let faults = Faults::new(&volume);
    let file = volume.open();
    faults.set("write fail=EIO");
    scatter(&file, 0, 100);
    drop(file);
    volume.ask("detach", &[]).refused(1, &["write buffer", "--force"]);
    let status = volume.settled();
    assert_eq!((status.mode(), status.buffered()), ("write-back", 100 * BLOCK as u64), "{status:?}");
    let file = volume.open();
    is_there(&file, 0, 100);
    drop(file);
    faults.clear();
    volume.detach();
    volume.attach(&[]);
    is_there(&volume.open(), 0, 100);
    volume.detach();
}

/// beyond 2, beyond 9: the control module dies while the buffer is sent before a hand-over; the volume does not stay
/// synchronous.
#[test]
fn beyond9_m3_a_control_module_that_dies_in_a_flush_leaves_no_volume_synchronous() {
    let mut host = host();
    let name = "v";
    {
        let volume = Volume::new(&host, name);
        Faults::new(&volume).set("write delay_us=20000");
        scatter(&volume.open(), 0, 1500);
        let core = host.core_next();
        let upgrade = volume.upgrading(&core, &["--soak", "0s"]);
        volume.wait("synchronous mode", |status| status.mode() == "synchronous");
        processes::kill(host.daemon_pid());
        assert_ne!(upgrade.end(Duration::from_secs(10)).code(), 0, "its control module died");
    }
    host.kill_daemon();
    thread::sleep(Duration::from_millis(100));
    host.start_daemon();
    let volume = Volume::new(&host, name);
    volume.wait("write-back", |status| status.mode() == "write-back" && status.serves());
    Faults::new(&volume).clear();
    is_there(&volume.open(), 0, 1500);
    volume.settled();
    volume.detach();
}
