//! What is promised of a volume with a write buffer, held against the deaths of its processes at any moment. The judge is
//! `promises`; it stands outside the client. A synchronous volume (`EVERDISK_TEST_BUFFER=0`) keeps the same promises.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use everdisk_tests::{
    buffer,
    bytes::{Random, pattern},
    faults::Faults,
    host::Host,
    processes,
    promises::{Loss, Plan, Promises, Workload},
    volume::Volume,
};

const NAME: &str = "v";

/// A host with a volume of this buffer, on storage nodes that obey.
fn host(wanted: &str) -> Host {
    let host = Host::faulty();
    host.create_with(NAME, "64M", 2, &["--buffer", &buffer::size(wanted)]).attach(&[]);
    host
}

fn volume(host: &Host) -> Volume<'_> {
    Volume::new(host, NAME)
}

/// Lets the load run for a random while: up to `most` operations.
fn a_while(load: &Workload, random: &mut Random, most: u64) {
    load.goes_on(1 + random.below(most));
}

/// kill -9 of the serving core, at whatever it is doing.
fn kill_core(volume: &Volume<'_>) -> Option<u32> {
    let core = volume.wait("a core serves", |status| status.serves()).core();
    processes::kill(core.unwrap());
    core
}

/// kill -9 of the serving core, and of its successor as soon as it serves: perhaps while it scans the buffer, perhaps with
/// no standby behind it.
fn kill_two_cores(volume: &Volume<'_>) {
    let first = kill_core(volume);
    let second = volume.wait("the next core serves", |status| status.serves() && status.core() != first);
    processes::kill(second.core().unwrap());
}

fn kill_interface(volume: &Volume<'_>) {
    let interface = volume.wait("an interface", |status| status.interface().is_some()).interface();
    processes::kill(interface.unwrap());
    volume.wait("a new interface", |status| status.serves() && status.interface() != interface);
}

/// Every process of the volume dies at once: with the segment goes what is in the buffer.
pub(crate) fn kill_all(volume: &Volume<'_>) {
    volume.wait("service", |status| status.serves());
    // The control module sees all of them gone, not the interface gone and a core still there, to which it would start
    // an interface that waits its 10 s in vain.
    let frozen = processes::freeze(volume.host.daemon_pid());
    let all: Vec<u32> = volume.processes().iter().map(|process| process.pid).collect();
    processes::kill_together(&all);
    drop(frozen);
    volume.wait("a clear state", |status| status.state() == "failed");
}

/// Attaches the volume again. No test here needs its standby, which comes later each time it dies early.
pub(crate) fn attach_again(volume: &Volume<'_>) {
    volume.try_attach(&[]).ok();
    volume.wait("service", |status| status.serves());
}

/// beyond 2, D5: the serving core dies again and again, half of the times its successor too as soon as it serves, at any
/// moment of writes, destage and flush: every read shows the last acknowledged write, and no application sees an error.
#[test]
fn beyond2_d5_no_acknowledged_write_is_lost_with_a_core_or_two_in_a_row() {
    let host = host("16M");
    let volume = volume(&host);
    for plan in [Plan::new(1), Plan::small(2)] {
        let mut random = Random::new(plan.seed);
        let promises = Promises::new(plan);
        clean(&volume, plan);
        let load = promises.start(&volume);
        for round in 0..16 {
            a_while(&load, &mut random, 1000);
            if round % 2 == 0 {
                kill_core(&volume);
            } else {
                kill_two_cores(&volume);
            }
            a_while(&load, &mut random, 100);
            volume.settled();
        }
        println!("{plan:?}: {} operations, {} fsyncs", load.stop(), promises.flushes());
    }
    volume.detach();
}

/// Makes the blocks of a plan as if they had never been written.
fn clean(volume: &Volume<'_>, plan: Plan) {
    use rustix::fs::FallocateFlags as F;
    rustix::fs::fallocate(volume.open(), F::PUNCH_HOLE | F::KEEP_SIZE, 0, plan.bytes()).unwrap();
}

/// beyond 2, D5: the same with storage nodes that are slow in turn to write, to flush, to read, so that the buffer is
/// dirty and a destage or a flush under way whenever a core dies; with a buffer that is full most of the time too.
#[test]
fn beyond2_d5_no_acknowledged_write_is_lost_when_cores_die_in_destage_and_in_flush() {
    let slowness =
        ["write delay_us=3000", "flush delay_us=40000", "write delay_us=500\nflush delay_us=5000\nread delay_us=200"];
    for (seed, size) in [(3, "16M"), (4, "2M")] {
        let host = host(size);
        let volume = volume(&host);
        let faults = Faults::new(&volume);
        let mut random = Random::new(seed);
        let promises = Promises::new(Plan::new(seed));
        let load = promises.start(&volume);
        for slow in slowness {
            faults.set(slow);
            for _ in 0..4 {
                a_while(&load, &mut random, 150);
                kill_core(&volume);
                a_while(&load, &mut random, 20);
                volume.settled();
            }
        }
        faults.clear();
        println!("buffer {size}: {} operations, {} fsyncs", load.stop(), promises.flushes());
        volume.detach();
        // What the detach has sent is all there is.
        attach_again(&volume);
        promises.check(&volume.open());
    }
}

