//! An invariant that does not hold ends the core, loudly, and costs no application an error (D15).

use everdisk_tests::{bytes::pattern, faults::Faults, host::Host, load::Load, wait::until};
use rustix::fs::SeekFrom;

const MIB: u64 = 1 << 20;

/// A store breaks its contract, which only a defect of ours can cause: a search forward reports something before its start. The core
/// says so with file and line and ends; the standby answers the request that was under way, and goes on with the load.
#[test]
fn d15_a_core_that_finds_an_invariant_broken_says_so_ends_and_is_succeeded_without_an_error() {
    let host = Host::faulty();
    let volume = host.create_with("v", "64M", 1, &["--buffer", "8M"]);
    volume.attach(&[]);
    let file = volume.open();
    std::os::unix::fs::FileExt::write_all_at(&file, &pattern(1, 4096), 32 * MIB).unwrap();
    file.sync_data().unwrap();
    let load = Load::start(&volume, 1);
    load.goes_on(20);
    let before = volume.settled();
    let faults = Faults::new(&volume);
    faults.set("read astray");
    assert_eq!(rustix::fs::seek(&file, SeekFrom::Data(32 * MIB)), Ok(32 * MIB), "the successor's answer");
    load.goes_on(50);
    let after = volume.settled();
    assert_eq!(after.core(), before.standby(), "{after:?}");
    let words = ["core_crashed", &format!("pid={} ", before.core().unwrap()), "signal: 6"];
    until("the crash in the daemon's log", || (host.logged(&words).len() == 1).then_some(()));
    let logs = (0..16).map(|n| host.volume_run("v").join(format!("core-{n}.log")));
    let texts: String = logs.filter_map(|path| std::fs::read_to_string(path).ok()).collect();
    assert_eq!(texts.matches("panicked at core/engine/src/engine.rs:").count(), 1, "{texts}");
    assert!(texts.contains("a store searches forward"), "{texts}");
    load.stop();
    drop(file);
    volume.detach();
}
