//! One line in the log for each act of an operator, done or refused: the user that asked, what was asked for, and how it ended.

use everdisk_api::{operation::OperationName, request::Request};
use everdisk_telemetry::event;
use serde_json::Value;
use tracing::{info, warn};

use crate::error::Error;

/// The user and process that asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Who {
    /// User id.
    pub uid: u32,
    /// Process id; 0 where it is not known.
    pub pid: u32,
}

/// The act in a word, what it is done to, and whether its success has a line of its own already. None: nothing is changed.
fn act(request: &Request) -> Option<(OperationName, String, bool)> {
    let (act, name, told) = match request {
        Request::Version
        | Request::VolumeList
        | Request::VolumeShow { .. }
        | Request::Status { .. }
        | Request::Upgrade { plan: true, .. } => return None,
        Request::VolumeCreate { name, .. } => (OperationName::Create, name, false),
        Request::VolumeResize { name, .. } => (OperationName::Resize, name, false),
        Request::VolumeDelete { name, .. } => (OperationName::Delete, name, false),
        Request::VolumeForget { name } => (OperationName::Forget, name, false),
        Request::Attach { name, .. } => (OperationName::Attach, name, true),
        Request::Detach { name, force: false, .. } => (OperationName::Detach, name, true),
        Request::Detach { name, force: true, .. } => (OperationName::ForcedDetach, name, false),
        Request::Flush { name } => (OperationName::Flush, name, false),
        Request::Suspend { name, .. } => (OperationName::Suspend, name, false),
        Request::Resume { name } => (OperationName::Resume, name, false),
        Request::Upgrade { name, .. } => (OperationName::Upgrade, name, true),
        Request::Rollback { name } => (OperationName::Rollback, name, true),
    };
    Some((act, name.to_string(), told))
}

/// An act before it is carried out.
pub struct Audit {
    act: Option<(OperationName, String, bool)>,
    who: Who,
}

impl Audit {
    /// What `who` asks for.
    pub fn begin(request: &Request, who: Who) -> Self {
        Self { act: act(request), who }
    }

    /// Logs how it ended.
    pub fn end(&self, ended: &Result<Value, Error>) {
        let Some((act, volume, is_told)) = &self.act else { return };
        let Who { uid, pid } = self.who;
        match ended {
            Ok(_) if *act == OperationName::ForcedDetach => {
                warn!(event = event::OPERATOR, act = act.text(), volume, uid, pid, "the volume was detached by force");
            }
            Ok(_) if *is_told => {}
            Ok(_) => info!(event = event::OPERATOR, act = act.text(), volume, uid, pid, "done"),
            // It ended in a line of its own, with the same reason.
            Err(Error::Upgrade { .. }) => {}
            Err(error) => warn!(event = event::OPERATOR, act = act.text(), volume, uid, pid, "not done: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_nothing_is_no_act() {
        let name: everdisk_proto::ids::VolumeName = "v".parse().unwrap();
        assert_eq!(act(&Request::Status { name: None }), None);
        assert_eq!(act(&Request::VolumeShow { name: name.clone() }), None);
        assert_eq!(
            act(&Request::VolumeDelete { name: name.clone(), force: false }),
            Some((OperationName::Delete, "v".to_owned(), false))
        );
        assert_eq!(
            act(&Request::Detach { name, force: true, yes: true }),
            Some((OperationName::ForcedDetach, "v".to_owned(), false))
        );
    }
}