/// beyond 2, beyond 4: the storage nodes hang in a write, or in a flush, and the core dies then; the next one is hung up as
/// well, and dies as well. When they answer again nothing is missing.
#[test]
fn beyond2_beyond4_no_acknowledged_write_is_lost_when_cores_die_on_hung_storage_nodes() {
    let host = host("16M");
    let volume = volume(&host);
    let faults = Faults::new(&volume);
    let promises = Promises::new(Plan::new(5));
    let load = promises.start(&volume);
    let mut random = Random::new(5);
    for hang in ["write hang", "flush hang", "write hang\nflush hang", "write hang"] {
        a_while(&load, &mut random, 500);
        volume.settled();
        faults.set(hang);
        kill_two_cores(&volume);
        faults.clear();
        a_while(&load, &mut random, 500);
    }
    println!("{} operations, {} fsyncs", load.stop(), promises.flushes());
    volume.settled();
    volume.detach();
}

/// 9, D5: the interface and the control module die, alone and with the core: the buffer stays with those that are left.
#[test]
fn beyond2_d5_no_acknowledged_write_is_lost_with_the_interface_or_the_control_module() {
    let mut host = host("16M");
    let faults = Faults::new(&volume(&host));
    faults.set("write delay_us=300");
    let promises = Promises::new(Plan::new(6));
    let load = promises.start(&volume(&host));
    let mut random = Random::new(6);
    for round in 0..15 {
        a_while(&load, &mut random, 400);
        volume(&host).settled();
        match round % 3 {
            0 => kill_interface(&volume(&host)),
            1 => {
                host.kill_daemon();
                a_while(&load, &mut random, 100);
                host.start_daemon();
            }
            _ => {
                let status = volume(&host).settled();
                processes::kill_together(&[status.interface().unwrap(), status.core().unwrap()]);
            }
        }
        a_while(&load, &mut random, 100);
    }
    println!("{} operations, {} fsyncs", load.stop(), promises.flushes());
    let volume = volume(&host);
    volume.settled();
    volume.detach();
}

/// D5, M2: upgrades there and back under the load, with storage nodes that are slow: what was acknowledged before, in and
/// after the hand-over is there.
#[test]
fn m2_d5_no_acknowledged_write_is_lost_in_upgrades() {
    let host = host("16M");
    let volume = volume(&host);
    let faults = Faults::new(&volume);
    faults.set("write delay_us=500");
    let promises = Promises::new(Plan::new(7));
    let load = promises.start(&volume);
    let mut random = Random::new(7);
    for round in 0..10 {
        a_while(&load, &mut random, 300);
        volume.settled();
        let report = volume.turn();
        // Half a ms for each write: a few MiB are sent in far less than the limit after which they would be carried over.
        assert_ne!(report.0["handover"].as_str(), Some("carry"), "round {round}: {report:?}");
        if round % 2 == 1 {
            kill_core(&volume);
        }
    }
    println!("{} operations, {} fsyncs", load.stop(), promises.flushes());
    volume.settled();
    volume.detach();
}

/// D5: interface and every core die at once, as the cache of a disk dies with the power. Attached again the volume holds
/// nothing older than what was acknowledged before the last acknowledged fsync began, and no block that is torn.
#[test]
fn d5_what_was_flushed_survives_the_death_of_every_process_and_the_order_across_a_flush_holds() {
    let host = host("16M");
    let volume = volume(&host);
    let faults = Faults::new(&volume);
    let promises = Promises::new(Plan::new(8));
    let mut random = Random::new(8);
    let mut all = Loss::default();
    for round in 0..12 {
        faults.set(["", "write delay_us=1000", "write delay_us=200\nflush delay_us=10000"][round % 3]);
        let load = promises.start(&volume);
        a_while(&load, &mut random, 800);
        kill_all(&volume);
        assert!(load.stop_with_errors() > 0, "no core is left to serve: applications see errors");
        faults.clear();
        attach_again(&volume);
        let loss = promises.check_after_loss(&volume.open());
        all = Loss { blocks: all.blocks + loss.blocks, of: all.of + loss.of };
    }
    println!("{} of {} blocks were older than acknowledged, {} fsyncs", all.blocks, all.of, promises.flushes());
    let load = promises.start(&volume);
    load.goes_on(500);
    load.stop();
    volume.detach();
}

/// D5: an fsync that was acknowledged means that the storage nodes have the data and were flushed after it.
#[test]
fn d5_an_acknowledged_fsync_means_durable_on_every_storage_node() {
    let host = Host::faulty();
    let volume = host.create_with(NAME, "64M", 1, &["--buffer", &buffer::size("16M")]);
    volume.attach(&[]);
    let faults = Faults::new(&volume);
    let core = volume.settled().core().unwrap();
    let file = volume.open();
    let node = File::open(volume.node(0).join("data")).unwrap();
    let mut random = Random::new(9);
    for round in 0..20 {
        let data = pattern(round, 4096 * (1 + usize::try_from(random.below(32)).unwrap()));
        let offset = random.below(1 << 20) * 13;
        file.write_all_at(&data, offset).unwrap();
        let flushes = faults.counts_of(core).flushes();
        file.sync_data().unwrap();
        let counts = faults.counts_of(core);
        assert!(counts.flushes() > flushes, "the storage node was not flushed");
        assert_eq!(counts.unflushed(), 0, "something was written after the flush that was to cover it");
        let mut found = vec![0; data.len()];
        node.read_exact_at(&mut found, offset).unwrap();
        assert!(found == data, "round {round}: the storage node does not have what was flushed");
    }
    drop(file);
    volume.detach();
}

