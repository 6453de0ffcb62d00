//! `cargo xtask check`: formatting, clippy, and the laws of the architecture. A law is a function from the
//! repository to a [`Verdict`]; each stands in its own module, with tests that show it a violation.

mod closure;
mod golden;
mod graph;
mod pure;
mod unsafe_code;

use std::path::Path;
use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::TaskError;
use crate::child::{self, Stdout};
use crate::workspace::{Workspace, cargo};

/// For clippy on an empty target directory.
const LINT_LIMIT: Duration = Duration::from_secs(20 * 60);

/// What can be checked by itself.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Law {
    /// rustfmt changes nothing.
    Fmt,
    /// clippy has no warning.
    Clippy,
    /// interface/, core/ and control/ do not depend on each other.
    Graph,
    /// Pure crates touch no clock, file, socket, process or thread.
    Pure,
    /// `unsafe` stands in sys/ only.
    Unsafe,
    /// The interface's dependencies are few and plain.
    Closure,
    /// Golden files of a release never change.
    Golden,
}

/// What a law says of the repository.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// What was checked, in a few words.
    pub(crate) note: String,
    /// Each says where, what, and what to do. None: the law is kept.
    pub(crate) violations: Vec<String>,
}

/// Checks everything, or `only` some; reports all violations before it fails.
///
/// # Errors
/// A law is broken, or could not be checked.
pub(crate) fn run(only: &[Law]) -> Result<(), TaskError> {
    let workspace = Workspace::load()?;
    let mut broken = Vec::new();
    for law in Law::value_variants().iter().filter(|law| only.is_empty() || only.contains(law)) {
        let name = law.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        match look(*law, &workspace) {
            Ok(Verdict { note, violations }) if violations.is_empty() => println!("{name:<8} ok: {note}"),
            Ok(Verdict { note, violations }) => {
                println!("{name:<8} BROKEN: {note}");
                for violation in violations {
                    println!("  {violation}");
                }
                broken.push(name);
            }
            Err(error) => {
                println!("{name:<8} BROKEN: {error}");
                broken.push(name);
            }
        }
    }
    if broken.is_empty() { Ok(()) } else { Err(TaskError::Failed(format!("check: broken: {}", broken.join(", ")))) }
}

fn look(law: Law, workspace: &Workspace) -> Result<Verdict, TaskError> {
    let root = &workspace.workspace_root;
    match law {
        Law::Fmt => lint(root, &["fmt", "--all", "--check"], "run `cargo fmt --all`"),
        Law::Clippy => lint(root, &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], "see above"),
        Law::Graph => Ok(graph::look(workspace)),
        Law::Pure => pure::look(workspace),
        Law::Unsafe => Ok(unsafe_code::look(workspace)),
        Law::Closure => closure::look(root),
        Law::Golden => golden::look(root),
    }
}

fn lint(root: &Path, arguments: &[&str], remedy: &str) -> Result<Verdict, TaskError> {
    let ended = child::run(cargo(root).args(arguments), Instant::now() + LINT_LIMIT, Stdout::Inherited)?;
    let note = "the workspace with all its targets".to_owned();
    let violations = if ended.is_success() { Vec::new() } else { vec![format!("{}: {remedy}", ended.outcome())] };
    Ok(Verdict { note, violations })
}

/// Whether a line of the file begins with `text`, leading blanks aside; not, where it cannot be read. `text` may go on over
/// further lines.
fn reads(file: &Path, text: &str) -> bool {
    let read = std::fs::read_to_string(file).unwrap_or_default();
    read.match_indices(text).any(|(at, _)| read[..at].rsplit('\n').next().is_some_and(|head| head.trim().is_empty()))
}
