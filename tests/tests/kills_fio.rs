//! kill -9 of the serving core under fio.

use std::time::Instant;

use everdisk_tests::{
    fio::{Job, Load},
    host::Host,
    processes,
    status::percentiles,
};

/// For each of the four loads.
const ROUNDS: u64 = 22;

/// D3 D10: through 116 deaths of the serving core, some of them without a standby, applications see no error.
#[test]
fn d3_d10_a_hundred_kills_of_the_core_under_fio_verify_show_no_error_and_no_mismatch() {
    let host = Host::new();
    let volume = host.volume("v", "256M");
    let (mut kills, mut gaps) = (0, Vec::new());
    for job in Job::matrix() {
        let mut load = Load::start(&job, &volume.path);
        for round in 0..ROUNDS {
            let before = volume.settled();
            let began = Instant::now();
            let after = volume.kill_core();
            gaps.push(u64::try_from(began.elapsed().as_millis()).unwrap());
            kills += 1;
            assert_eq!(after.core(), before.standby(), "the standby takes over: {before:?} {after:?}");
            assert!(after.generation() > before.generation(), "{after:?}");
            if round % 3 == 0 {
                // Twice in a row: the core that took over dies at once, perhaps with no standby behind it.
                volume.kill_core();
                kills += 1;
            }
            load.check();
            assert_eq!(volume.status().crashes(), kills);
        }
        let ios = load.stop();
        println!("{job:?}: {ios} I/Os verified through {ROUNDS} rounds of kills");
    }
    println!("{kills} kills; ms from the signal to a status that shows the next core: {}", percentiles(gaps));
    assert!(kills >= 100);
    volume.settled();
    volume.detach();
}

/// D3: a core that stops (SIGSTOP) and then dies, with requests in its hands.
#[test]
fn d3_a_core_that_hangs_is_killed_and_what_it_had_read_is_done_by_the_next() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = everdisk_tests::load::Load::start(&volume, 4);
    for _ in 0..5 {
        load.goes_on(200);
        let pid = volume.settled().core().unwrap();
        let frozen = processes::freeze(pid);
        // Its requests hang: with four threads and no core that answers, the count comes to rest.
        let mut last = load.operations();
        everdisk_tests::wait::until_true("the I/O comes to rest", || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let now = load.operations();
            std::mem::replace(&mut last, now) == now
        });
        processes::kill(pid);
        drop(frozen);
        load.goes_on(200);
    }
    load.stop();
}
