//! The command line. Two options do not justify a parser library in the process with the smallest closure.

use std::{ffi::OsString, path::PathBuf};

/// The command line in words.
pub(crate) const USAGE: &str = "everdisk-interface --volume SPEC.json --socket PATH [--restore]";

/// What `--help` prints.
pub(crate) const HELP: &str = "\
The interface module of Everdisk: keeps a volume's front ends and its segment, and lends them to the cores.

The control module, everdiskd, starts it, one for each volume that is attached.

Usage: everdisk-interface --volume SPEC.json --socket PATH [--restore]

Options:
      --volume SPEC.json  The volume's description
      --socket PATH       Where to listen for the control module and the cores
      --restore           Take the descriptors back from the cores of an interface that has died
      --version           Print the version and the ABI
  -h, --help              Print this
";

/// What to run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// The volume's description.
    pub(crate) volume: PathBuf,
    /// Where to listen.
    pub(crate) socket: PathBuf,
    /// Take up what a dead interface left with the cores.
    pub(crate) restore: bool,
}

/// What was asked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// Serve.
    Run(Arguments),
    /// Print the version.
    Version,
    /// Print [`HELP`].
    Help,
}

/// Reads the arguments after the program's name.
pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Parsed, String> {
    let (mut volume, mut socket, mut restore) = (None, None, false);
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().map(PathBuf::from).ok_or(format!("{} needs a value", argument.display()));
        match argument.to_str() {
            Some("--version") => return Ok(Parsed::Version),
            Some("--help" | "-h") => return Ok(Parsed::Help),
            Some("--volume") => volume = Some(value()?),
            Some("--socket") => socket = Some(value()?),
            Some("--restore") => restore = true,
            _ => return Err(format!("unknown argument {}", argument.display())),
        }
    }
    match (volume, socket) {
        (Some(volume), Some(socket)) => Ok(Parsed::Run(Arguments { volume, socket, restore })),
        _ => Err("--volume and --socket are needed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_paths_are_needed_and_nothing_unknown_is_taken() {
        let run = |line: &str| parse(line.split_whitespace().map(OsString::from));
        assert!(matches!(run("--volume a --socket b --restore"), Ok(Parsed::Run(a)) if a.restore));
        assert_eq!(run("--version"), Ok(Parsed::Version));
        for help in ["--help", "-h", "--volume a --help"] {
            assert_eq!(run(help), Ok(Parsed::Help), "{help}");
        }
        for option in ["--volume", "--socket", "--restore", "--version", "--help"] {
            assert!(HELP.contains(option), "{option}");
        }
        assert!(HELP.contains(USAGE));
        for bad in ["", "--volume a", "--volume", "--volume a --socket b c"] {
            assert!(run(bad).is_err(), "{bad}");
        }
    }
}
