//! The command line. The control module fills it in; people use `--version`.

use std::path::PathBuf;

use clap::Parser;

/// The question that `--check` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Check {
    /// A core could serve from every storage node.
    Serve,
    /// Every storage node is there, is the volume's and may be removed.
    Delete,
    /// Every storage node is there, is the volume's, is not in use and holds a part of --bytes.
    Resize,
}

/// The core module of Everdisk: executes a volume's requests on its storage nodes.
#[derive(Debug, Parser)]
#[command(name = "everdisk-core", disable_version_flag = true)]
pub(crate) struct Arguments {
    /// Print the version and the formats this core can serve.
    #[arg(long)]
    pub(crate) version: bool,
    /// The volume's description (JSON).
    #[arg(long, value_name = "FILE")]
    pub(crate) volume: Option<PathBuf>,
    /// The socket of the volume's interface.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) interface: Option<PathBuf>,
    /// Directory for this core's own socket, core-PID.sock.
    #[arg(long, value_name = "DIR")]
    pub(crate) control_dir: Option<PathBuf>,
    /// Prepare the storage nodes of a new volume, and end.
    #[arg(long, group = "task")]
    pub(crate) create: bool,
    /// With --create: make the directories of the storage nodes too.
    #[arg(long, requires = "create")]
    pub(crate) create_dir: bool,
    /// With --create: format exports that are not empty too; their data are lost.
    #[arg(long, requires = "create")]
    pub(crate) force: bool,
    /// Say whether the volume could be served, or deleted, and end. Changes nothing.
    #[arg(long, group = "task", value_name = "WHAT")]
    pub(crate) check: Option<Check>,
    /// With --check resize: the size in question.
    #[arg(long, value_name = "BYTES", required_if_eq("check", "resize"))]
    pub(crate) bytes: Option<u64>,
    /// Remove the volume from its storage nodes, and end.
    #[arg(long, group = "task")]
    pub(crate) destroy: bool,
    /// Enlarge the volume on its storage nodes, and end.
    #[arg(long, group = "task", value_name = "BYTES")]
    pub(crate) resize: Option<u64>,
}
