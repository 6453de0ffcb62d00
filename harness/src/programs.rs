//! Where the programs of the build and the foreign programs are.

use std::{env, path::PathBuf};

use crate::{Error, Result, pass};

/// What a host runs.
pub const PROGRAMS: [&str; 4] = ["everdisk", "everdiskd", "everdisk-interface", "everdisk-core"];
/// The core of another version.
pub const CORE_NEXT: &str = "everdisk-core-next";
/// The cores whose storage nodes obey [`Faults`](crate::faults::Faults), of this version and of another one.
pub const FAULTY: [&str; 2] = ["everdisk-core-faulty", "everdisk-core-faulty-next"];

/// Version of [`core`].
pub const VERSION: &str = everdisk_proto::version::PRODUCT;
/// Version of [`core_next`].
pub const VERSION_NEXT: &str = "0.2.0-next";

/// The directory of the programs: that of the build this program belongs to.
pub fn directory() -> PathBuf {
    let own = env::current_exe().expect("the path of this program");
    let directory = own.parent().expect("a program lies in a directory");
    // Tests lie one deeper.
    if directory.ends_with("deps") { directory.parent().expect("deps/ lies in a directory") } else { directory }
        .to_owned()
}

/// One of the programs of the build.
///
/// # Errors
/// It was not built.
pub fn try_program(name: &str) -> Result<PathBuf> {
    let path = directory().join(name);
    if path.is_file() {
        return Ok(path);
    }
    let all = "-p everdisk -p everdiskd -p everdisk-interface -p everdisk-core -p everdisk-tests";
    Err(Error::Failed(format!("{} is not there: `cargo build --release --bins {all}` first", path.display())))
}

/// One of the programs of the build.
pub fn program(name: &str) -> PathBuf {
    pass(try_program(name))
}

/// The core of this release.
pub fn core() -> PathBuf {
    program("everdisk-core")
}

/// The core of another version.
pub fn core_next() -> PathBuf {
    program(CORE_NEXT)
}

/// The core of this release, on storage nodes that obey [`Faults`](crate::faults::Faults).
pub fn core_faulty() -> PathBuf {
    program(FAULTY[0])
}

/// The core of another version, on storage nodes that obey [`Faults`](crate::faults::Faults).
pub fn core_faulty_next() -> PathBuf {
    program(FAULTY[1])
}

/// Fails unless a foreign program can be found.
pub fn need(name: &str) {
    let path = env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let there = name.contains('/') || env::split_paths(&path).chain(administrators).any(|d| d.join(name).is_file());
    assert!(there, "the program {name} is missing: `cargo xtask test` installs what the tests call");
}
