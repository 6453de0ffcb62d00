//! How long a successor takes over a full buffer: every slot read, every checksum verified, the index built. In this
//! process, on a segment of its own; the successor maps it anew each time, as a new process does.

use std::{
    os::fd::AsFd,
    sync::{Arc, atomic::Ordering::Release},
    time::Instant,
};

use everdisk_engine::{Engine, Gate, Hold, Work, WriteBack};
use everdisk_proto::{
    limits::{BUFFER_DEFAULT, STRIPE_DEFAULT},
    segment::MAGIC,
    version::BUFFER,
    volume::{Bypass, NodeSpec, NodeUrl, SPEC_VERSION, Timeouts, VolumeSpec},
};
use everdisk_sys::memory::SharedSegment;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    Error, Result,
    measure::{Scope, VOLUME_BYTES, memory_directory},
    say,
    stats::{Sorted, time},
    table::{at_most, row, table},
};

const TARGET_NS: f64 = 20e6;

/// The gate of the only core there is.
struct Alone(u64);

impl Gate for Alone {
    fn generation(&self) -> Option<u64> {
        Some(self.0)
    }
    fn begin_sending(&self, _: u64) -> bool {
        true
    }
    fn end_sending(&self) {}
    fn may_write(&self) -> bool {
        true
    }
    fn taken_over(&self, _bytes: u64) {}
    fn enter(&self, _: Work, _: u64) -> bool {
        true
    }
    fn leave(&self, _: Work) {}
}

impl Hold for Alone {
    fn synchronous(&self) -> bool {
        false
    }
    fn away(&self) {}
    fn writing(&self) {}
    fn back(&self) -> bool {
        true
    }
}

/// Measures.
///
/// # Errors
/// Whatever went wrong.
pub fn run(scope: &Scope) -> Result<Value> {
    let directory = tempfile::tempdir_in(memory_directory()?).map_err(Error::io("make a temporary directory"))?;
    let engine = Arc::new(engine(directory.path())?);
    let repetitions = scope.repetitions * 2;
    say(format!("\nWrite buffer, take-over: a full buffer of 64 MiB, {repetitions} times each"));
    let mut rows = vec![row(["the successor", "p50", "p90", "max", "target", ""])];
    let mut values = Vec::new();
    let cases = [
        ("16384 extents of 4 KiB, nothing known", 4 << 10, false, Some(TARGET_NS)),
        ("64 extents of 1 MiB, nothing known", 1 << 20, false, Some(TARGET_NS)),
        ("16384 extents of 4 KiB, followed", 4 << 10, true, None),
    ];
    for (name, extent, followed, target) in cases {
        let segment = full(&engine, extent)?;
        let mut times = Vec::new();
        for _ in 0..repetitions {
            scope.interrupt.check()?;
            times.push(adopt(&engine, &segment, followed)?);
        }
        let sorted: Sorted = times.iter().copied().collect();
        rows.push(vec![
            name.to_owned(),
            time(sorted.median()),
            time(sorted.at(900)),
            time(sorted.max()),
            target.map_or_else(String::new, |_| "≤ 20 ms".to_owned()),
            target.map_or_else(String::new, |target| at_most(sorted.median() as f64, target)),
        ]);
        values.push(json!({
            "case": name, "ns": times, "target_ns": target,
            "met": target.map(|target| sorted.median() as f64 <= target),
        }));
    }
    say(format!("\n{}", table(&rows, &[0, 5])));
    Ok(Value::Array(values))
}

fn engine(directory: &std::path::Path) -> Result<Engine> {
    let path = directory.join("node");
    std::fs::create_dir(&path).map_err(Error::io("make a storage node"))?;
    let failed = |e: &dyn std::fmt::Display| Error::Failed(e.to_string());
    let spec = VolumeSpec {
        spec_version: SPEC_VERSION,
        name: "v".parse().map_err(|e| failed(&e))?,
        uuid: Uuid::from_u128(1),
        size: VOLUME_BYTES,
        stripe: STRIPE_DEFAULT,
        buffer: BUFFER_DEFAULT,
        bypass: Bypass::Auto,
        timeouts: Timeouts::default(),
        nodes: vec![NodeSpec { url: NodeUrl::Dir(path), uuid: Uuid::from_u128(2) }],
    };
    Engine::create(&spec).map_err(|e| failed(&e))?;
    Engine::open(&spec).map_err(|e| failed(&e))
}

/// A segment whose buffer a core has filled.
fn full(engine: &Arc<Engine>, extent: usize) -> Result<SharedSegment> {
    let segment = Arc::new(SharedSegment::create(BUFFER_DEFAULT).map_err(Error::io("make a segment"))?);
    segment.header.buffer_version.store(BUFFER, Release);
    segment.header.magic.store(MAGIC, Release);
    let lent = mapped(&segment)?;
    let core = core(engine, &segment, 1)?;
    core.adopt(1);
    let data = vec![7; extent];
    let extents = BUFFER_DEFAULT / extent as u64;
    for index in 0..extents {
        let at = index.wrapping_mul(2_654_435_761) % extents * extent as u64;
        core.write(&Alone(1), at, &data).map_err(|e| Error::Failed(format!("the buffer takes no write: {e}")))?;
    }
    Ok(lent)
}

fn core(engine: &Arc<Engine>, segment: &Arc<SharedSegment>, generation: u64) -> Result<WriteBack> {
    WriteBack::new(Arc::clone(engine), segment, Box::new(Alone(generation)), Bypass::Auto, Timeouts::default())
        .ok_or_else(|| Error::Failed("the segment's buffer is of another version".to_owned()))
}

/// A mapping of its own.
fn mapped(segment: &SharedSegment) -> Result<SharedSegment> {
    let fd = segment.as_fd().try_clone_to_owned().map_err(Error::io("lend a segment"))?;
    SharedSegment::adopt(fd).map_err(Error::io("map a segment"))
}

fn adopt(engine: &Arc<Engine>, segment: &SharedSegment, followed: bool) -> Result<u64> {
    let segment = Arc::new(mapped(segment)?);
    let core = core(engine, &segment, 2)?;
    if followed {
        core.follow();
    }
    let began = Instant::now();
    core.adopt(2);
    let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
    match core.buffered_bytes() {
        BUFFER_DEFAULT => Ok(took),
        bytes => Err(Error::Failed(format!("the successor found {bytes} bytes"))),
    }
}
