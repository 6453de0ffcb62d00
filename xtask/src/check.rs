//! `cargo xtask check`: formatting, clippy, and the laws of the architecture. A law is a function from the
//! repository to a [`Verdict`]; each stands in its own module, with tests that show it a violation.

mod closure;
mod golden;
mod graph;
mod pure;
mod unsafe_code;

use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::child::{self, Stdout};
use crate::source::{self, Source};
use crate::workspace::Workspace;
use crate::{TaskError, commands};

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
    /// `unsafe` stands below sys/ only.
    Unsafe,
    /// The interface's dependencies are few and plain.
    Closure,
    /// Golden files are tested and never change.
    Golden,
}

/// What a law says of the repository.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// What was looked at, in a few words.
    pub(crate) note: String,
    /// Each says where, what, and what to do. None: the law is kept.
    pub(crate) violations: Vec<String>,
}

/// The laws look at this.
struct Repository {
    workspace: Workspace,
    sources: Vec<Source>,
}

/// Checks everything, or `only` some; reports all violations before it fails.
///
/// # Errors
/// A law is broken, or could not be looked at.
pub(crate) fn run(only: &[Law]) -> Result<(), TaskError> {
    let workspace = Workspace::load()?;
    let sources = source::load(&workspace.workspace_root)?;
    let repository = Repository { workspace, sources };
    let mut broken = Vec::new();
    for law in Law::value_variants().iter().filter(|law| only.is_empty() || only.contains(law)) {
        let name = law.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        match look(*law, &repository) {
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

fn look(law: Law, Repository { workspace, sources }: &Repository) -> Result<Verdict, TaskError> {
    match law {
        Law::Fmt | Law::Clippy => lint(law),
        Law::Graph => Ok(graph::look(workspace)),
        Law::Pure => pure::look(workspace, sources),
        Law::Unsafe => Ok(unsafe_code::look(sources)),
        Law::Closure => closure::look(&workspace.workspace_root),
        Law::Golden => golden::look(&workspace.workspace_root, sources),
    }
}

fn lint(law: Law) -> Result<Verdict, TaskError> {
    let Some(mut command) = commands::lint(law) else { return Ok(Verdict::default()) };
    let ended = child::run(&mut command, Instant::now() + LINT_LIMIT, Stdout::Inherited)?;
    let note = "the workspace with all its targets".to_owned();
    if ended.is_success() {
        return Ok(Verdict { note, violations: Vec::new() });
    }
    let remedy = if law == Law::Fmt { "run `cargo fmt --all`" } else { "see above" };
    Ok(Verdict { note, violations: vec![format!("{}: {remedy}", ended.outcome())] })
}
