//! Law: what the interface module is built of is little and plain, because it is replaced least often.

use std::collections::BTreeSet;
use std::path::Path;

use super::Verdict;
use crate::TaskError;
use crate::workspace::{cargo, output};

const PACKAGE: &str = "everdisk-interface";
/// The package itself is counted.
const PACKAGES_MAX: usize = 60;
/// No asynchronous runtime, no HTTP, no TLS. A trailing `*` stands for any ending.
const DENIED: [&str; 10] =
    ["tokio*", "async-*", "futures*", "smol", "hyper*", "axum*", "h2", "rustls*", "openssl*", "native-tls"];

/// Which dependencies belong to a closure.
#[derive(Clone, Copy)]
pub(super) enum Edges {
    /// What is linked, or expands macros.
    Normal,
    /// Build scripts and what they need, too.
    NormalAndBuild,
}

pub(super) fn look(root: &Path) -> Result<Verdict, TaskError> {
    Ok(judge(&of(root, PACKAGE, Edges::NormalAndBuild)?))
}

fn judge(closure: &[String]) -> Verdict {
    let count = closure.len();
    let denied = closure.iter().filter(|name| is_denied(name));
    let mut violations: Vec<String> =
        denied.map(|name| format!("{PACKAGE} depends on {name} (see `cargo tree -p {PACKAGE} -i {name}`)")).collect();
    if count > PACKAGES_MAX {
        violations.push(format!("{PACKAGE} is built of {count} packages; at most {PACKAGES_MAX} are allowed"));
    }
    Verdict { note: format!("{PACKAGE} is built of {count} packages (at most {PACKAGES_MAX})"), violations }
}

fn is_denied(name: &str) -> bool {
    DENIED.iter().any(|denied| denied.strip_suffix('*').map_or(name == *denied, |head| name.starts_with(head)))
}

/// The names of the packages that `package` is built of, itself included, for this platform and with the features it
/// has when it is built alone. A name that occurs in two versions occurs twice.
///
/// # Errors
/// `cargo tree` fails.
pub(super) fn of(root: &Path, package: &str, edges: Edges) -> Result<Vec<String>, TaskError> {
    let edges = match edges {
        Edges::Normal => "normal",
        Edges::NormalAndBuild => "normal,build",
    };
    let arguments = ["tree", "--prefix", "none", "--format", "{p}", "-p", package, "-e", edges];
    Ok(parse(&output(cargo(root).args(arguments))?))
}

/// Lines are "name vVERSION (path or proc-macro) (*)".
fn parse(tree: &str) -> Vec<String> {
    let words = tree.lines().filter_map(|line| line.split_once(' '));
    let packages: BTreeSet<(&str, &str)> =
        words.map(|(name, rest)| (name, rest.split(' ').next().unwrap_or(""))).collect();
    packages.into_iter().map(|(name, _)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_counted_once_a_version() {
        let tree = "everdisk-interface v0.1.0 (/r/interface/holder)\nlibc v0.2.180\nserde_derive v1.0.1 (proc-macro)\n\
                    syn v1.0.9\nsyn v2.0.1\nlibc v0.2.180 (*)\n\n";
        assert_eq!(parse(tree), ["everdisk-interface", "libc", "serde_derive", "syn", "syn"]);
    }

    #[test]
    fn too_many_packages_are_refused() {
        let many: Vec<String> = (0..=PACKAGES_MAX).map(|number| format!("p{number}")).collect();
        assert!(judge(&many[1..]).violations.is_empty());
        let verdict = judge(&many);
        assert_eq!(verdict.violations.len(), 1);
        assert!(verdict.note.contains("61"));
    }

    #[test]
    fn runtimes_http_and_tls_are_refused() {
        let closure = ["tokio-util", "async-trait", "hyper", "rustls-pki-types", "openssl-sys", "native-tls", "axum"];
        assert_eq!(judge(&closure.map(str::to_owned)).violations.len(), closure.len());
        let plain = ["rustix", "libc", "serde", "h2o", "smolder"];
        assert!(judge(&plain.map(str::to_owned)).violations.is_empty());
    }
}
