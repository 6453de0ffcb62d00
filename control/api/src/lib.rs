//! What the CLI and the control module say to each other, and the client.
//!
//! The control socket is a stream: one request a connection, as one line of JSON; the answer is any number of
//! `{"progress":{…}}` lines and then one `{"ok":…}` or `{"error":{"kind","message"}}` line.
#![forbid(unsafe_code)]

pub mod answer;
pub mod client;
pub mod directories;
pub mod frontends;
pub mod operation;
pub mod quantity;
pub mod request;
pub mod status;

/// The hand-over policies; the object that `upgrade` prints and `status` shows as `last_upgrade`.
pub use everdisk_upgrade::{
    policy::Handover,
    report::{Report as LastUpgrade, StepTime},
};
