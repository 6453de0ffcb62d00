//! Frames on the interface's and the core's sockets (AF_UNIX, SOCK_SEQPACKET: one frame, one packet).
//!
//! A frame is a JSON object `{"abi":1,"id":7,"body":{…}}` of at most [`FRAME_BYTES_MAX`] bytes. File descriptors travel
//! beside it by SCM_RIGHTS, and the body is their manifest: how many, and which. A frame whose manifest and descriptors
//! differ is refused, and the descriptors are closed. Unknown fields are ignored, unknown kinds of body are refused.
//!
//! ```text
//!  interface.sock      control ─ Request ─► interface ─ Answer ─► control
//!                      core ─ Hello ─► interface ─ Welcome + segment, Lend… + fds ─► core ─ Armed ─► interface
//!                      interface (restarted) ─ Recall ─► core ─ Returned + segment + fds, ReturnedLocks…,
//!                                                        ReturnedConnection… ─► interface
//!  core-PID.sock       control ─ CoreRequest ─► core ─ CoreAnswer ─► control
//! ```

mod core;
mod interface;
mod status;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use self::{core::*, interface::*, status::*};
use crate::{
    limits::{FRAME_BYTES_MAX, FRAME_FDS_MAX},
    version::ABI,
};

/// The envelope of every frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame<B> {
    /// ABI version of the sender.
    pub abi: u32,
    /// Chosen by the peer that sends the request; the answer bears the same.
    pub id: u64,
    /// The message.
    pub body: B,
}

impl<B> Frame<B> {
    /// A frame of this build's ABI.
    pub const fn new(id: u64, body: B) -> Self {
        Self { abi: ABI, id, body }
    }
}

/// Bodies that know how many descriptors travel with them.
pub trait Body: Serialize + DeserializeOwned {
    /// Number of file descriptors that must accompany the frame.
    fn fds(&self) -> usize;
}

/// A packet that is not a valid frame.
#[derive(Debug, thiserror::Error)]
pub enum BadFrame {
    /// Too long for a frame.
    #[error("a frame of {0} bytes; the limit is {FRAME_BYTES_MAX}")]
    TooLong(usize),
    /// Not the JSON of a known body.
    #[error("not a frame: {0}")]
    Syntax(#[from] serde_json::Error),
    /// The manifest and the received descriptors differ.
    #[error("the frame announces {announced} file descriptors and {came} came")]
    Fds {
        /// In the manifest.
        announced: usize,
        /// In the packet.
        came: usize,
    },
}

/// The bytes of a frame.
///
/// # Errors
/// [`BadFrame::TooLong`] when the body does not fit.
pub fn encode<B: Body>(frame: &Frame<B>) -> Result<Vec<u8>, BadFrame> {
    let bytes = serde_json::to_vec(frame)?;
    if bytes.len() > FRAME_BYTES_MAX {
        return Err(BadFrame::TooLong(bytes.len()));
    }
    Ok(bytes)
}

/// Reads a frame that came with `fds` descriptors.
///
/// # Errors
/// [`BadFrame`]; the caller drops (closes) the descriptors.
pub fn decode<B: Body>(bytes: &[u8], fds: usize) -> Result<Frame<B>, BadFrame> {
    if bytes.len() > FRAME_BYTES_MAX {
        return Err(BadFrame::TooLong(bytes.len()));
    }
    let frame: Frame<B> = serde_json::from_slice(bytes)?;
    let announced = frame.body.fds();
    if announced != fds || fds > FRAME_FDS_MAX {
        return Err(BadFrame::Fds { announced, came: fds });
    }
    Ok(frame)
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_zero(n: &u32) -> bool {
    *n == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
const fn is_false(flag: &bool) -> bool {
    !*flag
}

#[cfg(test)]
pub(crate) mod tests;
