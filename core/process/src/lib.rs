//! The core module's process. It opens the stores, joins the interface, and serves the front ends that are lent to it
//! when the gate admits it.
//!
//! ```text
//!  open stores ─► listen for control ─► Hello ─► Welcome, segment ─► Lend, channels ─► workers parked ─► Armed
//!                                         ▲                                                               │
//!                                         └────────── the interface died: connect again, give back ◄──────┘
//! ```
//! It is a library, so that a test build can make a core of another version (and another behaviour) from the same
//! parts.
#![forbid(unsafe_code)]

mod args;
mod control;
mod disk;
mod gate;
mod keeper;
mod membership;
mod nodes;
mod workers;

use std::{
    fs,
    path::Path,
    process::ExitCode,
    sync::{Arc, OnceLock},
};

use clap::Parser;
use everdisk_engine::{Creation, Engine};
use everdisk_proto::{identity::Identity, volume::VolumeSpec};
use everdisk_store::Store;
use everdisk_sys::privileges;

/// Why a core ends.
#[derive(Debug, thiserror::Error)]
enum Fatal {
    /// The description cannot be read or is invalid.
    #[error("{0}: {1}")]
    Volume(String, String),
    /// A store failed.
    #[error(transparent)]
    Open(#[from] everdisk_engine::OpenError),
    /// The operating system failed: sockets, memory.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The volume was detached, and its last writes are not durable.
    #[error("the last flush failed, what was written since the one before may be lost with the power: {0}")]
    LastFlush(String),
    /// The interface refused this core, or broke the protocol.
    #[error("the interface: {0}")]
    Interface(String),
}

/// Wraps a store that was opened for serving. Tests put stores that fail around the real ones.
pub type Wrap<'a> = &'a dyn Fn(Arc<dyn Store>) -> Arc<dyn Store>;

/// Runs the program of a core with this identity.
pub fn run(identity: &Identity) -> ExitCode {
    run_with(identity, &|store| store)
}

/// Runs the program of a core with this identity, on stores passed through `wrap`.
pub fn run_with(identity: &Identity, wrap: Wrap<'_>) -> ExitCode {
    let arguments = args::Arguments::parse();
    if arguments.version {
        println!("{identity}");
        return ExitCode::SUCCESS;
    }
    everdisk_telemetry::init();
    match dispatch(&arguments, identity, wrap) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("everdisk-core: {error}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(arguments: &args::Arguments, identity: &Identity, wrap: Wrap<'_>) -> Result<(), Fatal> {
    let Some(volume) = &arguments.volume else {
        return Err(Fatal::Volume("--volume".to_owned(), "name the volume's description".to_owned()));
    };
    let spec = read_volume(volume)?;
    if let Some(done) = task(arguments, &spec) {
        return done;
    }
    let (Some(interface), Some(control_dir)) = (&arguments.interface, &arguments.control_dir) else {
        return Err(Fatal::Interface("--interface and --control-dir are needed to serve".to_owned()));
    };
    everdisk_sys::process::serve_io();
    privileges::keep_only(privileges::OPENING)?;
    everdisk_sys::process::prefault_program();
    everdisk_sys::signal::install_evict()?;
    let engine = Arc::new(Engine::open_with(&spec, wrap)?);
    // Before there is a second thread, because privileges belong to a thread. The control module has chosen every path
    // that is opened from here on.
    privileges::keep_only(privileges::SERVING)?;
    nodes::watch(&engine)?;
    let joined = Arc::new(OnceLock::new());
    let control = control::listen(control_dir, Arc::clone(&engine), Arc::clone(&joined))?;
    let result = membership::serve(&spec, identity, &engine, interface, &joined);
    drop(control);
    result
}

/// Runs a task that needs no interface, if one was given. What the control module has to know of the outcome goes to
/// stdout, one line each: a word, the index of the storage node, and numbers.
fn task(arguments: &args::Arguments, spec: &VolumeSpec) -> Option<Result<(), Fatal>> {
    let done = if arguments.create {
        create(spec, arguments.create_dir, arguments.force)
    } else if let Some(size) = arguments.resize {
        Engine::resize(spec, size).map(|()| tell_shortages(spec, size))
    } else if arguments.destroy {
        Engine::destroy(spec).map(|gone| gone.iter().for_each(|place| println!("gone {place}")))
    } else {
        match arguments.check? {
            args::Check::Serve => Engine::check_open(spec),
            args::Check::Delete => Engine::check_destroy(spec),
            args::Check::Resize => {
                Engine::check_resize(spec, arguments.bytes.expect("the command line asks for it with this check"))
            }
        }
    };
    Some(done.map_err(Fatal::from))
}

fn create(spec: &VolumeSpec, create_dir: bool, force: bool) -> Result<(), everdisk_engine::OpenError> {
    if !create_dir {
        Engine::check_directories(spec)?;
    }
    Engine::create_with(spec, Creation { force })?.iter().for_each(|place| println!("made {place}"));
    tell_shortages(spec, spec.size);
    Ok(())
}

fn tell_shortages(spec: &VolumeSpec, size: u64) {
    for (place, free, needed) in Engine::short_of_room(spec, size) {
        println!("short {place} {free} {needed}");
    }
}

fn read_volume(path: &Path) -> Result<VolumeSpec, Fatal> {
    let bad = |why: String| Fatal::Volume(path.display().to_string(), why);
    let text = fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
    let spec: VolumeSpec = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    spec.validate().map_err(|e| bad(e.to_string()))?;
    Ok(spec)
}
