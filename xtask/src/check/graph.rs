//! Law: the three rooms do not depend on each other; they meet in proto/. The exceptions: core/process
//! runs the interface's gate and transport, and core/engine executes under the gate's contract. What all rooms stand on (proto, sys, telemetry) depends on no room, and
//! product code depends on nothing made for tests. Development dependencies are free.

use std::path::Path;

use super::Verdict;
use crate::workspace::Workspace;

const ROOMS: [&str; 3] = ["interface", "core", "control"];
const FOUNDATION: [&str; 3] = ["proto", "sys", "telemetry"];
const FOR_TESTS: [&str; 5] = ["testkit", "harness", "tests", "benches", "xtask"];
const EXCEPTIONS: [(&str, &str); 3] =
    [("core/engine", "interface/gate"), ("core/process", "interface/gate"), ("core/process", "interface/transport")];

pub(super) fn look(workspace: &Workspace) -> Verdict {
    let mut edges = 0;
    let mut violations = Vec::new();
    for package in &workspace.packages {
        let from = workspace.room_of(package);
        for dependency in package.dependencies.iter().filter(|dependency| dependency.kind.as_deref() != Some("dev")) {
            let Some(path) = &dependency.path else { continue };
            let to = workspace.relative(path);
            edges += 1;
            if let Some(why) = objection(&from, &to) {
                violations.push(format!("{} depends on {}: {why}", from.display(), to.display()));
            }
        }
    }
    Verdict { note: format!("{edges} dependencies between {} packages", workspace.packages.len()), violations }
}

/// Why a package at `from` must not depend on one at `to`.
fn objection(from: &Path, to: &Path) -> Option<&'static str> {
    let first = |path: &Path| path.iter().next().map(|room| room.to_string_lossy().into_owned()).unwrap_or_default();
    let (here, there) = (first(from), first(to));
    let is_in = |set: &[&str], room: &str| set.contains(&room);
    if is_in(&FOR_TESTS, &here) || here == there {
        return None;
    }
    if is_in(&FOR_TESTS, &there) {
        return Some("product code has no dependency on code for tests, but as a dev-dependency");
    }
    if !is_in(&ROOMS, &there) || EXCEPTIONS.iter().any(|(a, b)| from == Path::new(a) && to == Path::new(b)) {
        return None;
    }
    if is_in(&FOUNDATION, &here) {
        return Some("the foundation depends on no room");
    }
    Some("the rooms meet in proto/; put what both need there")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(room: &str, dependencies: &[(&str, &str)]) -> String {
        let dependencies: Vec<String> = dependencies
            .iter()
            .map(|(to, kind)| format!(r#"{{"name":"x","kind":{kind},"path":"/r/{to}"}}"#))
            .chain(std::iter::once(r#"{"name":"clap","kind":null}"#.to_owned()))
            .collect();
        let dependencies = dependencies.join(",");
        format!(r#"{{"name":"p","manifest_path":"/r/{room}/Cargo.toml","targets":[],"dependencies":[{dependencies}]}}"#)
    }

    fn verdict(room: &str, to: &str, kind: &str) -> Verdict {
        let package = package(room, &[(to, kind)]);
        let json = format!(r#"{{"packages":[{package}],"workspace_root":"/r","target_directory":"/r/target"}}"#);
        look(&Workspace::parse(&json).unwrap())
    }

    #[track_caller]
    fn bites(room: &str, to: &str, kind: &str) {
        let verdict = verdict(room, to, kind);
        assert_eq!(verdict.violations.len(), 1, "{room} → {to}");
        assert!(verdict.violations[0].contains(room) && verdict.violations[0].contains(to));
    }

    #[track_caller]
    fn allows(room: &str, to: &str, kind: &str) {
        let verdict = verdict(room, to, kind);
        assert_eq!(verdict.violations, [""; 0], "{room} → {to}");
        let seen = if kind == "\"dev\"" { "0 dependencies" } else { "1 dependencies" };
        assert!(verdict.note.starts_with(seen), "{room} → {to}: {}", verdict.note);
    }

    #[test]
    fn rooms_must_not_depend_on_each_other() {
        for (from, to) in
            [("core/store", "interface/gate"), ("control/daemon", "core/store"), ("interface/holder", "control/api")]
        {
            bites(from, to, "null");
            bites(from, to, "\"build\"");
            allows(from, to, "\"dev\"");
        }
    }

    #[test]
    fn the_exceptions_are_no_wider_than_they_say() {
        allows("core/engine", "interface/gate", "null");
        allows("core/process", "interface/gate", "null");
        allows("core/process", "interface/transport", "null");
        bites("core/process", "interface/holder", "null");
        bites("core/process", "control/api", "null");
        bites("core/engine", "interface/transport", "null");
        bites("core/engine", "interface/holder", "null");
        bites("core/buffer", "interface/gate", "null");
        bites("interface/gate", "core/process", "null");
    }

    #[test]
    fn the_foundation_and_code_for_tests() {
        allows("core/engine", "core/store", "null");
        allows("core/engine", "proto", "null");
        allows("tests", "core/engine", "null");
        allows("testkit", "control/api", "null");
        allows("benches", "interface/gate", "null");
        bites("proto", "interface/gate", "null");
        bites("core/engine", "testkit", "null");
        for room in ["core/process", "interface/holder", "control/daemon", "proto", "sys"] {
            bites(room, "harness", "null");
            bites(room, "harness", "\"build\"");
        }
        allows("tests", "harness", "null");
        allows("harness", "sys", "null");
    }
}
