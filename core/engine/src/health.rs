//! What is known of a storage node's health: whether the last operation on it failed, and the error in words. Costs one
//! relaxed load per operation while all is well.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use everdisk_store::StoreError;

/// The outcome of the last operation on a node.
#[derive(Debug, Default)]
pub(crate) struct Health {
    failed: AtomicBool,
    error: Mutex<Option<String>>,
}

impl Health {
    /// Notes an outcome. Wrong arguments do not count: they say nothing about the node.
    #[inline]
    pub(crate) fn note<T>(&self, outcome: &Result<T, StoreError>) {
        match outcome {
            Ok(_) if !self.failed.load(Ordering::Relaxed) => {}
            Ok(_) => self.set(None),
            Err(e) if e.is_fault() => self.set(Some(e.to_string())),
            Err(_) => {}
        }
    }

    #[cold]
    fn set(&self, error: Option<String>) {
        let mut slot = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        self.failed.store(error.is_some(), Ordering::Relaxed);
        *slot = error;
    }

    /// The error in words while the last operation failed.
    pub(crate) fn error(&self) -> Option<String> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
