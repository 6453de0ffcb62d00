//! Where the repository is and which packages it has, as `cargo metadata` tells it.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use crate::TaskError;

/// The packages of the workspace, without their foreign dependencies.
#[derive(Deserialize)]
pub(crate) struct Workspace {
    pub(crate) packages: Vec<Package>,
    pub(crate) workspace_root: PathBuf,
    pub(crate) target_directory: PathBuf,
}

#[derive(Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) manifest_path: PathBuf,
    pub(crate) dependencies: Vec<Dependency>,
    pub(crate) targets: Vec<Target>,
}

#[derive(Deserialize)]
pub(crate) struct Dependency {
    /// `None` is a normal dependency, else "dev" or "build".
    pub(crate) kind: Option<String>,
    /// Where it is, if it is a package of this repository.
    pub(crate) path: Option<PathBuf>,
}

#[derive(Deserialize)]
pub(crate) struct Target {
    pub(crate) src_path: PathBuf,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn load() -> Result<Self, TaskError> {
        let json = output(cargo(&root()).args(["metadata", "--no-deps", "--format-version", "1"]))?;
        Self::parse(&json)
    }

    pub(crate) fn parse(json: &str) -> Result<Self, TaskError> {
        serde_json::from_str(json)
            .map_err(|error| TaskError::Failed(format!("cargo metadata is not understood: {error}")))
    }

    /// The package's directory, relative to the root: its address in the architecture.
    pub(crate) fn room_of(&self, package: &Package) -> PathBuf {
        let directory = package.manifest_path.parent().unwrap_or(Path::new(""));
        self.relative(directory)
    }

    pub(crate) fn relative(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.workspace_root).unwrap_or(path).to_path_buf()
    }

    pub(crate) fn package_in(&self, room: &str) -> Option<&Package> {
        self.packages.iter().find(|package| self.room_of(package) == Path::new(room))
    }
}

/// The root of the repository: the directory above this package.
pub(crate) fn root() -> PathBuf {
    let package =
        std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    package.parent().unwrap_or(&package).to_path_buf()
}

/// The cargo that runs this task, to be started in `root`.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command
}

/// Runs a short command to its end and returns what it printed.
///
/// # Errors
/// It cannot be started, or fails; the message then has what it said on stderr.
pub(crate) fn output(command: &mut Command) -> Result<String, TaskError> {
    let name = format!("{} {}", command.get_program().display(), words(command));
    let output = command.output().map_err(TaskError::io(format!("run {name}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(TaskError::Failed(format!("{name}: {}\n{said}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The arguments of a command as one line, to be shown.
pub(crate) fn words(command: &Command) -> String {
    command.get_args().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
