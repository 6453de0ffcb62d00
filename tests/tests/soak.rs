//! Everything at once, for as long as EVERDISK_SOAK_SECS says.

use std::time::{Duration, Instant};

use everdisk_tests::{
    bytes::Random,
    fio::{Job, Load as Fio},
    host::Host,
    load::Load,
    processes,
    run::Output,
    volume::{Volume, report},
};

/// An upgrade, a kill, a suspension, one of them at a time and in any order, under two loads.
#[test]
#[ignore = "goes on for EVERDISK_SOAK_SECS seconds (60 when it is not set)"]
fn random_upgrades_kills_and_suspensions_under_load() {
    let seconds = std::env::var("EVERDISK_SOAK_SECS").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    let seed = std::env::var("EVERDISK_SOAK_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("seed {seed} (EVERDISK_SOAK_SEED)");
    let mut random = Random::new(seed);
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut host = Host::new();
    host.volume("fio", "256M");
    host.volume("own", "64M");
    let own = Load::start(&Volume::new(&host, "own"), 3);
    let mut counts = [0_u64; 8];
    let mut round = 0_usize;
    while Instant::now() < until {
        let job = &Job::matrix()[round % 4];
        round += 1;
        let mut fio = Fio::start(job, &Volume::new(&host, "fio").path);
        let phase = Instant::now() + Duration::from_secs(20).min(until.saturating_duration_since(Instant::now()));
        while Instant::now() < phase {
            let name = if random.below(2) == 0 { "fio" } else { "own" };
            let action = usize::try_from(random.below(8)).unwrap_or(0);
            counts[action] += 1;
            act(&mut host, name, action, &mut random);
            fio.check();
            own.goes_on(1);
        }
        fio.stop();
    }
    println!("rounds {round}, actions {counts:?}");
    own.stop();
    for name in ["fio", "own"] {
        let volume = Volume::new(&host, name);
        volume.settled();
        volume.detach();
    }
}

fn next_program(volume: &Volume<'_>) -> std::path::PathBuf {
    volume.settled();
    volume.other_core()
}

fn act(host: &mut Host, name: &str, action: usize, random: &mut Random) {
    let volume = Volume::new(host, name);
    match action {
        0 | 1 => {
            volume.upgrade(&next_program(&volume));
        }
        2 => {
            // The serving core dies in the middle of an upgrade: whatever comes of it, it has an end.
            let program = next_program(&volume);
            let upgrade = volume.upgrading(&program, &["--soak", "1s"]);
            let pid = volume.wait("service", |status| status.serves() && random.below(4) == 0).core();
            pid.into_iter().for_each(processes::kill);
            let output: Output = upgrade.end(Duration::from_secs(60));
            assert!(["committed", "rolled-back", "aborted"].contains(&report(&output).outcome()), "{output:?}");
        }
        3 => {
            volume.kill_core();
        }
        4 => {
            let pid = volume.wait("an interface", |status| status.interface().is_some()).interface();
            pid.into_iter().for_each(processes::kill);
            volume.wait("a new interface", |status| status.serves() && status.interface() != pid);
        }
        5 => {
            volume.settled();
            volume.ask("suspend", &["--lease", "10s"]).ok();
            if random.below(2) == 0 {
                volume.status().core().into_iter().for_each(processes::kill);
            }
            volume.ask("resume", &[]).ok();
        }
        6 => {
            host.kill_daemon();
            host.start_daemon();
        }
        _ => {
            let program = next_program(&volume);
            let upgrade = volume.upgrading(&program, &["--soak", "0s"]);
            let steps = random.below(20);
            for _ in 0..steps {
                volume.status();
            }
            host.kill_daemon();
            drop(upgrade);
            host.start_daemon();
        }
    }
}
