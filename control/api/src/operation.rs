//! What can be done with a volume, one at a time: names that `status`, errors and the log share.

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationName {
    /// Make it.
    Create,
    /// Make it larger.
    Resize,
    /// Delete it and its data.
    Delete,
    /// Put its files aside.
    Forget,
    /// Open front ends.
    Attach,
    /// Close them.
    Detach,
    /// Close them although they are in use.
    ForcedDetach,
    /// Make durable what was acknowledged.
    Flush,
    /// Hold I/O.
    Suspend,
    /// Let it go on.
    Resume,
    /// Replace the core.
    Upgrade,
    /// Go back to the core before.
    Rollback,
}

impl OperationName {
    /// In words.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Resize => "resize",
            Self::Delete => "delete",
            Self::Forget => "forget",
            Self::Attach => "attach",
            Self::Detach => "detach",
            Self::ForcedDetach => "forced detach",
            Self::Flush => "flush",
            Self::Suspend => "suspend",
            Self::Resume => "resume",
            Self::Upgrade => "upgrade",
            Self::Rollback => "rollback",
        }
    }

    /// Whether it replaces the core that serves.
    pub const fn replaces_the_core(self) -> bool {
        matches!(self, Self::Upgrade | Self::Rollback)
    }
}
