//! The identity of a program (D13): the component, its version, and the formats that it understands; and the programs
//! that the control module keeps, each with its identity.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::version::{ABI_RANGE, BUFFER_RANGE, PRODUCT, VersionRange};

/// A part of the client software that is replaced on its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Component {
    /// Executes requests. Records and frames of the earlier versions named no component: they described cores only.
    #[default]
    Core,
    /// Keeps the front ends and the segment.
    Interface,
    /// Starts, watches and upgrades the others; the operator's command is part of it.
    Control,
}

impl Component {
    /// The name of its program.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Core => "everdisk-core",
            Self::Interface => "everdisk-interface",
            Self::Control => "everdiskd",
        }
    }

    fn of_program(name: &str) -> Option<Self> {
        [Self::Core, Self::Interface, Self::Control].into_iter().find(|component| component.program() == name)
    }
}

/// The operator's command, a second program of [`Component::Control`].
pub const COMMAND: &str = "everdisk";

/// The identity that a program prints: `everdisk-core VERSION (abi MIN..MAX, buffer MIN..MAX)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its component. Since ABI 4, journal 2 and record 2.
    #[serde(default)]
    pub component: Component,
    /// Version of the program.
    pub version: String,
    /// ABI versions of the segments it works with. An interface makes segments of the newest.
    pub abi: VersionRange,
    /// Versions of the write buffer it works with. An interface makes buffers of the newest.
    pub buffer: VersionRange,
}

impl Identity {
    /// The identity of a component built from this source.
    pub fn current(component: Component) -> Self {
        Self { component, version: PRODUCT.to_owned(), abi: ABI_RANGE, buffer: BUFFER_RANGE }
    }

    /// Reads the line that a program prints for `--version`.
    ///
    /// # Errors
    /// [`BadIdentity`] when the line does not have that form.
    pub fn parse(line: &str) -> Result<Self, BadIdentity> {
        let bad = || BadIdentity(line.chars().take(80).collect());
        let (program, rest) = line.trim_end().split_once(' ').ok_or_else(bad)?;
        let component = match program {
            COMMAND => Component::Control,
            program => Component::of_program(program).ok_or_else(bad)?,
        };
        let (version, rest) = rest.split_once(" (abi ").ok_or_else(bad)?;
        let plain = |c: char| c.is_ascii_alphanumeric() || ".-+".contains(c);
        if version.is_empty() || version.len() > 64 || !version.chars().all(plain) {
            return Err(bad());
        }
        let formats = rest.strip_suffix(')').ok_or_else(bad)?;
        let (abi, buffer) = match formats.split_once(", buffer ") {
            Some((abi, buffer)) => (range(abi), range(buffer)),
            // An interface of ABI 3 or before names the one ABI that it has, and no buffer.
            None if component == Component::Interface => {
                let abi = formats.parse().ok();
                (abi.map(|abi| VersionRange { min: abi, max: abi }), Some(VersionRange { min: 0, max: 0 }))
            }
            None => (None, None),
        };
        let (abi, buffer) = abi.zip(buffer).ok_or_else(bad)?;
        Ok(Self { component, version: version.to_owned(), abi, buffer })
    }

    /// The rest of the version line behind the program's name.
    pub fn details(&self) -> String {
        format!("{} (abi {}, buffer {})", self.version, self.abi, self.buffer)
    }
}

fn range(text: &str) -> Option<VersionRange> {
    let (min, max) = text.split_once("..")?;
    let range = VersionRange { min: min.parse().ok()?, max: max.parse().ok()? };
    (range.min <= range.max).then_some(range)
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.component.program(), self.details())
    }
}

/// The file's `--version` line is not that of a program of Everdisk.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not the version line of a program of Everdisk: {0:?}")]
pub struct BadIdentity(pub String);

/// A program that the control module keeps: its file and its identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    /// The file.
    pub program: PathBuf,
    /// Its `--version`.
    pub identity: Identity,
    /// SHA-256 of the file in hexadecimal; none where a build before digests recorded it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_round_trips_and_refuses_garbage() {
        for program in ["everdisk-core", "everdisk-interface", "everdiskd"] {
            let line = format!("{program} 0.1.0 (abi 1..2, buffer 0..1)");
            let identity = Identity::parse(&line).unwrap();
            assert_eq!(identity.to_string(), line);
            assert_eq!(identity.component.program(), program);
        }
        assert_eq!(Identity::parse("everdisk 1 (abi 1..2, buffer 0..1)").unwrap().component, Component::Control);
        for bad in [
            "",
            "everdisk-core",
            "everdisk-core 1 (abi 2..1, buffer 0..0)",
            "everdisk-core 1 (abi 2)",
            "bash 5.2 (abi 1..1, buffer 0..0)",
        ] {
            assert!(Identity::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_interface_of_abi_3_names_the_one_that_it_has() {
        let identity = Identity::parse("everdisk-interface 0.1.0 (abi 3)").unwrap();
        assert_eq!((identity.component, identity.abi), (Component::Interface, VersionRange { min: 3, max: 3 }));
    }

    #[test]
    fn an_identity_that_names_no_component_is_a_cores() {
        let text = r#"{"version":"0.1.0","abi":{"min":3,"max":3},"buffer":{"min":0,"max":1}}"#;
        assert_eq!(serde_json::from_str::<Identity>(text).unwrap().component, Component::Core);
    }
}