/// D5: a flush that fails is reported to the client that asked for it, and nothing is lost: once the storage node works again the next
/// one succeeds and means what it says.
#[test]
fn d5_a_failed_flush_is_told_to_the_caller_and_keeps_the_data() {
    let host = host("16M");
    let volume = volume(&host);
    let faults = Faults::new(&volume);
    let file = volume.open();
    let data = pattern(10, 300_000);
    file.write_all_at(&data, 1_000_001).unwrap();
    let core = volume.settled().core();
    faults.set("flush fail=EIO");
    for _ in 0..3 {
        let error = file.sync_data().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{error}");
        assert_eq!(read(&file, data.len()), data, "what was acknowledged is read while flushes fail");
    }
    assert_eq!(volume.status().core(), core, "the core lives");
    kill_core(&volume);
    assert_eq!(read(&file, data.len()), data, "and after its death");
    faults.clear();
    file.sync_data().unwrap();
    drop(file);
    kill_all(&volume);
    attach_again(&volume);
    assert_eq!(read(&volume.open(), data.len()), data, "what was flushed at last");
    volume.detach();
}

fn read(file: &File, len: usize) -> Vec<u8> {
    let mut found = vec![0; len];
    file.read_exact_at(&mut found, 1_000_001).unwrap();
    found
}

/// The judge objects to a volume that breaks its promises: storage nodes that lose writes and say they have done them.
#[test]
fn a_storage_node_that_loses_writes_is_found_out() {
    let host = host("2M");
    let volume = volume(&host);
    let faults = Faults::new(&volume);
    let promises = Promises::new(Plan::new(11));
    let load = promises.start(&volume);
    load.goes_on(100);
    faults.set_node(1, "write lose");
    everdisk_tests::wait::until_true("the load finds it out", || load.has_failed());
    let broken = load.stop_broken().expect("a broken promise");
    println!("{broken}");
    faults.clear();
    volume.detach();
}

/// Everything above in any order, for as long as EVERDISK_SOAK_SECS says.
#[test]
#[ignore = "goes on for EVERDISK_SOAK_SECS seconds (60 when it is not set)"]
fn beyond2_d5_the_promises_hold_for_long() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seconds = number("EVERDISK_SOAK_SECS").unwrap_or(60);
    let seed = number("EVERDISK_SOAK_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("seed {seed} (EVERDISK_SOAK_SEED)");
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut random = Random::new(seed);
    let mut counts = [0_u64; 8];
    let mut all = Loss::default();
    while Instant::now() < until {
        let mut host = host(["2M", "16M", "64M"][usize::try_from(random.below(3)).unwrap()]);
        let faults = Faults::new(&volume(&host));
        let plan = if random.below(2) == 0 { Plan::new(random.next()) } else { Plan::small(random.next()) };
        let promises = Promises::new(plan);
        let phase = Instant::now() + Duration::from_secs(20).min(until.saturating_duration_since(Instant::now()));
        while Instant::now() < phase {
            let load = promises.start(&volume(&host));
            let mut goes_on = true;
            while goes_on && Instant::now() < phase {
                a_while(&load, &mut random, 500);
                let action = random.below(8);
                counts[usize::try_from(action).unwrap()] += 1;
                goes_on = action != 7;
                act(&mut host, &faults, action, &mut random);
            }
            if goes_on {
                faults.clear();
                load.stop();
                continue;
            }
            load.stop_with_errors();
            faults.clear();
            let volume = volume(&host);
            attach_again(&volume);
            let loss = promises.check_after_loss(&volume.open());
            all = Loss { blocks: all.blocks + loss.blocks, of: all.of + loss.of };
        }
        let volume = volume(&host);
        volume.settled();
        volume.detach();
        attach_again(&volume);
        promises.check(&volume.open());
    }
    println!("actions {counts:?}, {} of {} blocks were older than acknowledged", all.blocks, all.of);
}

fn act(host: &mut Host, faults: &Faults, action: u64, random: &mut Random) {
    match action {
        0 => {
            let (write, flush) = (random.below(3000), random.below(20_000));
            faults.set(&format!("write delay_us={write}\nflush delay_us={flush}"));
        }
        1 => faults.clear(),
        2 => drop(kill_core(&volume(host))),
        3 => kill_two_cores(&volume(host)),
        4 => kill_interface(&volume(host)),
        5 => {
            host.kill_daemon();
            host.start_daemon();
        }
        6 => {
            let volume = volume(host);
            volume.settled();
            volume.turn();
        }
        _ => kill_all(&volume(host)),
    }
}
