//! The programs a volume runs: where they are, what they say of themselves, and running one to its end.

use std::{
    env,
    ffi::OsStr,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::{
        fs::OpenOptionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use everdisk_proto::{
    identity::{Component, Identity},
    limits::HANG_LIMIT_DEFAULT,
};
use everdisk_sys::{link::wait_readable, process::pidfd};
use std::os::fd::AsFd;

use crate::{
    durable,
    error::{Doing, Error, Result},
    origin::{Digest, PROGRAM_BYTES_MAX, Source},
};

/// Names the directory of the programs, when it is not that of this one.
pub const LIBEXEC_VARIABLE: &str = "EVERDISK_LIBEXEC";
/// Most bytes of output that are read from a program.
const OUTPUT_MAX: u64 = 4096;
/// For this long another thread's fork can hold the descriptor through which a program was just written.
const TEXT_BUSY_WITHIN: Duration = Duration::from_secs(2);

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    directory: PathBuf,
    /// Digest of the program of this process, once it was read.
    own: Option<String>,
    /// What an interface is started with: a core that serves may be silent for this long while requests wait.
    pub hang_limit: Duration,
}

/// What a program that has ended left.
struct Ended {
    status: ExitStatus,
    /// Its output, at most [`OUTPUT_MAX`] bytes.
    stdout: String,
    /// Its last line of error.
    complaint: String,
}

impl Programs {
    /// The directory of this program, or `EVERDISK_LIBEXEC`.
    ///
    /// # Errors
    /// The operating system's.
    pub fn find() -> io::Result<Self> {
        if let Some(directory) = env::var_os(LIBEXEC_VARIABLE).filter(|v| !v.is_empty()) {
            return Ok(Self { directory: directory.into(), own: None, hang_limit: HANG_LIMIT_DEFAULT });
        }
        let own = env::current_exe()?;
        // The kernel calls a file that a mount consists of "/".
        let unknown = || io::Error::other("it is not known in which directory the program of this process lies");
        let directory = own.parent().ok_or_else(unknown)?.to_owned();
        Ok(Self { directory, own: None, hang_limit: HANG_LIMIT_DEFAULT })
    }

    /// Those in `directory`.
    #[cfg(test)]
    pub(crate) fn in_directory(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), own: None, hang_limit: HANG_LIMIT_DEFAULT }
    }

    /// Reads the program of this process, for its digest.
    ///
    /// # Errors
    /// The operating system's.
    pub fn digest_own(&mut self) -> io::Result<()> {
        self.own = Some(digest(&mut File::open("/proc/self/exe")?)?);
        Ok(())
    }

    /// Digest of the program of this process, once it was read.
    pub fn own_digest(&self) -> Option<&str> {
        self.own.as_deref()
    }

    /// `everdisk-interface`.
    pub fn interface(&self) -> PathBuf {
        self.directory.join("everdisk-interface")
    }

    /// `everdisk-core`, the one volumes start with.
    pub fn core(&self) -> PathBuf {
        self.directory.join("everdisk-core")
    }
}

