//! The programs under test, and cores that misbehave. What is missing fails clearly.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

pub use everdisk_harness::programs::*;

/// Fails unless the test runs as root.
pub fn need_root() {
    assert!(rustix::process::geteuid().is_root(), "this test mounts, kills and changes users: run it as root");
}

/// Writes an executable shell script.
pub fn script(path: &Path, text: &str) -> PathBuf {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).expect("write a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("make a script executable");
    path.to_owned()
}

/// A core, good otherwise, that says that it cannot adopt a write buffer.
pub fn core_without_buffer(directory: &Path) -> PathBuf {
    let text = format!("EVERDISK_TEST_NO_BUFFER=1 exec '{}' \"$@\"", core_faulty().display());
    script(&directory.join("core-without-buffer"), &text)
}

/// A core that misbehaves as `everdisk-core-scripted` says.
pub fn scripted_core(directory: &Path, name: &str) -> PathBuf {
    let scripted = program("everdisk-core-scripted");
    let text = format!("exec '{}' {name} \"$@\"", scripted.display());
    script(&directory.join(format!("core-{name}")), &text)
}
