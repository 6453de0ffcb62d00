//! Upgrades back and forth under fio (M1, M4, M5, M9, M10), by either hand-over policy.

use everdisk_tests::{
    fio::{Job, Load},
    host::Host,
    programs::{VERSION, VERSION_NEXT, core, core_next},
    status::percentiles,
};

/// For each of the four loads.
const UPGRADES: u64 = 26;

/// M1 M4 M5 M9 M10, M2, beyond 3: I/O that arrives during 104 upgrades between two different cores is held, processed
/// afterwards, and never wrong, whether what is buffered is sent before or carried over.
#[test]
fn m1_m4_m5_a_hundred_upgrades_under_fio_verify_show_no_error_and_no_mismatch() {
    let host = Host::new();
    let volume = host.volume("v", "256M");
    let mut generation = volume.status().generation();
    let (mut suspended, mut drained, mut held, mut carried) = (Vec::new(), Vec::new(), 0, 0);
    for job in Job::matrix() {
        let mut load = Load::start(&job, &volume.path);
        for turn in 0..UPGRADES {
            let (program, from, to) =
                if turn % 2 == 0 { (core_next(), VERSION, VERSION_NEXT) } else { (core(), VERSION_NEXT, VERSION) };
            let handover = if turn % 4 < 2 { "carry" } else { "flush" };
            let report = volume.upgrade_by(handover, &program);
            carried += report.0["carried_bytes"].as_u64().unwrap_or(0);
            load.check();
            assert_eq!((report.0["from"].as_str(), report.0["to"].as_str()), (Some(from), Some(to)), "{report:?}");
            let status = volume.status();
            assert_eq!(status.version(), to, "{status:?}");
            assert_eq!(status.last_outcome(), Some("committed"), "{status:?}");
            assert!(status.generation() > generation, "{} is not past {generation}", status.generation());
            assert_eq!(status.crashes(), 0, "{status:?}");
            generation = status.generation();
            suspended.push(report.suspended_us().expect("the time of the suspension"));
            drained.push(report.0["drained_us"].as_u64().expect("the time of the drain"));
            held += report.0["requests_held"].as_u64().unwrap_or(0);
        }
        let ios = load.stop();
        println!("{job:?}: {ios} I/Os verified through {UPGRADES} upgrades");
    }
    assert_eq!(volume.status().0["last_upgrade"]["upgrade"].as_u64(), Some(4 * UPGRADES));
    println!("suspended_us {}", percentiles(suspended));
    println!("drained_us   {}; {held} requests were held", percentiles(drained));
    println!("{carried} bytes were carried over");
    assert!(carried > 0, "no upgrade by carry met buffered data");
    assert!(held > 0, "no upgrade met a request: the load was none");
    volume.detach();
}
