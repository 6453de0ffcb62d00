//! The state of a storage node, as a core determines it and `status` shows it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// State of a storage node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// It has everything that is durable.
    InStep,
    /// It is not there.
    Missing,
    /// It is being given the data that it lacks.
    Rebuilding,
    /// An operation on it does not end.
    Stalled,
    /// An operation on it last ended in an error.
    Failed,
    /// No core can be asked; or the state is one of a later version.
    #[serde(other)]
    Unknown,
}

impl NodeState {
    /// As in the JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InStep => "in-step",
            Self::Missing => "missing",
            Self::Rebuilding => "rebuilding",
            Self::Stalled => "stalled",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_the_agreed_names_and_one_of_a_later_version_is_unknown() {
        for state in [
            NodeState::InStep,
            NodeState::Missing,
            NodeState::Rebuilding,
            NodeState::Stalled,
            NodeState::Failed,
            NodeState::Unknown,
        ] {
            let text = format!("\"{state}\"");
            assert_eq!(serde_json::to_string(&state).unwrap(), text);
            assert_eq!(serde_json::from_str::<NodeState>(&text).unwrap(), state);
        }
        assert_eq!(serde_json::from_str::<NodeState>("\"on-fire\"").unwrap(), NodeState::Unknown);
    }
}
