//! A core that misbehaves in one chosen way, to be wrapped in a shell script that passes the first argument:
//! `everdisk-core-scripted SCRIPT --volume … --interface … --control-dir …`.
//!
//! | script | what it does |
//! |---|---|
//! | `exit` | ends at once with status 3 and a line on stderr |
//! | `hang` | never connects; `hang-version` hangs on `--version` too |
//! | `other-abi` | names an ABI range that this interface does not have |
//! | `garbage` | sends bytes that are no frame to the interface, then hangs |
//! | `mute` | joins and reports itself armed, but never answers the control module |
//! | `no-workers` | joins and reports itself armed, but never takes the gate |
//! | `die-when-given` | joins, and ends as soon as the gate is offered to it |
//! | `open-and-die` | opens the gate for itself and ends, without executing anything |
#![forbid(unsafe_code)]

use std::{
    error::Error,
    os::fd::AsFd,
    path::PathBuf,
    process::ExitCode,
    sync::atomic::Ordering::{Acquire, SeqCst},
    thread,
    time::Duration,
};

use everdisk_gate::ticket;
use everdisk_proto::{
    frame::{CoreAnswer, CoreRequest, FromInterface, ToInterface},
    gate_word::{GateWord, Mode},
    identity::{Component, Identity},
    segment::probe_verdict,
    version::VersionRange,
};
use everdisk_sys::{
    link::Link,
    memory::SharedSegment,
    packet,
    wake::{self, Who},
};

const FOREVER: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let script = arguments.first().map_or("", String::as_str);
    let abi = if script == "other-abi" {
        VersionRange { min: 900, max: 901 }
    } else {
        Identity::current(Component::Core).abi
    };
    let identity = Identity { version: format!("0.9.0-{script}"), abi, ..Identity::current(Component::Core) };
    if arguments.iter().any(|a| a == "--version") {
        if script == "hang-version" {
            thread::sleep(FOREVER);
        }
        println!("{identity}");
        return ExitCode::SUCCESS;
    }
    match script {
        "exit" => {
            eprintln!("everdisk-core: scripted to fail at once");
            ExitCode::from(3)
        }
        "hang" => {
            thread::sleep(FOREVER);
            ExitCode::SUCCESS
        }
        _ => match join(script, &identity, &arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("everdisk-core-scripted: {error}");
                ExitCode::FAILURE
            }
        },
    }
}

fn value(arguments: &[String], name: &str) -> Option<PathBuf> {
    let at = arguments.iter().position(|a| a == name)?;
    arguments.get(at + 1).map(PathBuf::from)
}

fn join(script: &str, identity: &Identity, arguments: &[String]) -> Result<(), Box<dyn Error>> {
    let dir = value(arguments, "--control-dir").ok_or("no --control-dir")?;
    let interface = value(arguments, "--interface").ok_or("no --interface")?;
    answer_control(&dir, script == "mute")?;
    if script == "garbage" {
        let socket = packet::connect(&interface)?;
        packet::send(socket.as_fd(), b"\x00\xffthis is no frame", &[])?;
        thread::sleep(FOREVER);
    }
    let link = Link::<ToInterface, FromInterface>::connect(&interface)?;
    link.send(1, ToInterface::Hello { identity: identity.clone(), slot: None, keeps_locks: false }, &[])?;
    let (frame, mut fds) = link.recv_within(FOREVER)?;
    let FromInterface::Welcome { slot, .. } = frame.body else { return Err(format!("{frame:?}").into()) };
    let segment = SharedSegment::adopt(fds.pop().ok_or("no segment")?)?;
    link.send(2, ToInterface::Armed { fronts: 1 }, &[])?;
    loop {
        let word = GateWord::decode(segment.gate.word.load(Acquire));
        let Some(probe) = word.filter(|w| w.slot == slot && w.mode == Mode::Probe) else {
            if matches!(link.recv_within(Duration::from_micros(100)), Ok((f, _)) if f.body == FromInterface::Quit) {
                return Ok(());
            }
            continue;
        };
        match script {
            "die-when-given" => return Ok(()),
            "open-and-die" => {
                let opened = ticket::open_after_probe(&segment.gate.word, probe);
                if opened {
                    segment.gate.probe.store(probe_verdict::PASSED, SeqCst);
                    wake::wake(&segment.gate.probe, Who::All);
                    thread::sleep(Duration::from_millis(20));
                }
                return Ok(());
            }
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Says yes to everything the control module asks, or nothing at all.
fn answer_control(dir: &std::path::Path, mute: bool) -> Result<(), Box<dyn Error>> {
    let listener = packet::listen(&dir.join(format!("core-{}.sock", std::process::id())))?;
    thread::spawn(move || {
        while let Ok(socket) = packet::accept(listener.as_fd()) {
            thread::spawn(move || {
                let link = Link::<CoreAnswer, CoreRequest>::new(socket);
                while let Ok((frame, _)) = link.recv_within(FOREVER) {
                    if mute {
                        continue;
                    }
                    let answer = match frame.body {
                        CoreRequest::Flush { .. } => CoreAnswer::Flushed,
                        CoreRequest::Follow => CoreAnswer::Following { buffered_bytes: 0 },
                        CoreRequest::Verify { blocks } => CoreAnswer::Verified { blocks },
                        CoreRequest::Status => CoreAnswer::Status { nodes: Vec::new() },
                    };
                    if link.send(frame.id, answer, &[]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(())
}
