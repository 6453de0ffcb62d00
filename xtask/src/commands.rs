//! The tasks that run children: test, demo, bench, soak.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::child::Stdout;
use crate::phases::Phases;
use crate::programs::{self, Program};
use crate::workspace::{Workspace, cargo, root};
use crate::{TaskError, guest, setup};

/// Every child of `test` together. They take 25 minutes on two quiet CPUs, and have taken 40 on two that others used as well.
const TEST_LIMIT: Duration = Duration::from_secs(80 * 60);
/// A release build from nothing.
const BUILD_LIMIT: Duration = Duration::from_secs(30 * 60);
const DEMO_LIMIT: Duration = Duration::from_secs(10 * 60);
const BENCH_LIMIT: Duration = Duration::from_secs(2 * 60 * 60);
/// At most this many soak tests, one after another.
const SOAK_TESTS: u32 = 12;

/// Everything that the tests call and the build does not make.
pub(crate) fn set_up() -> Result<(), TaskError> {
    setup::run(programs::TESTS)?;
    guest::run()
}

/// A directory of the programs that the tests may call: the whole of their PATH. A test that calls another one fails here,
/// and not on the first machine that has it not.
struct TestPath(tempfile::TempDir);

impl TestPath {
    /// In the directory for temporary files, for tests become users who may not go into the repository.
    fn new() -> Result<Self, TaskError> {
        let directory = tempfile::Builder::new().prefix("everdisk-programs-").tempdir();
        let directory = directory.map_err(TaskError::io("make a directory of programs"))?;
        let laid = programs::lay(programs::TESTS, &programs::search_path(), directory.path());
        laid.map_err(TaskError::io("make links to programs"))?;
        Ok(Self(directory))
    }

    /// Has `cargo test` start its tests with that PATH; cargo itself, and what it builds with, keep theirs.
    fn of_tests<'a>(&self, test: &'a mut Command) -> &'a mut Command {
        let path = format!("PATH={}", self.0.path().display());
        test.arg("--config").arg(format!("target.'cfg(unix)'.runner=['/usr/bin/env','{path}']"))
    }
}

/// Set-up, check, release build, and every test: the packages beside each other, then end to end one by one, then
/// loom.
pub(crate) fn test() -> Result<(), TaskError> {
    let root = root();
    let mut phases = Phases::within(TEST_LIMIT);
    if !phases.act("set-up", set_up) {
        return phases.finish();
    }
    let path = TestPath::new()?;
    phases.run("check", cargo(&root).args(["xtask", "check"]), Stdout::Inherited);
    let built = phases.run("build", &mut release_build(&root), Stdout::Inherited);
    let units = ["test", "--release", "--workspace", "--exclude", "everdisk-tests", "--no-fail-fast"];
    phases.run("packages", path.of_tests(cargo(&root).args(units)), Stdout::Counted);
    if built {
        let mut end_to_end = cargo(&root);
        path.of_tests(end_to_end.args(["test", "--release", "-p", "everdisk-tests", "--no-fail-fast"]));
        phases.run("end to end", end_to_end.args(["--", "--test-threads=1"]), Stdout::Counted);
    } else {
        phases.skip("end to end", "the build failed");
    }
    phases.run("loom", &mut loom(&root)?, Stdout::Counted);
    phases.finish()
}

/// Upgrades a volume under load before the operator's eyes.
pub(crate) fn demo(arguments: &[String]) -> Result<(), TaskError> {
    run_bench_binary(programs::DEMO, "everdisk-demo", DEMO_LIMIT, arguments)
}

/// Measures, side by side with the peer.
pub(crate) fn bench(arguments: &[String]) -> Result<(), TaskError> {
    run_bench_binary(programs::BENCH, "everdisk-bench", BENCH_LIMIT, arguments)
}

/// The ignored end-to-end tests, each of which goes on for `secs`.
pub(crate) fn soak(secs: u64, arguments: &[String]) -> Result<(), TaskError> {
    set_up()?;
    let path = TestPath::new()?;
    let root = root();
    let mut phases = Phases::within(BUILD_LIMIT + (Duration::from_secs(secs) + DEMO_LIMIT) * SOAK_TESTS);
    if phases.run("build", &mut release_build(&root), Stdout::Inherited) {
        let mut soak = cargo(&root);
        path.of_tests(soak.args(["test", "--release", "-p", "everdisk-tests", "--no-fail-fast"]));
        soak.args(["--", "--ignored", "--test-threads=1"]).args(arguments);
        soak.env("EVERDISK_SOAK_SECS", secs.to_string());
        phases.run("soak", &mut soak, Stdout::Counted);
    }
    phases.finish()
}

fn run_bench_binary(
    programs: &[Program],
    binary: &str,
    limit: Duration,
    arguments: &[String],
) -> Result<(), TaskError> {
    setup::run(programs)?;
    let root = root();
    let ends = |command: &mut Command, limit, what: &str| {
        let ended = crate::child::run(command, std::time::Instant::now() + limit, Stdout::Inherited)?;
        if !ended.left_behind.is_empty() {
            eprintln!("warning: {what} left behind, now killed: {}", ended.left_behind.join(", "));
        }
        if ended.is_success() { Ok(()) } else { Err(TaskError::Failed(format!("{what}: {}", ended.outcome()))) }
    };
    ends(&mut release_build(&root), BUILD_LIMIT, "the release build")?;
    let mut run = cargo(&root);
    run.args(["run", "--release", "-p", "everdisk-benches", "--bin", binary, "--"]).args(arguments);
    ends(&mut run, BUILD_LIMIT + limit, binary)
}

/// The programs of Everdisk and the other cores that the tests upgrade to.
fn release_build(root: &Path) -> Command {
    let mut build = cargo(root);
    build.args(["build", "--release", "--bins"]);
    for package in ["everdisk", "everdiskd", "everdisk-interface", "everdisk-core", "everdisk-tests"] {
        build.args(["-p", package]);
    }
    build
}

/// The model checks of the gate's and the buffer's atomics, in a target directory of their own: the flag rebuilds every
/// dependency.
fn loom(root: &Path) -> Result<Command, TaskError> {
    let target = Workspace::load()?.target_directory.join("loom");
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default() + " --cfg loom";
    let mut test = cargo(root);
    test.args(["test", "--release", "-p", "everdisk-gate", "-p", "everdisk-buffer", "--lib", "--target-dir"])
        .arg(target);
    test.env("RUSTFLAGS", flags.trim());
    Ok(test)
}
