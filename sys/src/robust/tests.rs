use std::{
    os::fd::{AsFd, OwnedFd},
    process::{Child, Command, Stdio},
    sync::atomic::Ordering::{Acquire, Release},
    time::{Duration, Instant},
};

use super::*;
use crate::{clock::monotonic_ns, process, signal};

/// Longest duration of a step of another process.
const LIMIT: Duration = Duration::from_secs(30);
const VICTIM: &str = "EVERDISK_ROBUST_VICTIM";
/// Threads of the victim that have a word: the one of the test, and three others.
const THREADS: usize = 4;

fn words(segment: &SharedSegment) -> Vec<u32> {
    segment.cores[0].threads.iter().map(|word| word.load(Acquire)).collect()
}

fn count(segment: &SharedSegment, what: impl Fn(u32) -> bool) -> usize {
    words(segment).into_iter().filter(|word| what(*word)).count()
}

fn until(what: &str, happened: impl Fn() -> bool) {
    let end = Instant::now() + LIMIT;
    while !happened() {
        assert!(Instant::now() < end, "{what} within {LIMIT:?}");
        thread::yield_now();
    }
}

/// A process of its own that plays the core in the first slot, with a segment of this buffer mapped.
fn victim(buffer: u64) -> (Arc<SharedSegment>, Victim, OwnedFd) {
    let segment = SharedSegment::create(buffer).unwrap();
    segment.header.magic.store(everdisk_proto::segment::MAGIC, Release);
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "robust::tests::the_victim", "--nocapture", "--ignored"])
        .env(VICTIM, "1")
        .stdin(Stdio::from(segment.as_fd().try_clone_to_owned().unwrap()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let handle = process::pidfd(child.id()).unwrap();
    (Arc::new(segment), Victim(child), handle)
}

/// The process; a test that fails leaves none behind.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the victim does: one thread ends by itself; the others sleep until the process is killed.
#[test]
#[ignore = "a part of the tests below, in a process of its own"]
fn the_victim() {
    if std::env::var_os(VICTIM).is_none() {
        return;
    }
    let stdin = io::stdin().as_fd().try_clone_to_owned().unwrap();
    join(&Arc::new(SharedSegment::adopt(stdin).unwrap()), Slot::FIRST);
    let _entered = enter();
    start("short", || ()).unwrap().join().unwrap();
    for _ in 2..THREADS {
        start("long", || thread::sleep(Duration::from_secs(600))).unwrap();
    }
    thread::scope(|scope| {
        start_scoped(scope, "scoped", || thread::sleep(Duration::from_secs(600))).unwrap();
    });
}

/// Kills a victim with this buffer. Returns ns from the kill until every word is marked, and until the pidfd is
/// readable.
fn kill(buffer: u64) -> (u64, u64) {
    let (segment, victim, handle) = victim(buffer);
    let running = |word: u32| thread_word::is_running(word) && word != thread_word::STARTING;
    until("the threads run", || count(&segment, running) == THREADS);
    assert_eq!(count(&segment, |word| word != thread_word::FREE), THREADS, "a thread that has ended keeps no word");
    let mut tids: Vec<u32> = words(&segment).into_iter().filter(|word| *word != 0).collect();
    tids.sort_unstable();
    let mut tasks: Vec<u32> = std::fs::read_dir(format!("/proc/{}/task", victim.0.id()))
        .unwrap()
        .map(|task| thread_word::running(task.unwrap().file_name().to_str().unwrap().parse().unwrap()))
        .collect();
    tasks.sort_unstable();
    assert!(tids.iter().all(|tid| tasks.binary_search(tid).is_ok()), "{tids:x?} are threads of it: {tasks:x?}");
    let at = monotonic_ns();
    signal::kill(handle.as_fd()).unwrap();
    // As the interface does: sleep on a word until the kernel wakes the sleeper.
    while let Some(word) = segment.cores[0].threads.iter().find(|word| running(word.load(Acquire))) {
        wake::sleep_while(word, word.load(Acquire), LIMIT, Who::All);
        assert!(
            at + u64::try_from(LIMIT.as_nanos()).unwrap() > monotonic_ns(),
            "the kernel wakes who sleeps on a word"
        );
    }
    let marked = monotonic_ns() - at;
    let was_there = !process::is_gone(handle.as_fd());
    assert_eq!(count(&segment, thread_word::has_died), THREADS);
    until("it has gone", || process::is_gone(handle.as_fd()));
    let gone = monotonic_ns() - at;
    assert!(was_there || buffer < 64 << 20, "marked before the memory is unmapped");
    drop(victim);
    (marked, gone)
}

/// The marks come before the memory is unmapped; the lead grows with the memory. A thread that ends by itself leaves no
/// mark.
#[test]
fn d14_a_killed_process_is_marked_thread_by_thread_before_its_memory_is_gone() {
    kill(0);
    let (marked, gone) = kill(256 << 20);
    eprintln!("256 MiB: every thread marked after {} µs, the process gone after {} µs", marked / 1000, gone / 1000);
    assert!(marked < gone);
}

/// In a process that is no core no word is taken, and threads start as usual.
#[test]
fn threads_of_a_process_that_is_no_core_have_no_words() {
    drop(enter());
    assert_eq!(start("plain", || 7).unwrap().join().unwrap(), 7);
    assert_eq!(thread::scope(|scope| start_scoped(scope, "plain", || 7).unwrap().join().unwrap()), 7);
}

/// Words are taken once, the first free one first. When all are taken, the caller is told.
#[test]
fn d14_every_word_is_taken_once() {
    let segment = SharedSegment::create(0).unwrap();
    let area = &segment.cores[1];
    let all = area.threads.len();
    assert!(
        (0..all).all(|index| take_word(area).is_some_and(|word| std::ptr::eq(word, &raw const area.threads[index])))
    );
    assert!(take_word(area).is_none());
    free(&area.threads[7], thread_word::running(1));
    assert!(take_word(area).is_none(), "a word that is another's is not freed");
    free(&area.threads[7], thread_word::STARTING);
    assert!(take_word(area).is_some_and(|word| std::ptr::eq(word, &raw const area.threads[7])));
}

/// The C library's list is the thread's again after it has given its word up.
#[test]
fn d14_the_list_of_the_c_library_is_put_back() {
    let segment: &'static SharedSegment = Box::leak(Box::new(SharedSegment::create(0).unwrap()));
    let before = registered();
    let list = List::register(take_word(&segment.cores[0]).unwrap());
    assert_eq!(segment.cores[0].threads[0].load(Acquire), thread_word::running(thread_id()));
    assert_ne!(registered(), before);
    list.give_up();
    assert_eq!((registered(), segment.cores[0].threads[0].load(Acquire)), (before, thread_word::FREE));
}

/// A thread that takes a word when another has died does nothing more: the interface may have counted the words already.
#[test]
fn d14_a_thread_that_takes_a_word_after_the_first_mark_parks() {
    let segment = SharedSegment::create(0).unwrap();
    let area = &segment.cores[0];
    take_word(area).unwrap();
    assert!(!is_ending(area));
    area.threads[7].store(thread_word::WAITERS | thread_word::DIED, Release);
    assert!(is_ending(area));
}
