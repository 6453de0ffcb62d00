//! Children that run to their end under a deadline. Each has a process group of its own: a Ctrl-C at the terminal is
//! for us to deal with.

use std::{
    io::Read,
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use everdisk_sys::{link::wait_readable, process::pidfd};

use crate::{Error, Result};

/// What a child that ended left.
#[derive(Debug)]
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// Its output.
    pub stdout: String,
    /// Its errors.
    pub stderr: String,
}

impl Ended {
    /// The last line of its errors, or its status when it said nothing.
    pub fn complaint(&self) -> String {
        let line = self.stderr.lines().rev().map(str::trim).find(|line| !line.is_empty());
        line.map_or_else(|| self.status.to_string(), str::to_owned)
    }
}

/// Name of the program, for messages.
pub fn name(command: &Command) -> String {
    std::path::Path::new(command.get_program()).file_name().unwrap_or_default().display().to_string()
}

/// Runs a command to its end; kills it when `limit` is over.
///
/// # Errors
/// It cannot be started or did not end. A child that fails is no error here.
pub fn run(command: &mut Command, limit: Duration) -> Result<Ended> {
    let name = name(command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().map_err(Error::io(format!("start {name}")))?;
    let stdout = child.stdout.take().map(listen);
    let stderr = child.stderr.take().map(listen);
    let handle = pidfd(child.id()).map_err(Error::io(format!("watch {name}")))?;
    let ended = wait_readable(handle.as_fd(), limit).unwrap_or(false);
    if !ended {
        let _ = child.kill();
    }
    let status = child.wait().map_err(Error::io(format!("wait for {name}")))?;
    if !ended {
        return Err(Error::Failed(format!("{name} did not end within {limit:?} and was killed")));
    }
    let said = |listener: Option<thread::JoinHandle<String>>| listener.and_then(|l| l.join().ok()).unwrap_or_default();
    Ok(Ended { status, stdout: said(stdout), stderr: said(stderr) })
}

fn listen(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
