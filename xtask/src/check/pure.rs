//! Law: pure crates decide and do not act. They forbid unsafe code, have no dependency that reaches the system, and
//! touch no file, socket, process, thread or clock outside their tests: what they need of these is handed to them.

use std::path::Path;

use super::Verdict;
use super::closure::{self, Edges};
use crate::TaskError;
use crate::source::{Source, Token};
use crate::workspace::Workspace;

/// The pure crates, by their directories.
const PURE: [&str; 4] = ["proto", "interface/gate", "core/buffer", "control/upgrade"];
/// Not even through others.
const NO_DEPENDENCY: [&str; 6] = ["tokio", "libc", "rustix", "rand", "getrandom", "everdisk-sys"];
const NO_STD: [&str; 4] = ["fs", "net", "process", "thread"];

pub(super) fn look(workspace: &Workspace, sources: &[Source]) -> Result<Verdict, TaskError> {
    let mut violations = Vec::new();
    let mut files = 0;
    for room in PURE {
        let Some(package) = workspace.package_in(room) else {
            violations.push(format!("{room}: no package there; correct the list of pure crates"));
            continue;
        };
        let closure = closure::of(&workspace.workspace_root, &package.name, Edges::Normal)?;
        violations.extend(dependencies(room, &closure));
        for target in
            package.targets.iter().filter(|target| target.kind.iter().any(|kind| kind == "lib" || kind == "bin"))
        {
            let path = workspace.relative(&target.src_path);
            let root = sources.iter().find(|source| source.path == path);
            if !root.is_some_and(forbids_unsafe) {
                violations.push(format!("{}: write #![forbid(unsafe_code)] at its head", path.display()));
            }
        }
        for source in sources.iter().filter(|source| source.path.starts_with(Path::new(room))) {
            files += 1;
            violations.extend(uses(source));
        }
    }
    Ok(Verdict { note: format!("{files} files of {}", PURE.join(", ")), violations })
}

fn dependencies(room: &str, closure: &[String]) -> Vec<String> {
    let found = closure.iter().filter(|name| NO_DEPENDENCY.contains(&name.as_str()));
    found
        .map(|name| {
            format!("{room}: depends on {name}, directly or through others (see `cargo tree -e normal -i {name}`)")
        })
        .collect()
}

fn forbids_unsafe(source: &Source) -> bool {
    let tokens = source.product_tokens();
    let wanted = ["#", "!", "[", "forbid", "(", "unsafe_code", ")", "]"];
    tokens.windows(wanted.len()).any(|window| window.iter().map(|token| token.text).eq(wanted))
}

/// Every use of the system in the product code of a file.
fn uses(source: &Source) -> Vec<String> {
    let tokens = source.product_tokens();
    let mut found = Vec::new();
    for (index, token) in tokens.iter().enumerate() {
        let follows = |texts: &[&str]| {
            let rest = tokens.get(index + 1..).unwrap_or(&[]);
            rest.len() >= texts.len() && rest.iter().zip(texts).all(|(token, text)| token.text == *text)
        };
        match token.text {
            "std" if follows(&["::"]) => {
                let children = children(&tokens, index + 2);
                let forbidden = children.into_iter().filter(|child| NO_STD.contains(&child.text));
                found.extend(forbidden.map(|child| (child.offset, format!("std::{}", child.text))));
            }
            "Instant" if follows(&["::", "now"]) => found.push((token.offset, "Instant::now".to_owned())),
            "SystemTime" => found.push((token.offset, "SystemTime".to_owned())),
            _ => {}
        }
    }
    let place = |offset| format!("{}:{}", source.path.display(), source.line(offset));
    found
        .into_iter()
        .map(|(offset, what)| format!("{}: {what}: have it handed in by the caller", place(offset)))
        .collect()
}

/// The first names under a path prefix: one after `std::`, or all heads of `std::{…}`.
fn children<'a>(tokens: &[Token<'a>], at: usize) -> Vec<Token<'a>> {
    let Some(first) = tokens.get(at) else { return Vec::new() };
    if first.text != "{" {
        return vec![*first];
    }
    let mut depth = 0_usize;
    let mut heads = Vec::new();
    for pair in tokens.get(at..).unwrap_or(&[]).windows(2) {
        let [token, next] = pair else { break };
        match token.text {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
        if depth == 1 && matches!(token.text, "{" | ",") && next.is_word() {
            heads.push(*next);
        }
    }
    heads
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(raw: &str) -> Vec<String> {
        let strip = |line: String| line.split(": ").nth(1).unwrap_or("").to_owned();
        uses(&Source::parse("proto/src/a.rs", raw)).into_iter().map(strip).collect()
    }

    #[test]
    fn the_system_is_found_however_it_is_named() {
        assert_eq!(found("use std::fs::File;"), ["std::fs"]);
        assert_eq!(found("fn a() { ::std::net::TcpStream::connect(x); }"), ["std::net"]);
        assert_eq!(
            found("use std::{collections::{BTreeMap, fs}, process::{self, Command}, thread};"),
            ["std::process", "std::thread"]
        );
        assert_eq!(found("std :: fs :: read(x)"), ["std::fs"]);
        assert_eq!(found("use std::time::{Duration, Instant}; let a = Instant::now();"), ["Instant::now"]);
        assert_eq!(found("std::time::Instant::now()"), ["Instant::now"]);
        assert_eq!(found("use std::time::SystemTime;"), ["SystemTime"]);
    }

    #[test]
    fn the_rest_of_std_and_tests_are_free() {
        assert!(found("use std::{collections::BTreeMap, time::{Duration, Instant}}; fn a(now: Instant) {}").is_empty());
        assert!(found("// std::fs\nconst A: &str = \"std::fs\"; mod fs; use crate::thread;").is_empty());
        assert!(found("#[cfg(test)] mod tests { use std::fs; fn a() { std::time::Instant::now(); } }").is_empty());
    }

    #[test]
    fn the_place_is_told() {
        let uses = uses(&Source::parse("proto/src/a.rs", "//! A.\n\nuse std::fs;"));
        assert!(uses[0].starts_with("proto/src/a.rs:3: std::fs"), "{}", uses[0]);
    }

    #[test]
    fn unsafe_code_must_be_forbidden_in_earnest() {
        let forbids = |raw| forbids_unsafe(&Source::parse("proto/src/lib.rs", raw));
        assert!(forbids("//! A.\n#![forbid(unsafe_code)]\nmod a;"));
        assert!(!forbids("//! #![forbid(unsafe_code)]\nmod a;"));
        assert!(!forbids("#![deny(unsafe_code)]"));
    }

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
        assert_eq!(look(&workspace, &[]).unwrap().violations.len(), PURE.len());
    }
}
