//! The command line. Two options do not justify a parser library in the process with the smallest closure.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use everdisk_proto::limits::{HANG_LIMIT_DEFAULT, HANG_LIMIT_MIN};

/// The command line in words.
pub(crate) const USAGE: &str = "everdisk-interface --volume SPEC.json --socket PATH [--restore] [--hang-limit MS]";

/// What `--help` prints.
pub(crate) const HELP: &str = "\
The interface module of Everdisk: keeps a volume's front ends and its segment, and lends them to the cores.

The control module, everdiskd, starts it, one for each volume that is attached.

Usage: everdisk-interface --volume SPEC.json --socket PATH [--restore] [--hang-limit MS]

Options:
      --volume SPEC.json  The volume's description
      --socket PATH       Where to listen for the control module and the cores
      --restore           Take the descriptors back from the cores of an interface that has died
      --hang-limit MS     Have a core that does not answer for this many milliseconds succeeded by the standby
      --version           Print the version, and the versions of segments and buffers that this works with
  -h, --help              Print this
";

/// The options of a run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// The volume's description.
    pub(crate) volume: PathBuf,
    /// The path of the socket.
    pub(crate) socket: PathBuf,
    /// Adopt what a dead interface left with the cores.
    pub(crate) restore: bool,
    /// A core that serves may be silent for this long while requests wait.
    pub(crate) hang_limit: Duration,
}

/// The order on the command line.
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
    let (mut volume, mut socket, mut restore, mut hang_limit) = (None, None, false, HANG_LIMIT_DEFAULT);
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().map(PathBuf::from).ok_or(format!("{} needs a value", argument.display()));
        match argument.to_str() {
            Some("--version") => return Ok(Parsed::Version),
            Some("--help" | "-h") => return Ok(Parsed::Help),
            Some("--volume") => volume = Some(value()?),
            Some("--socket") => socket = Some(value()?),
            Some("--restore") => restore = true,
            Some("--hang-limit") => hang_limit = milliseconds(&value()?)?,
            _ => return Err(format!("unknown argument {}", argument.display())),
        }
    }
    match (volume, socket) {
        (Some(volume), Some(socket)) => Ok(Parsed::Run(Arguments { volume, socket, restore, hang_limit })),
        _ => Err("--volume and --socket are needed".to_owned()),
    }
}

fn milliseconds(value: &std::path::Path) -> Result<Duration, String> {
    let time = value.to_str().and_then(|text| text.parse().ok()).map(Duration::from_millis);
    let least = HANG_LIMIT_MIN.as_millis();
    time.filter(|time| *time >= HANG_LIMIT_MIN)
        .ok_or_else(|| format!("--hang-limit {} is no number of at least {least} milliseconds", value.display()))
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
        for option in ["--volume", "--socket", "--restore", "--hang-limit", "--version", "--help"] {
            assert!(HELP.contains(option), "{option}");
        }
        assert!(HELP.contains(USAGE));
        assert!(matches!(run("--volume a --socket b"), Ok(Parsed::Run(a)) if a.hang_limit == HANG_LIMIT_DEFAULT));
        let limited = run("--volume a --socket b --hang-limit 1500");
        assert!(matches!(limited, Ok(Parsed::Run(a)) if a.hang_limit == Duration::from_millis(1500)));
        for bad in [
            "--volume a --socket b --hang-limit 3",
            "--volume a --socket b --hang-limit x",
            "",
            "--volume a",
            "--volume",
            "--volume a --socket b c",
        ] {
            assert!(run(bad).is_err(), "{bad}");
        }
    }
}
