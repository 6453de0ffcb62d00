//! Law: pure crates decide and do not act; what they need of files, sockets, processes, threads and clocks is handed to
//! them. Two have no std, so the compiler sees to it. Two have a list of what clippy refuses there. No dependency of
//! theirs reaches the system either, which is checked here.

use std::path::Path;

use super::closure::{self, Edges};
use super::{Verdict, reads};
use crate::TaskError;
use crate::workspace::Workspace;

/// What keeps std from a pure crate.
enum Fence {
    /// It has none.
    NoStd,
    /// Clippy refuses what is on the list beside its manifest.
    List,
}

/// The pure crates, by their directories.
const PURE: [(&str, Fence); 4] = [
    ("proto", Fence::List),
    ("interface/gate", Fence::NoStd),
    ("core/buffer", Fence::NoStd),
    ("control/upgrade", Fence::List),
];
/// Not even through others.
const NO_DEPENDENCY: [&str; 6] = ["tokio", "libc", "rustix", "rand", "getrandom", "everdisk-sys"];
/// Tests, and the model checks of loom, have std.
const NO_STD: &str = "#![cfg_attr(not(any(test, loom)), no_std)]";
/// On every list.
const LISTED: [&str; 3] = ["\"std::fs::read\",", "\"std::thread::spawn\",", "\"std::time::Instant::now\","];

pub(super) fn look(workspace: &Workspace) -> Result<Verdict, TaskError> {
    let mut violations = Vec::new();
    for (room, fence) in &PURE {
        let Some(package) = workspace.package_in(room) else {
            violations.push(format!("{room}: no package there; correct the list of pure crates"));
            continue;
        };
        let closure = closure::of(&workspace.workspace_root, &package.name, Edges::Normal)?;
        violations.extend(dependencies(room, &closure));
        violations.extend(unfenced(&workspace.workspace_root.join(room), fence).map(|why| format!("{room}: {why}")));
    }
    let rooms: Vec<&str> = PURE.iter().map(|(room, _)| *room).collect();
    Ok(Verdict { note: rooms.join(", "), violations })
}

fn dependencies(room: &str, closure: &[String]) -> Vec<String> {
    let found = closure.iter().filter(|name| NO_DEPENDENCY.contains(&name.as_str()));
    found
        .map(|name| {
            format!("{room}: depends on {name}, directly or through others (see `cargo tree -e normal -i {name}`)")
        })
        .collect()
}

/// Why nothing keeps std from the crate in `directory`, if so.
fn unfenced(directory: &Path, fence: &Fence) -> Option<String> {
    let (file, lines): (_, &[&str]) = match fence {
        Fence::NoStd => ("src/lib.rs", &[NO_STD]),
        Fence::List => ("clippy.toml", &LISTED),
    };
    let missing = lines.iter().find(|line| !reads(&directory.join(file), line))?;
    Some(format!("{file} lacks the line {missing}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_found_in_the_closure() {
        let closure = ["everdisk-gate", "thiserror", "libc"].map(str::to_owned);
        let violations = dependencies("interface/gate", &closure);
        assert_eq!(violations.len(), 1);
        assert!(violations[0].contains("libc"));
    }

    #[test]
    fn a_pure_crate_that_is_gone_is_told() {
        let workspace = Workspace::parse(r#"{"packages":[],"workspace_root":"/r","target_directory":"/t"}"#).unwrap();
        assert_eq!(look(&workspace).unwrap().violations.len(), PURE.len());
    }

    #[test]
    fn a_fence_that_is_gone_is_told() {
        let room = tempfile::tempdir().unwrap();
        std::fs::create_dir(room.path().join("src")).unwrap();
        let lib = |text: &str| std::fs::write(room.path().join("src/lib.rs"), text).unwrap();
        let list = |text: &str| std::fs::write(room.path().join("clippy.toml"), text).unwrap();
        assert!(unfenced(room.path(), &Fence::NoStd).is_some());
        lib("//! A.\n#![cfg_attr(not(test), no_std)]\n");
        assert!(unfenced(room.path(), &Fence::NoStd).is_some());
        lib("//! A.\n#![cfg_attr(not(any(test, loom)), no_std)]\n");
        assert!(unfenced(room.path(), &Fence::NoStd).is_none());
        assert!(unfenced(room.path(), &Fence::List).is_some());
        list("disallowed-methods = [\n    \"std::fs::read\",\n    \"std::thread::spawn\",\n]\n");
        assert!(unfenced(room.path(), &Fence::List).unwrap().contains("Instant::now"));
        list(&format!("disallowed-methods = [\n    {}\n]\n", LISTED.join("\n    ")));
        assert!(unfenced(room.path(), &Fence::List).is_none());
    }
}
