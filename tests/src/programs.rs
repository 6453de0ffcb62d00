//! The programs under test, and cores that misbehave. What is missing fails clearly.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use everdisk_proto::{
    identity::{Component, Identity},
    version::{ABI, VersionRange},
};

pub use everdisk_harness::programs::*;

/// Names the environment variable with which the programs of the next ABI are of the one after it.
pub const ABI_AFTER: &str = "EVERDISK_TEST_ABI_AFTER";

/// The identity of a program whose ABI is the one after this build's, with the same layouts. It works with segments of its own ABI and
/// of the one before.
pub fn of_next_abi(component: Component) -> Identity {
    let after = env::var_os(ABI_AFTER).is_some();
    let newest = ABI + if after { 2 } else { 1 };
    let version = if after { VERSION_ABI_AFTER } else { VERSION_ABI_NEXT };
    let abi = VersionRange { min: newest - 1, max: newest };
    Identity { version: version.to_owned(), abi, ..Identity::current(component) }
}

/// The program of a component of the next ABI.
pub fn abi_next(component: Component) -> PathBuf {
    program(&format!("{}-abi-next", component.program()))
}

/// The program of a component of the ABI after the next.
pub fn abi_after(directory: &Path, component: Component) -> PathBuf {
    let text = format!("{ABI_AFTER}=1 exec '{}' \"$@\"", abi_next(component).display());
    script(&directory.join(format!("{}-abi-after", component.program())), &text)
}

/// Version of the programs of the next ABI.
pub const VERSION_ABI_NEXT: &str = "0.3.0-abi-next";
/// Version of those of the ABI after it.
pub const VERSION_ABI_AFTER: &str = "0.4.0-abi-after";

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