/// Starts a command, again while the kernel says that its program is being written.
///
/// # Errors
/// The operating system's.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    let deadline = Instant::now() + TEXT_BUSY_WITHIN;
    loop {
        match command.spawn() {
            Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Runs a program, called `name` in messages, to its end; kills it, and whatever it started, when `limit` is over.
///
/// # Errors
/// It cannot be started or does not end.
fn run<A: AsRef<OsStr>>(program: &Path, name: &Path, arguments: &[A], limit: Duration) -> Result<Ended> {
    let name = name.display();
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = spawn(&mut command).doing(|| format!("start {name}"))?;
    let deadline = Instant::now() + limit;
    let stdout = listen(child.stdout.take().expect("its output was piped"));
    let stderr = listen(child.stderr.take().expect("its errors were piped"));
    let waiting = || {
        let listening = (stdout?, stderr?);
        Ok(wait_readable(pidfd(child.id())?.as_fd(), limit)?.then_some(listening))
    };
    let (status, (stdout, stderr)) = match waiting() {
        Ok(Some(listening)) => {
            let unknown = |e| Error::Killed(format!("{name} ended, and it is not known how: {e}"));
            (child.wait().map_err(unknown)?, listening)
        }
        other => return Err(kill(child, &name.to_string(), other.err(), limit)),
    };
    // A grandchild may hold the pipes for longer: then what was said is not known.
    let said = |words: mpsc::Receiver<Vec<u8>>| {
        let left = deadline.saturating_duration_since(Instant::now()).min(Duration::from_secs(1));
        // Words that have not come by then are none.
        String::from_utf8_lossy(&words.recv_timeout(left).unwrap_or_default()).into_owned()
    };
    Ok(Ended { status, stdout: said(stdout), complaint: last_line(&said(stderr)) })
}

/// Kills a program that has not ended within `limit`, or cannot be waited for, and whatever it started. Either way it has not done its
/// work and has not undone it.
fn kill(mut child: Child, name: &str, unwaited: Option<io::Error>, limit: Duration) -> Error {
    kill_group(child.id());
    // It may hang in the kernel for longer, so a separate thread waits for it. Without one it is a zombie until this process ends.
    let _ = thread::Builder::new().spawn(move || child.wait());
    Error::Killed(match unwaited {
        Some(e) => format!("{name} was killed, because it could not be waited for: {e}"),
        None => format!("{name} did not end within {limit:?} and was killed"),
    })
}

/// Runs a program that has to succeed.
///
/// # Errors
/// Its last line of error.
pub fn run_well<A: AsRef<OsStr>>(program: &Path, arguments: &[A], limit: Duration) -> Result<String> {
    run_named(program, program, arguments, limit)
}

fn run_named<A: AsRef<OsStr>>(program: &Path, name: &Path, arguments: &[A], limit: Duration) -> Result<String> {
    let ended = run(program, name, arguments, limit)?;
    if ended.status.success() {
        return Ok(ended.stdout);
    }
    let complaint = match ended.complaint.as_str() {
        "" => format!("{} ended with {} without a message", name.display(), ended.status),
        complaint => complaint.to_owned(),
    };
    Err(if ended.status.signal().is_some() { Error::Killed(complaint) } else { Error::Failed(complaint) })
}

fn listen(pipe: impl Read + Send + 'static) -> io::Result<mpsc::Receiver<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new().spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error counts.
        let _ = pipe.take(OUTPUT_MAX).read_to_end(&mut bytes);
        // It is not waited for any more once the program was killed.
        let _ = sender.send(bytes);
    })?;
    Ok(receiver)
}

fn kill_group(leader: u32) {
    let pid = i32::try_from(leader).ok().and_then(rustix::process::Pid::from_raw);
    let pid = pid.expect("the id of a child is positive and has 31 bits");
    // The group may have ended by itself.
    let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
}

/// The last line that is not empty, without the control characters a hostile program could send to a terminal.
pub fn last_line(text: &str) -> String {
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    line.chars().filter(|c| !c.is_control()).take(500).collect()
}

/// Asks a program, called `name` in messages, whether it is of this component.
///
/// # Errors
/// It is not, or does not answer.
pub fn identify(component: Component, program: &Path, name: &Path, limit: Duration) -> Result<Identity> {
    let out = run_named(program, name, &["--version"], limit)?;
    let no_such = |why: String| Error::Failed(format!("{} is not an {}: {why}", name.display(), component.program()));
    let identity = Identity::parse(&out).map_err(|e| no_such(e.to_string()))?;
    if identity.component != component {
        return Err(no_such(format!("it is {identity}")));
    }
    Ok(identity)
}

/// Whether a core can serve a segment of this ABI.
///
/// # Errors
/// It cannot, and what to do.
pub fn serves(core: &Identity, abi: u32) -> Result<()> {
    if core.abi.contains(abi) {
        return Ok(());
    }
    Err(Error::Failed(format!(
        "everdisk-core {} serves segments of ABI {}, and that of this volume has ABI {abi}: upgrade to a core of a version in between, whose range \
         holds ABI {abi}; or detach the volume and attach it again, which makes a segment of the ABI of the interface that is installed",
        core.version, core.abi
    )))
}

/// SHA-256 of a program, in hexadecimal.
///
/// # Errors
/// The operating system's.
pub fn digest(program: &mut impl Read) -> io::Result<String> {
    let mut digest = Digest::default();
    let mut chunk = vec![0; 1 << 20];
    loop {
        match program.read(&mut chunk)? {
            0 => return Ok(digest.end()),
            n => digest.update(chunk.get(..n).expect("read fills no more than it was given")),
        }
    }
}

