//! `doctor`: checks what Everdisk needs from this machine, and says how to fix what is missing. It only reads.

use std::{
    env,
    fs::{self, File},
    io,
    path::PathBuf,
};

use everdisk_api::directories::Directories;
use everdisk_proto::limits::{CHANNELS_MAX, LEASE_MAX, REQUEST_BYTES_MAX};
use everdisk_sys::process;
use rustix::{
    process::{Resource, getrlimit},
    system::uname,
};
use serde_json::json;

use crate::{failure::Failure, output};

mod running;

/// First kernel with FUSE_NOTIFY_RESEND.
const KERNEL_MIN: (u32, u32) = (6, 9);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

impl Verdict {
    const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

#[derive(Debug)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, found: found.into(), fix: None }
    }

    fn warn(check: &'static str, found: impl Into<String>, fix: &'static str) -> Self {
        Self { check, verdict: Verdict::Warn, found: found.into(), fix: Some(fix.to_owned()) }
    }

    fn fail(check: &'static str, found: impl Into<String>, fix: &'static str) -> Self {
        Self { check, verdict: Verdict::Fail, found: found.into(), fix: Some(fix.to_owned()) }
    }
}

/// Prints one line for each check.
///
/// # Errors
/// Something that Everdisk cannot do without is missing.
pub(crate) fn doctor(json: bool, root: bool, directories: Result<Directories, String>) -> Result<(), Failure> {
    let mut findings = vec![
        kernel(&uname().release().to_string_lossy()),
        device(),
        programs(),
        request_timeout(),
        hung_task(),
        losetup(),
    ];
    findings.extend([descriptors(), file_size()]);
    if !root {
        findings.extend([fusermount(), allow_other()]);
    }
    findings.push(locked_memory());
    findings.extend(running::findings(directories));
    let failed = findings.iter().filter(|f| f.verdict == Verdict::Fail).count();
    if json {
        let checks: Vec<_> = findings
            .iter()
            .map(|f| json!({ "check": f.check, "result": f.verdict.name(), "found": f.found, "fix": f.fix }))
            .collect();
        output::json(&json!({ "ok": failed == 0, "checks": checks }));
    } else {
        for finding in &findings {
            let fix = finding.fix.as_ref().map_or(String::new(), |fix| format!(": {fix}"));
            output::line(&format!("{:<5}{:<18}{}{fix}", finding.verdict.name(), finding.check, finding.found));
        }
    }
    match failed {
        0 => Ok(()),
        n => {
            Err(Failure::Other(format!("{n} of {} checks failed: see the lines that begin with fail", findings.len())))
        }
    }
}

/// The first two numbers of a kernel's release: `6.9` of `6.9.3-amd64`.
fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    numbers.next().flatten().zip(numbers.next().flatten())
}

fn kernel(release: &str) -> Finding {
    let Some(version) = version_of(release) else {
        return Finding::fail("kernel", format!("{release:?} is no release of Linux"), "run kernel 6.9 or newer");
    };
    if version >= KERNEL_MIN {
        Finding::ok("kernel", format!("{release} can give out requests again (FUSE_NOTIFY_RESEND)"))
    } else {
        let found = format!("{release} cannot give out requests again to the next core (FUSE_NOTIFY_RESEND)");
        Finding::fail("kernel", found, "run kernel 6.9 or newer")
    }
}

fn device() -> Finding {
    match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Finding::ok("/dev/fuse", "can be opened"),
        Err(e) => Finding::fail(
            "/dev/fuse",
            format!("cannot be opened ({e})"),
            "load the module (modprobe fuse) and let this user in (chmod 0666 /dev/fuse, or a udev rule)",
        ),
    }
}

