//! The engine on a store that fails on demand, and the life of a volume's nodes.

use std::{
    cell::Cell,
    fs, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::{
    node::NodeState,
    volume::{BadSpec, Bypass, NodeSpec, NodeUrl, SPEC_VERSION, Timeouts, VolumeSpec},
};
use everdisk_store::{About, Completion, EINVAL, Lent, Op, Outcome, Owned, Sought, Store, StoreError, pool::Pool};
use parking_lot::{Condvar, Mutex};
use tempfile::TempDir;
use uuid::Uuid;

use crate::{Engine, IoError, OpenError, layout::Layout};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EOPNOTSUPP: i32 = 95;
const STRIPE: u64 = 64 << 10;

/// What a [`Scripted`] store does, and what was asked of it.
#[derive(Default)]
struct Script {
    /// Every call fails with this errno; 0: none fails.
    errno: AtomicI32,
    /// Duration of a call, µs.
    takes_us: AtomicU64,
    /// Reads are carried out at once.
    reads_at_once: AtomicBool,
    /// A search for data or holes finds what lies before the offset.
    looks_back: AtomicBool,
    calls: Mutex<Vec<(&'static str, u64, u64)>>,
    /// No call ends before all are there that are to meet.
    meeting: Mutex<Option<Arc<Meeting>>>,
}

/// Calls that have to be under way at the same time.
#[derive(Default)]
struct Meeting {
    missing: Mutex<usize>,
    complete: Condvar,
}

impl Meeting {
    fn join(&self) {
        let mut missing = self.missing.lock();
        *missing = missing.checked_sub(1).expect("no more calls than are to meet");
        self.complete.notify_all();
        let is_late = self.complete.wait_while_for(&mut missing, |missing| *missing > 0, Duration::from_secs(20));
        assert!(!is_late.timed_out(), "{} calls were not begun while the others were under way", *missing);
    }
}

/// A store without bytes: notes what it is asked for and fails on demand.
struct Scripted {
    about: About,
    pool: Pool,
    script: Arc<Script>,
}

impl Scripted {
    fn call(&self, what: &'static str, offset: u64, len: u64) -> Result<(), StoreError> {
        assert!(offset + len <= self.about.size, "{what} of {len} bytes at {offset} leaves the node");
        self.script.calls.lock().push((what, offset, len));
        let meeting = self.script.meeting.lock().clone();
        if let Some(meeting) = meeting {
            meeting.join();
        }
        let takes = Duration::from_micros(self.script.takes_us.load(Ordering::Relaxed));
        if !takes.is_zero() {
            thread::sleep(takes);
        }
        match self.script.errno.load(Ordering::Relaxed) {
            0 => Ok(()),
            errno => {
                let source = io::Error::from_raw_os_error(errno);
                Err(StoreError::Io { node: self.about.url.clone(), action: what, source })
            }
        }
    }
}

impl Store for Scripted {
    fn about(&self) -> &About {
        &self.about
    }
    fn attempt(&self, _: u64, op: Lent<'_>) -> Option<Outcome> {
        let at_once = self.script.reads_at_once.load(Ordering::Relaxed);
        (at_once && matches!(op, Op::Read(_))).then_some(Ok(None))
    }
    fn perform(&self, offset: u64, op: Lent<'_>) -> Outcome {
        match op {
            Op::Read(buf) => self.call("read", offset, buf.len() as u64)?,
            Op::Write(data) => self.call("write", offset, data.len() as u64)?,
            Op::Flush => self.call("flush", 0, 0)?,
            Op::Discard(len) => self.call("discard", offset, len)?,
            Op::WriteZeroes(len) => self.call("write zeros", offset, len)?,
            Op::Allocate(len) => self.call("allocate", offset, len)?,
            Op::Identify => self.call("recheck", 0, 0)?,
            Op::Seek(sought) => {
                self.call("next", offset, 0)?;
                let back = self.script.looks_back.load(Ordering::Relaxed);
                return Ok(if back { Some(offset - 1) } else { (sought == Sought::Hole).then_some(self.about.size) });
            }
        }
        Ok(None)
    }
    fn begin(self: Arc<Self>, offset: u64, op: Owned, completion: Completion) {
        Arc::clone(&self).pool.begin(self, offset, op, completion);
    }
}

fn scripted(size: u64, nodes: usize) -> (Engine, Vec<Arc<Script>>) {
    let layout = Layout::new(STRIPE, nodes);
    let scripts: Vec<Arc<Script>> = (0..nodes).map(|_| Arc::default()).collect();
    let store = |(index, script): (usize, &Arc<Script>)| {
        let url = NodeUrl::Dir(format!("/node/{index}").into());
        let about = About { url, uuid: Uuid::nil(), size: layout.node_len(index, size) };
        Arc::new(Scripted { about, pool: Pool::default(), script: Arc::clone(script) }) as Arc<dyn Store>
    };
    (Engine::new(size, layout, scripts.iter().enumerate().map(store).collect()), scripts)
}

fn calls(script: &Script) -> Vec<(&'static str, u64, u64)> {
    std::mem::take(&mut script.calls.lock())
}

/// D15: a position before the one that was asked for would be returned to the application, or make a search loop for
/// ever.
#[test]
#[should_panic(expected = "a store searches forward: from 5 it has found Some(4)")]
fn d15_a_store_that_looks_back_ends_the_core() {
    let (engine, scripts) = scripted(1 << 20, 1);
    scripts[0].looks_back.store(true, Ordering::Relaxed);
    let _ = engine.seek(5, Sought::Data);
}

#[test]
fn discarding_ten_tebibytes_is_one_call_per_node() {
    let size = 10 << 40;
    let (engine, scripts) = scripted(size, 4);
    engine.discard(0, size).unwrap();
    engine.write_zeroes(1, size - 2).unwrap();
    engine.seek(5, Sought::Data).unwrap();
    for script in &scripts {
        let names: Vec<_> = calls(script).into_iter().map(|(what, ..)| what).collect();
        assert_eq!(names, ["discard", "write zeros", "next"]);
    }
}

#[test]
fn a_range_within_one_stripe_touches_one_node() {
    let (engine, scripts) = scripted(1 << 20, 4);
    engine.discard(STRIPE + 7, 100).unwrap();
    engine.read(STRIPE + 7, &mut [0; 100]).unwrap();
    assert_eq!(calls(&scripts[1]), [("discard", 7, 100), ("read", 7, 100)]);
    assert!([0, 2, 3].iter().all(|n| calls(&scripts[*n]).is_empty()));
}

/// beyond 4: before a read waits for a node that is known to be slow, the caller is told, and only then.
#[test]
fn beyond4_a_read_that_will_take_long_says_so_before() {
    let (engine, scripts) = scripted(1 << 20, 2);
    let told = Cell::new(0);
    let read = |offset| engine.read_beside(offset, &mut [0; 8], &|| told.set(told.get() + 1)).unwrap();
    (0..100).for_each(|_| read(0));
    assert_eq!(told.get(), 0, "quick");
    scripts[0].takes_us.store(1500, Ordering::Relaxed);
    (0..100).for_each(|_| read(0));
    assert!((1..100).contains(&told.get()), "after some: {}", told.get());
    assert!(engine.is_slow_to_read() && !engine.is_slow_to_change() && !engine.is_slow_to_flush());
    told.set(0);
    read(STRIPE);
    assert_eq!(told.get(), 0, "the other node is quick");
    engine.read_beside(0, &mut vec![0; 3 * (64 << 10)], &|| told.set(told.get() + 1)).unwrap();
    assert_eq!(told.get(), 1, "once before all of them, which go on side by side");
    scripts[0].reads_at_once.store(true, Ordering::Relaxed);
    calls(&scripts[0]);
    read(0);
    assert_eq!((told.get(), calls(&scripts[0]).len()), (1, 0), "it need not wait");
    scripts[0].errno.store(EIO, Ordering::Relaxed);
    read(0);
    scripts[0].reads_at_once.store(false, Ordering::Relaxed);
    assert!(engine.read(0, &mut [0; 8]).is_err() && !engine.is_good());
    let state = Cell::new(true);
    assert!(engine.read_beside(0, &mut [0; 8], &|| state.set(engine.is_good())).is_err());
    assert!(!state.get(), "that it has to wait says nothing good of a node");
    scripts[0].errno.store(0, Ordering::Relaxed);
    scripts[0].takes_us.store(0, Ordering::Relaxed);
    (0..50).for_each(|_| read(0));
    assert!(!engine.is_slow_to_read(), "quick again");
    scripts[1].takes_us.store(1500, Ordering::Relaxed);
    (0..100).for_each(|_| engine.write(STRIPE, &[0; 8]).unwrap());
    assert!(engine.is_slow_to_change());
}

/// beyond 4: what takes long goes on at all nodes at once, and at all stripes of one node.
#[test]
fn beyond4_slow_nodes_are_used_side_by_side() {
    const NODES: usize = 3;
    let (engine, scripts) = scripted(1 << 20, NODES);
    scripts.iter().for_each(|script| script.takes_us.store(1500, Ordering::Relaxed));
    for stripe in (0..30).flat_map(|_| 0..NODES as u64) {
        engine.read(stripe * STRIPE, &mut [0; 8]).unwrap();
        engine.write(stripe * STRIPE, &[0; 8]).unwrap();
    }
    assert!(engine.is_slow_to_read() && engine.is_slow_to_change());
    scripts.iter().for_each(|script| script.takes_us.store(0, Ordering::Relaxed));
    let all_meet = |calls: usize, operation: &dyn Fn()| {
        let meeting = Arc::new(Meeting { missing: calls.into(), ..Meeting::default() });
        scripts.iter().for_each(|script| *script.meeting.lock() = Some(Arc::clone(&meeting)));
        operation();
        assert_eq!(*meeting.missing.lock(), 0, "as many calls as expected");
    };
    let whole = 10 * usize::try_from(STRIPE).unwrap();
    all_meet(11, &|| engine.read(7, &mut vec![0; whole]).unwrap());
    all_meet(11, &|| engine.write(7, &vec![0; whole]).unwrap());
    all_meet(NODES, &|| engine.flush().unwrap());
    all_meet(NODES, &|| engine.discard(0, 1 << 20).unwrap());
    all_meet(NODES, &|| engine.write_zeroes(0, 1 << 20).unwrap());
    all_meet(NODES, &|| assert_eq!(engine.seek(5, Sought::Data).unwrap(), None));
    let meeting = |calls: usize| Some(Arc::new(Meeting { missing: calls.into(), ..Meeting::default() }));
    // Identities first, each with the others; then the blocks.
    let identities = meeting(NODES);
    scripts.iter().for_each(|script| script.meeting.lock().clone_from(&identities));
    assert_eq!(engine.verify(0).unwrap(), 0);
    scripts.iter().for_each(|script| *script.meeting.lock() = None);
    assert_eq!(engine.verify(100).unwrap(), 100);
}

/// Each part of a side-by-side operation is waited for, and the first error in the order of the range is the outcome.
#[test]
fn an_error_of_one_slow_node_is_told_after_every_part_has_ended() {
    let (engine, scripts) = scripted(1 << 20, 2);
    scripts.iter().for_each(|script| script.takes_us.store(1500, Ordering::Relaxed));
    for stripe in (0..30).flat_map(|_| 0..2) {
        engine.write(stripe * STRIPE, &[0; 8]).unwrap();
    }
    assert!(engine.is_slow_to_change());
    scripts.iter().for_each(|script| script.calls.lock().clear());
    scripts[1].errno.store(ENOSPC, Ordering::Relaxed);
    for _ in 0..6 {
        let error = engine.write(0, &vec![1; 6 * usize::try_from(STRIPE).unwrap()]).unwrap_err();
        assert_eq!(error.errno(), ENOSPC);
        assert_eq!(scripts.iter().map(|script| calls(script).len()).sum::<usize>(), 6);
    }
}

#[test]
fn flush_tries_every_node_and_reports_the_failure() {
    let (engine, scripts) = scripted(1 << 20, 3);
    scripts[0].errno.store(ENOSPC, Ordering::Relaxed);
    assert_eq!(engine.flush().unwrap_err().error.errno(), ENOSPC);
    assert!(scripts.iter().all(|script| calls(script) == [("flush", 0, 0)]));
}

#[test]
fn a_node_is_failed_until_an_operation_of_the_same_kind_succeeds() {
    let (engine, scripts) = scripted(1 << 20, 2);
    let states = || engine.nodes().into_iter().map(|n| (n.state, n.error)).collect::<Vec<_>>();
    let in_step = || (NodeState::InStep, None);
    assert_eq!(states(), [in_step(), in_step()]);

    scripts[1].errno.store(ENOSPC, Ordering::Relaxed);
    assert_eq!(engine.write(STRIPE, &[1]).unwrap_err().errno(), ENOSPC);
    let failed = states();
    assert_eq!((&failed[0], failed[1].0), (&in_step(), NodeState::Failed));
    assert!(failed[1].1.as_ref().unwrap().starts_with("dir:/node/1: cannot write"), "{failed:?}");

    scripts[1].errno.store(0, Ordering::Relaxed);
    assert_eq!(engine.read(u64::MAX, &mut [0]).unwrap_err().errno(), EINVAL);
    assert_eq!(states(), failed, "a refused request says nothing about a node");
    engine.read(STRIPE, &mut [0]).unwrap();
    engine.flush().unwrap();
    assert_eq!(states(), failed, "a node that can be read, and flushed, does not take writes for that");
    engine.write(STRIPE, &[1]).unwrap();
    assert_eq!(states(), [in_step(), in_step()]);

    scripts[1].errno.store(EOPNOTSUPP, Ordering::Relaxed);
    assert_eq!(engine.discard(STRIPE, 1).unwrap_err().errno(), EOPNOTSUPP);
    assert_eq!(states(), [in_step(), in_step()], "what a node never could do is no failure of it");
}

#[test]
fn ranges_outside_the_volume_are_refused() {
    let (engine, scripts) = scripted(1 << 20, 2);
    for (offset, len) in [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 2), (1, u64::MAX)] {
        for result in [engine.discard(offset, len), engine.write_zeroes(offset, len), engine.allocate(offset, len)] {
            let error = result.unwrap_err();
            assert!(matches!(error, IoError::OutOfRange { .. }) && error.errno() == EINVAL, "{error}");
        }
    }
    assert!(scripts.iter().all(|script| calls(script).is_empty()));
    engine.read(1 << 20, &mut []).unwrap();
    engine.discard(1 << 20, 0).unwrap();
}

#[test]
fn verify_spreads_over_the_volume_and_its_nodes() {
    let (engine, scripts) = scripted(1 << 30, 4);
    assert_eq!(engine.verify(64).unwrap(), 64);
    for script in &scripts {
        let calls = calls(script);
        assert_eq!(calls[0], ("recheck", 0, 0));
        // A quarter of the blocks on average. Without spreading, all blocks could lie on few nodes.
        assert!(calls.len() > 8, "{} of 64 blocks are on this node", calls.len() - 1);
    }
    assert_eq!(engine.verify(0).unwrap(), 0);
}

/// M6: what a probe ahead has read is not read again within the pause. A node that fails it, or hangs in it, is left to the probe.
#[test]
fn m6_what_was_probed_a_moment_ago_is_not_read_again() {
    let (engine, scripts) = scripted(1 << 20, 3);
    engine.probe_ahead(Duration::from_secs(20));
    let read = || scripts.iter().map(|script| calls(script).len()).collect::<Vec<_>>();
    assert_eq!(read(), [1, 1, 1]);
    assert_eq!(engine.probe().unwrap(), 3);
    assert_eq!(read(), [0, 0, 0]);
    assert_eq!(engine.probe().unwrap(), 3);
    assert_eq!(read(), [1, 1, 1], "it counts once");
    engine.probe_ahead(Duration::from_secs(20));
    assert!(!engine.nodes[0].was_probed(Duration::ZERO), "it counts for a time only");
    let (engine, scripts) = scripted(1 << 20, 3);
    let meeting = Arc::new(Meeting { missing: 2.into(), ..Meeting::default() });
    *scripts[1].meeting.lock() = Some(Arc::clone(&meeting));
    scripts[2].errno.store(EIO, Ordering::Relaxed);
    engine.probe_ahead(Duration::from_millis(200));
    let deadline = Instant::now() + Duration::from_secs(20);
    while scripts.iter().any(|script| script.calls.lock().is_empty()) || engine.nodes[0].is_unprobed() {
        assert!(Instant::now() < deadline, "the nodes are not read");
        thread::yield_now();
    }
    scripts.iter().for_each(|script| drop(calls(script)));
    assert!(engine.is_good(), "a probe ahead judges no node");
    meeting.join();
    *scripts[1].meeting.lock() = None;
    assert_eq!(engine.probe().unwrap_err().errno(), EIO);
    assert!(calls(&scripts[0]).is_empty() && !calls(&scripts[2]).is_empty() && !engine.is_good());
}

#[test]
fn probe_reads_another_block_of_each_node_at_each_call() {
    let (engine, scripts) = scripted(1 << 30, 3);
    for _ in 0..100 {
        assert_eq!(engine.probe().unwrap(), 3);
    }
    for script in &scripts {
        let mut calls = calls(script);
        calls.sort_unstable();
        calls.dedup();
        assert!(calls.len() > 90, "{} different blocks in 100 probes", calls.len());
    }
}

fn spec(parent: &Path, size: u64) -> VolumeSpec {
    let node = |n: u128| NodeSpec { url: NodeUrl::Dir(parent.join(n.to_string())), uuid: Uuid::from_u128(n) };
    VolumeSpec {
        spec_version: SPEC_VERSION,
        name: "v".parse().unwrap(),
        uuid: Uuid::from_u128(9),
        size,
        stripe: STRIPE,
        buffer: 0,
        bypass: Bypass::Auto,
        timeouts: Timeouts::default(),
        nodes: vec![node(1), node(2), node(3)],
    }
}

fn entries(path: &Path) -> usize {
    fs::read_dir(path).unwrap().count()
}

#[test]
fn a_creation_that_fails_on_one_node_leaves_nothing_on_the_others() {
    let parent = TempDir::new().unwrap();
    let spec = spec(parent.path(), 1 << 20);
    // The operator's own directories stay; the one that was made is removed.
    fs::create_dir(parent.path().join("1")).unwrap();
    fs::create_dir(parent.path().join("3")).unwrap();
    fs::write(parent.path().join("3/photos"), "dear").unwrap();
    let error = Engine::create(&spec).unwrap_err();
    assert!(matches!(error, OpenError::Node(everdisk_store::OpenError::NotEmpty { .. })), "{error}");
    assert_eq!((entries(parent.path()), entries(&parent.path().join("1"))), (2, 0));
    assert_eq!(entries(&parent.path().join("3")), 1);
}

/// D11: two nodes of one volume that changed places are refused, although each is whole in itself.
#[test]
fn d11_nodes_in_another_order_are_refused() {
    let parent = TempDir::new().unwrap();
    let mut spec = spec(parent.path(), 1 << 20);
    Engine::create(&spec).unwrap();
    spec.nodes.swap(0, 2);
    let error = Engine::open(&spec).err().unwrap();
    assert!(matches!(error, OpenError::Node(everdisk_store::OpenError::OtherLayout { what: "place", .. })), "{error}");
}

#[test]
fn a_resize_that_died_between_two_nodes_is_refused_then_repeated() {
    let parent = TempDir::new().unwrap();
    let (old, new) = (spec(parent.path(), 1 << 20), spec(parent.path(), 5 << 20));
    Engine::create(&old).unwrap();
    Engine::open(&old).unwrap().write(500_000, b"kept").unwrap();
    // The state after a death between the first node and the second.
    let only_first = |size| {
        let elsewhere = TempDir::new().unwrap();
        let spec = spec(elsewhere.path(), size);
        Engine::create(&spec).unwrap();
        fs::copy(elsewhere.path().join("1/superblock"), parent.path().join("1/superblock")).unwrap();
        let len = fs::metadata(elsewhere.path().join("1/data")).unwrap().len();
        fs::File::options().write(true).open(parent.path().join("1/data")).unwrap().set_len(len).unwrap();
    };
    only_first(3 << 20);
    let error = Engine::open(&old).err().unwrap().to_string();
    assert!(error.contains("a resize was interrupted, repeat it"), "{error}");

    // Undone, or repeated with a smaller size than what was begun.
    for size in [1 << 20, 2 << 20] {
        only_first(3 << 20);
        Engine::resize(&old, size).unwrap();
        Engine::open(&spec(parent.path(), size)).unwrap();
    }
    Engine::resize(&old, new.size).unwrap();
    let mut bytes = [0; 4];
    Engine::open(&new).unwrap().read(500_000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"kept");
    // The volume's description was not written: the same command again.
    Engine::resize(&old, new.size).unwrap();
    Engine::open(&new).unwrap();
}

#[test]
fn a_resize_that_one_node_refuses_changes_none() {
    let parent = TempDir::new().unwrap();
    let spec = spec(parent.path(), 1 << 20);
    Engine::create(&spec).unwrap();
    fs::rename(parent.path().join("3"), parent.path().join("away")).unwrap();
    assert!(Engine::resize(&spec, 2 << 20).is_err());
    fs::rename(parent.path().join("away"), parent.path().join("3")).unwrap();
    Engine::open(&spec).unwrap();
    assert!(matches!(Engine::resize(&spec, 4096), Err(OpenError::Shrink { .. })));
    assert!(matches!(Engine::resize(&spec, (1 << 20) + 1), Err(OpenError::Spec(BadSpec::Size(_)))));
}

/// What the checks before did not find: every node is unchanged nevertheless.
#[test]
fn a_resize_that_fails_at_the_last_node_is_undone_on_the_others() {
    let parent = TempDir::new().unwrap();
    let spec = spec(parent.path(), 1 << 20);
    Engine::create(&spec).unwrap();
    let obstacle = parent.path().join("3/superblock.new");
    fs::create_dir(&obstacle).unwrap();
    assert!(Engine::resize(&spec, 2 << 20).is_err());
    Engine::open(&spec).unwrap();
    fs::remove_dir(&obstacle).unwrap();
    Engine::resize(&spec, 2 << 20).unwrap();
}

#[test]
fn a_directory_that_is_named_twice_is_said_to_be_one() {
    let parent = TempDir::new().unwrap();
    let mut spec = spec(parent.path(), 1 << 20);
    assert!(matches!(
        Engine::check_directories(&spec),
        Err(OpenError::Node(everdisk_store::OpenError::NoDirectory { .. }))
    ));
    spec.nodes[2].url = NodeUrl::Dir(parent.path().join("1/../1"));
    let error = Engine::create(&spec).unwrap_err();
    assert!(matches!(error, OpenError::SameNode(_)), "{error}");
    assert_eq!(entries(parent.path()), 0);
}

/// Nodes on one file system need the sum of their parts.
#[test]
fn a_volume_that_its_file_systems_cannot_take_whole_is_told() {
    let parent = TempDir::new().unwrap();
    let small = spec(parent.path(), 1 << 20);
    assert_eq!(Engine::create(&small).unwrap(), [0, 1, 2]);
    assert_eq!(Engine::short_of_room(&small, 1 << 20), []);
    let short = Engine::short_of_room(&small, 1 << 60);
    assert_eq!(short.iter().map(|(place, ..)| *place).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(short.iter().all(|(_, free, needed)| *needed == 1 << 60 && free < needed), "{short:?}");
}

#[test]
fn destroy_goes_on_to_the_other_nodes_and_can_be_repeated() {
    let parent = TempDir::new().unwrap();
    let spec = spec(parent.path(), 1 << 20);
    Engine::create(&spec).unwrap();
    let superblock = parent.path().join("1/superblock");
    let good = fs::read(&superblock).unwrap();
    fs::write(&superblock, "?").unwrap();
    assert!(Engine::destroy(&spec).is_err());
    fs::write(&superblock, good).unwrap();
    assert_eq!(Engine::destroy(&spec).unwrap(), [1, 2], "nothing was left there");
    let left: Vec<_> = ["1", "2", "3"].map(|node| entries(&parent.path().join(node))).into();
    assert_eq!(left, [0, 0, 0], "directories stay: whose they are, a core does not know");
}

/// A node loses its data under an open volume: the application gets an error, the other nodes go on.
#[test]
fn a_truncated_node_is_an_io_error_and_shows_in_the_status() {
    let parent = TempDir::new().unwrap();
    let spec = spec(parent.path(), 1 << 20);
    Engine::create(&spec).unwrap();
    let engine = Engine::open(&spec).unwrap();
    fs::File::options().write(true).open(parent.path().join("2/data")).unwrap().set_len(0).unwrap();
    assert_eq!(engine.read(STRIPE, &mut [0; 10]).unwrap_err().errno(), EIO);
    engine.read(0, &mut [0; 10]).unwrap();
    let states: Vec<_> = engine.nodes().into_iter().map(|n| n.state).collect();
    assert_eq!(states, [NodeState::InStep, NodeState::Failed, NodeState::InStep]);
    assert_eq!(engine.verify(8).unwrap_err().errno(), EIO);
}