/// Copies a program to `target`, durable and executable; gives the SHA-256 of what was copied.
///
/// # Errors
/// It cannot be copied within `limit`.
pub fn copy(source: &mut Source, target: &Path, limit: Duration) -> Result<String> {
    let deadline = Instant::now() + limit;
    let name = source.name().display().to_string();
    let directory = target.parent().expect("a program is copied into a directory of its own");
    let above = directory.parent().expect("which lies in that of its component");
    let copying = || format!("copy {name} to {}", target.display());
    durable::make_dir(directory).doing(copying)?;
    let mut from = source.take(PROGRAM_BYTES_MAX);
    let mut to = OpenOptions::new().write(true).create_new(true).mode(0o755).open(target).doing(copying)?;
    let mut digest = Digest::default();
    let mut chunk = vec![0; 1 << 20];
    loop {
        let n = from.read(&mut chunk).doing(copying)?;
        if n == 0 {
            break;
        }
        let read = chunk.get(..n).expect("read fills no more than it was given");
        to.write_all(read).doing(copying)?;
        digest.update(read);
        if Instant::now() > deadline {
            return Err(Error::Failed(format!("copying {name} took longer than {limit:?}")));
        }
    }
    to.sync_all().doing(copying)?;
    durable::sync_dir(directory).doing(copying)?;
    durable::sync_dir(above).doing(copying)?;
    Ok(digest.end())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn script(directory: &Path, text: &str) -> PathBuf {
        let path = directory.join("program");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn a_program_is_known_by_its_version_line() {
        let dir = tempfile::tempdir().unwrap();
        let core = script(dir.path(), "echo 'everdisk-core 9.8.7 (abi 7..8, buffer 0..0)'");
        let identity = identify(Component::Core, &core, &core, SOON).unwrap();
        assert_eq!(identity.version, "9.8.7");
        let as_interface = identify(Component::Interface, &core, &core, SOON).unwrap_err().to_string();
        assert!(as_interface.contains("is not an everdisk-interface: it is everdisk-core 9.8.7"), "{as_interface}");
        let foreign = identify(Component::Core, Path::new("/bin/true"), Path::new("called"), SOON).unwrap_err();
        assert!(foreign.to_string().contains("called is not an everdisk-core"), "{foreign}");
        for served in [7, 8] {
            serves(&identity, served).unwrap();
        }
        for unserved in [6, 9] {
            let why = serves(&identity, unserved).unwrap_err().to_string();
            let words = ["serves segments of ABI 7..8", &format!("has ABI {unserved}"), "detach the volume"];
            assert!(words.iter().all(|words| why.contains(words)), "{why}");
        }
    }

    #[test]
    fn a_program_that_hangs_or_babbles_or_fails_is_dealt_with() {
        let dir = tempfile::tempdir().unwrap();
        let began = Instant::now();
        let hangs = script(dir.path(), "sleep 60 & sleep 60");
        let error = identify(Component::Core, &hangs, &hangs, Duration::from_millis(200)).unwrap_err();
        assert!(error.to_string().contains("did not end within"), "{error}");
        let babbles = script(dir.path(), "while :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyy; done");
        assert!(identify(Component::Core, &babbles, &babbles, SOON).is_err());
        let fails = script(dir.path(), "echo first >&2; echo 'the store is missing' >&2; exit 1");
        assert_eq!(run_well(&fails, &["x"], SOON).unwrap_err().to_string(), "the store is missing");
        assert!(began.elapsed() < SOON);
    }

    /// A program that cannot be waited for (no descriptor is left) is killed, and counts as killed: what it has begun has to be undone.
    #[test]
    fn a_program_that_cannot_be_waited_for_counts_as_killed() {
        let mut command = Command::new("sleep");
        let child = spawn(command.arg("60").process_group(0)).unwrap();
        let process = crate::process::ProcessId::of(child.id()).unwrap();
        let why = kill(child, "it", Some(rustix::io::Errno::MFILE.into()), SOON);
        assert!(matches!(&why, Error::Killed(words) if words.contains("could not be waited for")), "{why}");
        assert!(process.gone_within(SOON));
    }

    #[test]
    fn a_program_is_copied_whole_with_its_digest() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("cores/1/everdisk-core");
        let copied = || copy(&mut Source::open(Path::new("/bin/true"), Component::Core)?, &target, SOON);
        let digest = copied().unwrap();
        assert!(run_well(&target, &["x"], SOON).is_ok());
        let known = run_well(Path::new("/usr/bin/sha256sum"), &[&target], SOON).unwrap();
        assert!(known.starts_with(&digest), "{digest}: {known}");
        assert!(copied().is_err(), "a program in use is never overwritten");
    }

    #[test]
    fn the_last_line_is_plain_text() {
        assert_eq!(last_line("a\n\x1b[31mb\n\n"), "[31mb");
        assert_eq!(last_line(""), "");
    }
}