/// The programs the control module starts.
fn programs() -> Finding {
    let fix = "install them beside this command, or set EVERDISK_LIBEXEC";
    let directory = match env::var_os("EVERDISK_LIBEXEC").filter(|directory| !directory.is_empty()) {
        Some(directory) => PathBuf::from(directory),
        None => match env::current_exe() {
            Ok(own) => own.parent().expect("a program lies in a directory").to_owned(),
            Err(e) => return Finding::fail("programs", format!("where this command lies is not known ({e})"), fix),
        },
    };
    let missing: Vec<&str> = ["everdiskd", "everdisk-interface", "everdisk-core"]
        .into_iter()
        .filter(|name| !directory.join(name).is_file())
        .collect();
    if missing.is_empty() {
        return Finding::ok("programs", format!("all in {}", directory.display()));
    }
    let found = format!("{} not in {}", missing.join(", "), directory.display());
    Finding::fail("programs", found, fix)
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn request_timeout() -> Finding {
    let limits = ["default_request_timeout", "max_request_timeout"];
    let set = limits.into_iter().filter_map(|name| number(&format!("/proc/sys/fs/fuse/{name}")));
    judge_timeout(set.filter(|seconds| *seconds > 0).min())
}

/// `seconds`: the shortest timeout that the kernel sets for FUSE requests.
fn judge_timeout(seconds: Option<u64>) -> Finding {
    match seconds {
        Some(seconds) if seconds <= LEASE_MAX.as_secs() => Finding::warn(
            "request timeout",
            format!(
                "the kernel aborts the volume when a request takes {seconds} s, but a suspension may take {} s",
                LEASE_MAX.as_secs()
            ),
            "set /proc/sys/fs/fuse/default_request_timeout and max_request_timeout to 0, or give shorter leases",
        ),
        Some(seconds) => Finding::ok("request timeout", format!("{seconds} s, longer than any lease")),
        None => Finding::ok("request timeout", "the kernel sets no timeout for FUSE requests"),
    }
}

fn hung_task() -> Finding {
    match number("/proc/sys/kernel/hung_task_timeout_secs") {
        Some(seconds) if seconds > 0 && seconds <= LEASE_MAX.as_secs() => Finding::warn(
            "hung tasks",
            format!("the kernel warns after {seconds} s, but a suspension may take {} s", LEASE_MAX.as_secs()),
            "set /proc/sys/kernel/hung_task_timeout_secs to 120, or give shorter leases",
        ),
        _ => Finding::ok("hung tasks", "the kernel does not warn within the longest lease"),
    }
}

/// Searches `PATH` for a program, as a shell does.
fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    let places = env::split_paths(&path).chain(["/sbin", "/usr/sbin"].map(PathBuf::from));
    places.map(|place| place.join(name)).find(|program| program.is_file())
}

fn losetup() -> Finding {
    match on_path("losetup") {
        Some(program) => Finding::ok("losetup", program.display().to_string()),
        None => Finding::warn("losetup", "not found", "install util-linux to make block devices of volumes"),
    }
}

fn fusermount() -> Finding {
    match on_path("fusermount3") {
        Some(program) => Finding::ok("fusermount3", program.display().to_string()),
        None => Finding::fail("fusermount3", "not found, and only root can mount without it", "install fuse3"),
    }
}

/// Request and reply buffers are locked in memory: if a core dies while one is paged in, an application gets EIO. At
/// rest there is one of each for every channel.
fn locked_memory() -> Finding {
    let needed = (2 * CHANNELS_MAX * REQUEST_BYTES_MAX) as u64;
    match process::lockable_bytes() {
        Some(limit) if limit < needed => Finding::warn(
            "locked memory",
            format!("{limit} bytes may be locked, but {needed} are needed at rest"),
            "raise RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK=) where everdiskd is started",
        ),
        _ => Finding::ok("locked memory", "enough may be locked"),
    }
}

/// What the busiest process needs: every NBD connection, storage node and listener.
const DESCRIPTORS: u64 = 512;

fn descriptors() -> Finding {
    let most = getrlimit(Resource::Nofile).maximum;
    match most {
        Some(limit) if limit < DESCRIPTORS => Finding::warn(
            "descriptors",
            format!(
                "a process may have {limit}, but {DESCRIPTORS} are needed to hold all NBD connections and storage nodes"
            ),
            "raise RLIMIT_NOFILE (ulimit -Hn, LimitNOFILE=) where everdiskd is started",
        ),
        _ => Finding::ok("descriptors", "a process may have enough"),
    }
}

fn file_size() -> Finding {
    match getrlimit(Resource::Fsize).maximum {
        Some(limit) => Finding::warn(
            "file size",
            format!("a file may have {limit} bytes; a longer volume cannot be attached"),
            "raise RLIMIT_FSIZE (ulimit -Hf, LimitFSIZE=) where everdiskd is started",
        ),
        None => Finding::ok("file size", "not limited"),
    }
}

fn allow_other() -> Finding {
    let text = match fs::read_to_string("/etc/fuse.conf") {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Finding::warn(
                "user_allow_other",
                format!("/etc/fuse.conf cannot be read ({e})"),
                "let this user read /etc/fuse.conf",
            );
        }
        // Where the file is missing nothing is set.
        read => read.unwrap_or_default(),
    };
    if text.lines().any(|line| line.trim() == "user_allow_other") {
        return Finding::ok("user_allow_other", "set in /etc/fuse.conf");
    }
    Finding::warn(
        "user_allow_other",
        "not set: --allow-other will be refused",
        "add user_allow_other to /etc/fuse.conf",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_before_6_9_fail() {
        for (release, verdict) in [
            ("6.18.44-x", Verdict::Ok),
            ("6.9.0", Verdict::Ok),
            ("7.0-rc1", Verdict::Ok),
            ("6.1.0-30-amd64", Verdict::Fail),
            ("5.15.0", Verdict::Fail),
            ("", Verdict::Fail),
        ] {
            assert_eq!(kernel(release).verdict, verdict, "{release}");
        }
    }

    #[test]
    fn a_timeout_within_the_longest_lease_is_warned_of() {
        assert_eq!(judge_timeout(None).verdict, Verdict::Ok);
        assert_eq!(judge_timeout(Some(600)).verdict, Verdict::Ok);
        assert_eq!(judge_timeout(Some(60)).verdict, Verdict::Warn);
    }
}
