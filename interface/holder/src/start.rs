//! Starts the interface of a volume, with a new segment or with one that its predecessor left, and runs it to its end.

use std::{
    fs, io,
    os::fd::AsFd,
    path::Path,
    sync::atomic::Ordering::{Relaxed, Release},
};

use everdisk_gate::custody::Custody;
use everdisk_proto::{buffer, identity::Identity, segment::MAGIC, volume::VolumeSpec};
use everdisk_sys::{
    lock::{self, LockError},
    memory::SharedSegment,
    packet, process, schedule,
};

use crate::{args::Arguments, fatal::Fatal, holder::Holder, peers::Door, restore};

/// Runs until the volume is detached.
pub(crate) fn run(arguments: &Arguments, identity: &Identity) -> Result<(), Fatal> {
    let spec = read_volume(arguments)?;
    process::serve_io();
    // Requests wait while the interface acts, and it acts in the middle of others' work.
    schedule::set_prompt(true);
    let _lock = only_one(&arguments.socket)?;
    let listener =
        packet::listen(&arguments.socket).map_err(|e| Fatal::Socket(arguments.socket.display().to_string(), e))?;
    let door = Door::new(listener);
    let mut holder = if arguments.restore {
        restore::restore(door, &spec, arguments, identity)?
    } else {
        let segment = SharedSegment::create(spec.buffer).map_err(|e| no_memory(spec.buffer, &e))?;
        imprint(&segment, &spec, identity);
        Holder::new(door, &spec, segment, Custody::new(), arguments, identity)?
    };
    tracing::info!(volume = %spec.name, restored = arguments.restore, "the interface is ready");
    while !holder.done {
        holder.turn()?;
    }
    let _ = fs::remove_file(&arguments.socket);
    Ok(())
}

/// Two interfaces of one volume would both assume that the gate is theirs.
fn only_one(socket: &Path) -> Result<fs::File, Fatal> {
    let path = socket.with_extension("lock");
    let fault = |e| Fatal::Socket(path.display().to_string(), e);
    let file = fs::File::options().create(true).truncate(false).write(true).open(&path).map_err(fault)?;
    match lock::exclusive(file.as_fd()) {
        Ok(()) => Ok(file),
        Err(LockError::Held(holders)) => Err(Fatal::Second(socket.display().to_string(), holders)),
        Err(LockError::Unsupported(e) | LockError::Io(e)) => Err(fault(e)),
    }
}

fn read_volume(arguments: &Arguments) -> Result<VolumeSpec, Fatal> {
    let bad = |why: String| Fatal::Volume(arguments.volume.display().to_string(), why);
    let text = fs::read_to_string(&arguments.volume).map_err(|e| bad(e.to_string()))?;
    let spec: VolumeSpec = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    spec.validate().map_err(|e| bad(e.to_string()))?;
    Ok(spec)
}

fn no_memory(buffer: u64, e: &io::Error) -> io::Error {
    io::Error::new(
        e.kind(),
        format!(
            "no shared memory for the write buffer of {buffer} bytes ({e}): free memory, or make the volume with a smaller --buffer"
        ),
    )
}

/// Writes the volume's identity into a new segment and makes its write buffer an empty one. The magic is stored last.
fn imprint(segment: &SharedSegment, spec: &VolumeSpec, identity: &Identity) {
    let header = &segment.header;
    let (high, low) = spec.uuid.as_u64_pair();
    header.abi.store(identity.abi.max, Relaxed);
    for (index, value) in buffer::empty(segment.geometry()) {
        segment.buffer_word(index).expect("every segment has a buffer's header").store(value, Release);
    }
    header.buffer_version.store(identity.buffer.max, Relaxed);
    header.volume_uuid[0].store(high, Relaxed);
    header.volume_uuid[1].store(low, Relaxed);
    header.volume_size.store(spec.size, Relaxed);
    header.magic.store(MAGIC, Release);
}
