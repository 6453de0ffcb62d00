//! The journal of a volume's upgrades: one JSON object a line, appended and made durable before the act it announces
//! (D7). After a crash of the control module the last upgrade in it either has ended or is resumed.

use serde::{Deserialize, Serialize};

use crate::identity::Build;

/// Version of the records that are written. Since version 2 a program names its component; version 1 described cores
/// only.
pub const JOURNAL_VERSION: u32 = 2;
/// The oldest version that is read.
pub const JOURNAL_VERSION_MIN: u32 = 1;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// From [`JOURNAL_VERSION_MIN`] to [`JOURNAL_VERSION`].
    pub v: u32,
    /// Number of the upgrade within the volume, from 1.
    pub upgrade: u64,
    /// Unix time in ms.
    pub at_ms: u64,
    /// The act that is about to be done, or has been.
    pub event: Event,
}

/// The kinds of records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// An upgrade begins.
    Begin {
        /// The core that serves.
        from: Build,
        /// Process id of the serving core.
        from_pid: u32,
        /// How long the predecessor stays parked after the switch.
        soak_ms: u64,
        /// The upgrade is a rollback to the build before the last committed upgrade.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        rollback: bool,
    },
    /// The new core's program has been staged and checked.
    Staged {
        /// The new core.
        to: Build,
    },
    /// The new core runs as a standby.
    Standby {
        /// Its process id.
        to_pid: u32,
    },
    /// The hand-over is about to be commanded. From here on only the segment says which core serves.
    Handover,
    /// The new core serves, the predecessor is parked.
    Switched,
    /// The end.
    End {
        /// The outcome.
        outcome: Outcome,
        /// The reason, when it was not committed.
        reason: Option<String>,
    },
}

/// The outcome of an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The new core serves.
    Committed,
    /// The new core had served, or tried to, and the old one serves again.
    RolledBack,
    /// The old core never stopped serving.
    Aborted,
}

/// Reads a journal. A last line that is cut short (the machine died while it was written) is left out; anything else
/// that cannot be read is an error.
///
/// # Errors
/// [`BadJournal`] names the line.
pub fn parse(text: &str) -> Result<Vec<Entry>, BadJournal> {
    let mut records = Vec::new();
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let Some(whole) = line.strip_suffix('\n') else { break };
        let record: Entry =
            serde_json::from_str(whole).map_err(|source| BadJournal::Syntax { line: number + 1, source })?;
        if !(JOURNAL_VERSION_MIN..=JOURNAL_VERSION).contains(&record.v) {
            return Err(BadJournal::Version { line: number + 1, version: record.v });
        }
        records.push(record);
    }
    Ok(records)
}

/// The journal cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BadJournal {
    /// Not a record.
    #[error("line {line} of the upgrade journal is damaged: {source}")]
    Syntax {
        /// From 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// Written by another version.
    #[error(
        "line {line} of the upgrade journal has version {version}, this program reads {JOURNAL_VERSION_MIN} to {JOURNAL_VERSION}"
    )]
    Version {
        /// From 1.
        line: usize,
        /// The version found.
        version: u32,
    },
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    use crate::identity::Component;

    const GOLDEN: &str = include_str!("../golden/journal-v2.jsonl");

    pub(crate) fn golden_journal_of_version_2_reads_and_writes_the_same_bytes(golden: &str) {
        let records = parse(golden).unwrap();
        assert_eq!(records.len(), 6);
        let again: String = records.iter().map(|r| serde_json::to_string(r).unwrap() + "\n").collect();
        assert_eq!(again, golden);
    }

    /// Byte for byte the same journal: the component that version 1 leaves out is the core of version 2.
    pub(crate) fn golden_journal_of_version_1_is_read(golden: &str) {
        let before = parse(golden).unwrap();
        let Event::Begin { from, .. } = &before[0].event else { panic!("{:?}", before[0]) };
        assert_eq!((from.identity.component, from.digest.as_ref()), (Component::Core, None));
        let mut now = parse(GOLDEN).unwrap();
        for record in &mut now {
            record.v = 1;
            match &mut record.event {
                Event::Begin { from: build, .. } | Event::Staged { to: build } => build.digest = None,
                _ => {}
            }
        }
        assert_eq!(before, now);
    }

    #[test]
    fn a_torn_last_line_is_left_out_and_a_damaged_one_is_an_error() {
        let torn = &GOLDEN[..GOLDEN.len() - 5];
        assert_eq!(parse(torn).unwrap().len(), 5);
        assert!(matches!(parse("{}\n"), Err(BadJournal::Syntax { line: 1, .. })));
        for other in [0, 3] {
            let other_version = GOLDEN.replacen("\"v\":2", &format!("\"v\":{other}"), 1);
            assert!(matches!(parse(&other_version), Err(BadJournal::Version { line: 1, version }) if version == other));
        }
    }
}
