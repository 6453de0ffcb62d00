//! Law: `unsafe` stands in sys/ only. The compiler denies it by the lints of the workspace; here it is seen that every
//! package has these lints, and that every other root forbids unsafe code, so that no `expect` further down lets it in. That
//! every block has its SAFETY comment is clippy's to see.

use std::path::Path;

use super::{Verdict, reads};
use crate::workspace::Workspace;

const HOME: &str = "sys";
const FORBIDDEN: &str = "#![forbid(unsafe_code)]";
const EXPECTED: &str = "#![expect(unsafe_code,";

pub(super) fn look(workspace: &Workspace) -> Verdict {
    let mut roots = 0;
    let mut violations = Vec::new();
    for package in &workspace.packages {
        if !reads(&package.manifest_path, "[lints]\nworkspace = true") {
            let manifest = workspace.relative(&package.manifest_path);
            violations.push(format!("{}: write [lints] workspace = true", manifest.display()));
        }
        let at_home = workspace.room_of(package) == Path::new(HOME);
        let wanted = if at_home { EXPECTED } else { FORBIDDEN };
        for target in package.targets.iter().filter(|target| !reads(&target.src_path, wanted)) {
            let root = workspace.relative(&target.src_path);
            violations.push(format!("{}: write {wanted} at its head", root.display()));
        }
        roots += package.targets.len();
    }
    Verdict { note: format!("{roots} roots of {} packages; at home in {HOME}/", workspace.packages.len()), violations }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The violations of a package in `room` with this manifest and this root.
    fn violations(room: &str, manifest: &str, root: &str) -> Vec<String> {
        let repository = tempfile::tempdir().unwrap();
        let (top, directory) = (repository.path().display(), repository.path().join(room));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("Cargo.toml"), manifest).unwrap();
        std::fs::write(directory.join("lib.rs"), root).unwrap();
        let target = format!(r#"{{"src_path":"{top}/{room}/lib.rs"}}"#);
        let package = format!(
            r#"{{"name":"p","manifest_path":"{top}/{room}/Cargo.toml","dependencies":[],"targets":[{target}]}}"#
        );
        let json = format!(r#"{{"packages":[{package}],"workspace_root":"{top}","target_directory":"/t"}}"#);
        look(&Workspace::parse(&json).unwrap()).violations
    }

    #[test]
    fn every_root_but_that_of_sys_forbids_it_and_every_package_has_the_lints() {
        let lints = "[package]\nname = \"p\"\n\n[lints]\nworkspace = true\n";
        assert!(violations("core/store", lints, "//! A.\n#![forbid(unsafe_code)]\n\nmod a;\n").is_empty());
        assert!(violations("sys", lints, "//! A.\n#![expect(unsafe_code, reason = \"\")]\n").is_empty());
        assert_eq!(violations("core/store", lints, "//! #![forbid(unsafe_code)]\nmod a;\n").len(), 1);
        assert_eq!(violations("core/store", lints, "#![deny(unsafe_code)]\n").len(), 1);
        assert_eq!(violations("system", lints, "#![expect(unsafe_code, reason = \"\")]\n").len(), 1, "not sys/");
        assert_eq!(violations("core/store", "[package]\n", "#![forbid(unsafe_code)]\n").len(), 1);
        assert_eq!(violations("core/store", "[lints.rust]\nunsafe_code = \"allow\"\n", "").len(), 2);
    }
}
