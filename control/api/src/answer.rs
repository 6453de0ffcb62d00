//! Answers of the control module.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// In the detail of a [`Refusal`]: the same request with `yes` would be carried out.
pub const NEEDS_YES: &str = "needs_yes";

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// Work goes on. Comes at least every second, so that a client can tell a long task from a dead daemon.
    Progress(Progress),
    /// The end: done.
    Ok(Value),
    /// The end: not done.
    Error(Refusal),
}

/// What is being done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The step.
    pub step: String,
    /// Since the request came.
    pub elapsed_ms: u64,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What the caller can do about it.
    pub kind: Kind,
    /// What is wrong, why, and what to do.
    pub message: String,
    /// More for programs: an upgrade that failed gives its report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<Value>,
}

impl Refusal {
    /// A refusal without detail.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), detail: None }
    }

    /// Whether the operator only has to agree.
    pub fn needs_yes(&self) -> bool {
        self.detail.as_ref().and_then(|detail| detail.get(NEEDS_YES)).is_some_and(|needed| *needed == Value::Bool(true))
    }
}

/// The few kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The request cannot be understood: correct it.
    BadRequest,
    /// There is no such volume.
    NotFound,
    /// The volume's state does not permit it: change that first.
    State,
    /// Another operation is running: try again later.
    Busy,
    /// It was tried and did not succeed.
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_the_agreed_form() {
        let error = Line::Error(Refusal::new(Kind::NotFound, "no"));
        assert_eq!(serde_json::to_string(&error).unwrap(), r#"{"error":{"kind":"not-found","message":"no"}}"#);
        let progress = Line::Progress(Progress { step: "soak".to_owned(), elapsed_ms: 7 });
        assert_eq!(serde_json::to_string(&progress).unwrap(), r#"{"progress":{"step":"soak","elapsed_ms":7}}"#);
        assert_eq!(serde_json::from_str::<Line>(r#"{"ok":null}"#).unwrap(), Line::Ok(Value::Null));
    }
}
