//! Something done at the end of a scope, also where an assertion ends it.
//!
//! A scope of threads waits for its threads, also when it is left by a panic. So what lets them go (a flag, a fault that ends)
//! must be done on every way out, or a test that fails hangs.

/// Does it when it is dropped.
#[must_use = "dropped at once, it does it at once"]
#[derive(Debug)]
pub struct AtEnd<F: FnMut()>(F);

/// Does `last` when what it returns is dropped.
pub const fn at_end<F: FnMut()>(last: F) -> AtEnd<F> {
    AtEnd(last)
}

impl<F: FnMut()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        sync::atomic::{AtomicBool, Ordering::SeqCst},
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn a_scope_that_fails_lets_its_threads_go() {
        let (stop, stopped) = (AtomicBool::new(false), AtomicBool::new(false));
        let failed = catch_unwind(AssertUnwindSafe(|| {
            thread::scope(|scope| {
                let _let_go = at_end(|| stop.store(true, SeqCst));
                scope.spawn(|| {
                    let deadline = Instant::now() + Duration::from_secs(20);
                    while !stop.load(SeqCst) && Instant::now() < deadline {
                        thread::yield_now();
                    }
                    stopped.store(stop.load(SeqCst), SeqCst);
                });
                assert!(stop.load(SeqCst), "fails");
            });
        }));
        assert!(failed.is_err() && stopped.load(SeqCst));
    }
}
