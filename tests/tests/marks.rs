//! How the death of a core is noticed: by the marks that the kernel leaves in the segment when its threads end (D14), else by its pidfd.

use std::{
    collections::BTreeSet,
    fs,
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::atomic::{
        AtomicBool,
        Ordering::{Acquire, Relaxed},
    },
    thread,
};

use everdisk_proto::segment::thread_word;
use everdisk_sys::{memory::SharedSegment, schedule};
use everdisk_testkit::at_end::at_end;
use everdisk_tests::{
    buffer,
    bytes::pattern,
    faults::Faults,
    host::Host,
    load::Load,
    nbd::Exported,
    programs::scripted_core,
    volume::report,
    wait::{until, until_true},
};

/// Deaths of a core that serves, as the interface tells them.
fn crashes(host: &Host, by: &str) -> usize {
    let by = format!("by=\"{by}\"");
    host.interface_log("v").lines().filter(|line| line.contains("core_crashed") && line.contains(&by)).count()
}

/// The segment of a volume, from the descriptors of its interface.
fn segment(interface: u32) -> SharedSegment {
    let links = fs::read_dir(format!("/proc/{interface}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let is_it = |path: &std::path::PathBuf| {
        fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("everdisk-segment"))
    };
    let path = links.into_iter().find(is_it).unwrap();
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    SharedSegment::adopt(OwnedFd::from(file)).unwrap()
}

/// Names of a core's threads that have a word in the segment, and of those that have none.
fn threads(segment: &SharedSegment, pid: u32) -> [BTreeSet<String>; 2] {
    let area = segment.cores.iter().find(|area| area.pid.load(Acquire) == pid).unwrap();
    let mut names = [BTreeSet::new(), BTreeSet::new()];
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let path = task.unwrap().path();
        let tid: u32 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let has_word = area.threads.iter().any(|word| word.load(Acquire) == thread_word::running(tid));
        // It may have ended by now.
        if let Ok(name) = fs::read_to_string(path.join("comm")) {
            names[usize::from(!has_word)].insert(name.trim().to_owned());
        }
    }
    names
}

/// D14: a kill is noticed by the marks, not by the end of the process.
#[test]
fn d14_a_killed_core_is_noticed_by_the_marks_of_its_threads() {
    const KILLS: usize = 10;
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 2);
    for _ in 0..KILLS {
        volume.settled();
        volume.kill_core();
        load.goes_on(20);
    }
    until_true("every death is told", || crashes(&host, "marks") + crashes(&host, "process") >= KILLS);
    // One that is killed while it starts a thread leaves a word that the kernel does not mark.
    assert!(crashes(&host, "marks") >= KILLS - 1, "{}", host.interface_log("v"));
    load.stop();
    volume.settled();
    volume.detach();
}

/// D14: a core that has no words, as that of an earlier build, is noticed by the end of its process.
#[test]
fn d14_a_core_without_marks_is_noticed_by_its_pidfd() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    volume.settled();
    let ended = report(&volume.try_upgrade(&scripted_core(host.root(), "open-and-die"), &[]));
    assert_ne!(ended.outcome(), "committed");
    until_true("the death is told", || crashes(&host, "process") >= 1);
    assert_eq!(crashes(&host, "marks"), 0, "{}", host.interface_log("v"));
    volume.settled();
    volume.detach();
}

/// D14: every thread of a core that touches a channel, a connection or a storage node has a word, a stand-in and those of a
/// node's pool among them.
#[test]
fn d14_every_thread_that_touches_a_channel_or_a_node_has_a_word() {
    let host = Host::faulty();
    let exported = Exported::attach(host.create_with("v", "64M", 3, &["--buffer", &buffer::size("16M")]));
    let volume = &exported.volume;
    let status = volume.settled();
    let (pid, segment) = (status.core().unwrap(), segment(status.interface().unwrap()));
    let (file, stop) = (volume.open(), AtomicBool::new(false));
    thread::scope(|scope| {
        let end = at_end(|| stop.store(true, Relaxed));
        let faults = Faults::new(volume);
        faults.set("all delay_us=20000");
        for part in 0..4 {
            let (file, stop) = (&file, &stop);
            scope.spawn(move || {
                let mut read = vec![0; 4096];
                for turn in 0_u64.. {
                    if stop.load(Relaxed) {
                        break;
                    }
                    let at = (part * 16 + turn % 16) << 20;
                    file.write_all_at(&pattern(turn, 64 << 10), at).unwrap();
                    file.read_exact_at(&mut read, at + (512 << 10)).unwrap();
                    file.sync_data().unwrap();
                }
            });
        }
        let mut seen = BTreeSet::new();
        until("threads of every kind with a word", || {
            seen.extend(threads(&segment, pid)[0].clone());
            let all = ["worker", "guard", "watch", "sender", "flusher", "store"];
            all.into_iter().all(|name| seen.contains(name)).then_some(())
        });
        drop(end);
    });
    // The others touch none: they answer the control module, and report nodes that do not answer.
    until_true("only those have no word", || {
        let [_, none] = threads(&segment, pid);
        none.iter().all(|name| ["control", "nodes"].contains(&name.as_str()))
    });
    drop(file);
    exported.detach();
}

/// Threads of a process, those with this name if one is given.
fn threads_named(pid: u32, name: Option<&str>) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap().path());
    let is_wanted = |path: &std::path::PathBuf| {
        name.is_none_or(|name| fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name))
    };
    tasks.filter(is_wanted).map(|path| path.file_name().unwrap().to_str().unwrap().parse().unwrap()).collect()
}

/// D14: after a death, requests wait for the interface and for the standby's workers to wake. They have the shortest
/// slice, and the workers of a core that serves have the usual one.
#[test]
fn d14_what_requests_wait_for_after_a_death_has_a_short_slice() {
    let host = Host::new();
    let volume = host.volume("v", "64M");
    let load = Load::start(&volume, 2);
    let is_prompt = |tid: u32| schedule::slice_ns(tid).unwrap() == Some(schedule::PROMPT_NS);
    if schedule::slice_ns(0).unwrap().is_none() {
        eprintln!("Linux before 6.12 has no slices that can be set");
        return;
    }
    for _ in 0..2 {
        let status = volume.settled();
        load.goes_on(200);
        let (core, standby) = (status.core().unwrap(), status.standby().unwrap());
        assert!(threads_named(status.interface().unwrap(), None).into_iter().all(is_prompt));
        let waiting = threads_named(standby, Some("worker"));
        assert!(!waiting.is_empty() && waiting.into_iter().all(is_prompt));
        let serving = threads_named(core, Some("worker"));
        assert!(!serving.iter().copied().all(is_prompt), "no worker of the core that serves has the usual slice");
        volume.kill_core();
        load.goes_on(20);
    }
    load.stop();
    volume.settled();
    volume.detach();
}
