//! Law: the bytes of a published version stand. The golden files of the newest release tag are the same today. That
//! each is read and written is tested in proto/src/golden.rs.

use std::path::Path;
use std::process::Command;

use super::Verdict;
use crate::TaskError;
use crate::workspace::output;

const GOLDEN: &str = "proto/golden";

pub(super) fn look(root: &Path) -> Result<Verdict, TaskError> {
    let Some(tag) = newest_tag(root) else {
        return Ok(Verdict { note: "no release tag yet, so none to compare with".to_owned(), violations: Vec::new() });
    };
    Ok(Verdict { note: format!("compared with {tag}"), violations: changed(root, &tag)? })
}

/// The newest tag `v…`; `None` also where there is no git, or no history (a shallow clone, an archive).
fn newest_tag(root: &Path) -> Option<String> {
    let tags = output(git(root).args(["tag", "--list", "v*", "--sort=-version:refname"])).ok()?;
    tags.lines().next().map(str::to_owned)
}

/// Golden files of `tag` that are gone or other bytes in the working tree.
fn changed(root: &Path, tag: &str) -> Result<Vec<String>, TaskError> {
    let listed = output(git(root).args(["ls-tree", "-r", "--name-only", "-z", tag, "--", GOLDEN]))?;
    let mut violations = Vec::new();
    for path in listed.split_terminator('\0') {
        // The name of the bytes: of those in the tag, and of those in the working tree.
        let then = output(git(root).args(["rev-parse", &format!("{tag}:{path}")]))?;
        let now = output(git(root).args(["hash-object", "--no-filters", "--", path])).ok();
        let remedy = "restore it, and write a new version to a new file";
        match now {
            Some(now) if now == then => {}
            Some(_) => violations.push(format!("{path}: other bytes than in {tag}: {remedy}")),
            None => violations.push(format!("{path}: gone since {tag}: {remedy}")),
        }
    }
    Ok(violations)
}

fn git(root: &Path) -> Command {
    let mut command = Command::new("git");
    command.arg("-C").arg(root);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A repository with one golden file, committed and tagged.
    fn tagged() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join(GOLDEN)).unwrap();
        std::fs::write(root.path().join(GOLDEN).join("a-v1.hex"), "00ff\n").unwrap();
        assert_eq!(newest_tag(root.path()), None, "no git");
        for arguments in ["init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m a", "tag v0.9.0"] {
            output(git(root.path()).args(arguments.split(' '))).unwrap();
        }
        root
    }

    #[test]
    fn bytes_of_a_release_stand() {
        let root = tagged();
        let golden = root.path().join(GOLDEN);
        assert_eq!(newest_tag(root.path()).as_deref(), Some("v0.9.0"));
        std::fs::write(golden.join("a-v2.hex"), "a new file is free").unwrap();
        assert!(changed(root.path(), "v0.9.0").unwrap().is_empty());
        std::fs::write(golden.join("a-v1.hex"), "00fe\n").unwrap();
        assert!(changed(root.path(), "v0.9.0").unwrap()[0].contains("other bytes than in v0.9.0"));
        std::fs::remove_file(golden.join("a-v1.hex")).unwrap();
        assert!(changed(root.path(), "v0.9.0").unwrap()[0].contains("gone since v0.9.0"));
    }

    #[test]
    fn the_newest_tag_is_by_version() {
        let root = tagged();
        output(git(root.path()).args(["tag", "v0.10.0"])).unwrap();
        assert_eq!(newest_tag(root.path()).as_deref(), Some("v0.10.0"));
        assert_eq!(look(root.path()).unwrap().note, "compared with v0.10.0");
    }
}
