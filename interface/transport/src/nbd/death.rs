//! Deaths for tests: a thread ends right after the n-th of its stores to a connection's memory, and nothing of it runs any more.

use std::{
    cell::RefCell,
    panic,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

/// The cause of a thread's death.
pub(super) struct Death {
    /// Stores that it still does.
    pub(super) stores: u64,
    /// Set at its death.
    pub(super) died: Arc<AtomicBool>,
}

thread_local! {
    static DEATH: RefCell<Option<Death>> = const { RefCell::new(None) };
}

/// This thread is to die so.
pub(super) fn await_death(death: Death) {
    DEATH.set(Some(death));
}

/// A store to the memory was done, or a system call that stores to it.
pub(super) fn stored() {
    let dies = DEATH.with_borrow_mut(|death| {
        let death = death.as_mut()?;
        if let Some(left) = death.stores.checked_sub(1) {
            death.stores = left;
            return None;
        }
        death.died.store(true, SeqCst);
        Some(())
    });
    if dies.is_some() {
        DEATH.set(None);
        panic::resume_unwind(Box::new("dead"));
    }
}
