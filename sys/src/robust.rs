//! Robust futexes: a thread has a word in the segment, and the kernel marks it when the thread ends, however it ends (D14).
//!
//! When a thread ends, the kernel walks the list that the thread registered by set_robust_list(2). It marks every futex
//! word in it that bears the thread's id (`exit_robust_list` in kernel/futex/core.c). It does so in
//! `futex_exit_release`, called from `exit_mm_release`: the thread's last system call has returned by then, and nothing
//! of the process's memory is unmapped yet.
//!
//! ```text
//!  the thread's own memory                        the segment
//!  Head  { list ─┐, offset, pending: none }
//!          ▲     ▼
//!          └─ Entry ── + offset ────────────────► a word of CoreArea::threads
//! ```
//! The list has one entry. The distance from the entry to the word is in the head, which each thread has of its own, so
//! the segment holds no pointer. Rust's standard library and glibc use the list for `PTHREAD_MUTEX_ROBUST` only, which
//! this project does not use; glibc's own list is put back when the thread gives its word up.
//!
//! The order of the steps ensures that every running thread has a word, whenever the process is killed:
//!
//! 1. The thread that starts another takes a word for it ([`thread_word::STARTING`]) before the other is born.
//! 2. The new thread registers its list, then writes its id into the word. Killed in between, the word stays as it is, the kernel marks
//!    nothing, and the death is noticed when the process has gone.
//! 3. It does its work, frees the word, and puts the old list back, in this order.

use std::{
    io,
    marker::PhantomData,
    ptr::null_mut,
    sync::{
        Arc, OnceLock,
        atomic::{
            AtomicU32,
            Ordering::{AcqRel, Relaxed, SeqCst},
            fence,
        },
    },
    thread::{self, JoinHandle, Scope, ScopedJoinHandle},
};

use everdisk_proto::{
    ids::Slot,
    segment::{CoreArea, thread_word},
};

use crate::{
    memory::SharedSegment,
    process::thread_id,
    wake::{self, Who},
};

/// The words of this process's threads. A static, because a process is one core at most, and a thread has one list.
static CORE: OnceLock<(Arc<SharedSegment>, Slot)> = OnceLock::new();

/// From now on the threads of this process have words, as the core in `slot`.
///
/// # Panics
/// On a second call.
pub fn join(segment: &Arc<SharedSegment>, slot: Slot) {
    assert!(CORE.set((Arc::clone(segment), slot)).is_ok(), "a process is one core");
}

/// Whether threads that are started now have words: this process [has joined](join) as a core.
pub fn has_joined() -> bool {
    CORE.get().is_some()
}

/// Starts a thread that has a word as long as it runs.
///
/// # Errors
/// The operating system's.
pub fn start<T, F>(name: &str, work: F) -> io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    let word = Taken::take();
    thread::Builder::new().name(name.to_owned()).spawn(move || word.run(work))
}

/// As [`start`], for a thread of a scope.
///
/// # Errors
/// The operating system's.
pub fn start_scoped<'scope, T, F>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: F,
) -> io::Result<ScopedJoinHandle<'scope, T>>
where
    F: FnOnce() -> T + Send + 'scope,
    T: Send + 'scope,
{
    let word = Taken::take();
    thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, move || word.run(work))
}

/// Gives the calling thread a word until the returned value is dropped. For a thread that was not started by [`start`],
/// or was before [`join`].
pub fn enter() -> Entered {
    Taken::take().enter()
}

/// Takes a word for a thread; `None` in a process that is no core.
struct Taken(Option<&'static AtomicU32>);

impl Taken {
    fn take() -> Self {
        let area = CORE.get().map(|(segment, slot)| &segment.cores[slot.index()]);
        Self(area.map(|area| {
            let word = take_word(area).expect("a core starts at most THREADS_MAX threads at once");
            if is_ending(area) {
                // This process ends, and the interface may count its threads as stopped already.
                loop {
                    thread::park();
                }
            }
            word
        }))
    }

    fn enter(mut self) -> Entered {
        Entered { list: self.0.take().map(List::register), _not_send: PhantomData }
    }

    fn run<T>(self, work: impl FnOnce() -> T) -> T {
        // Dropped after `work` and what it has captured.
        let _entered = self.enter();
        work()
    }
}

impl Drop for Taken {
    /// No thread was started.
    fn drop(&mut self) {
        if let Some(word) = self.0 {
            free(word, thread_word::STARTING);
        }
    }
}

/// Takes the first free word of a core; `None` when every one is taken.
fn take_word(area: &CoreArea) -> Option<&AtomicU32> {
    let take =
        |word: &&AtomicU32| word.compare_exchange(thread_word::FREE, thread_word::STARTING, AcqRel, Relaxed).is_ok();
    let word = area.threads.iter().find(take)?;
    // The interface sleeps on the first word while it is free, so wake it.
    wake::wake(word, Who::All);
    Some(word)
}

/// Whether a thread of the core has died, which means that its process ends. The caller has taken a word. The interface
/// scans the words after it has seen the first mark, so either the scan finds the caller's word, or the caller finds
/// the mark: each of the two writes its word, then reads the other's, with a full fence in between.
fn is_ending(area: &CoreArea) -> bool {
    fence(SeqCst);
    area.threads.iter().any(|word| thread_word::has_died(word.load(Relaxed)))
}

/// Frees a word that is `ours`. It may not be any more: the interface frees the words of a core that it has given up,
/// and reassigns them.
fn free(word: &AtomicU32, ours: u32) {
    if word.compare_exchange(ours, thread_word::FREE, AcqRel, Relaxed).is_ok() {
        wake::wake(word, Who::All);
    }
}

/// The calling thread has a word until this is dropped.
#[must_use]
#[derive(Debug)]
pub struct Entered {
    list: Option<List>,
    /// The list is this thread's.
    _not_send: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(list) = self.list.take() {
            list.give_up();
        }
    }
}

/// `struct robust_list_head` of linux/futex.h, and behind it the one `struct robust_list` of the list.
#[repr(C)]
#[derive(Debug)]
struct Links {
    head: Head,
    entry: Entry,
}

#[repr(C)]
#[derive(Debug)]
struct Head {
    list: Entry,
    offset: libc::c_long,
    pending: *mut Entry,
}

#[repr(C)]
#[derive(Debug)]
struct Entry {
    next: *mut Entry,
}

/// What the kernel expects as the length of a head.
const HEAD_BYTES: usize = size_of::<Head>();
const _: () = assert!(HEAD_BYTES == 3 * size_of::<usize>());

/// A registered list.
#[derive(Debug)]
struct List {
    /// From a box. The kernel reads it when the thread ends.
    links: *mut Links,
    word: &'static AtomicU32,
    /// What this thread has written into the word.
    ours: u32,
    /// The list that was registered before: the C library's.
    before: *mut Head,
}

impl List {
    /// Registers the calling thread's list with one word in it, and writes the thread's id into the word.
    fn register(word: &'static AtomicU32) -> Self {
        let head = Head { list: Entry { next: null_mut() }, offset: 0, pending: null_mut() };
        let links = Box::into_raw(Box::new(Links { head, entry: Entry { next: null_mut() } }));
        // SAFETY: `links` comes from a box just now.
        let entry = unsafe { &raw mut (*links).entry };
        let distance = word.as_ptr().addr().wrapping_sub(entry.addr()).cast_signed();
        let offset = libc::c_long::try_from(distance).expect("a long of Linux is as wide as a pointer");
        // The head is the first field of the links. The list ends where it began.
        let whole = Links {
            head: Head { list: Entry { next: entry }, offset, pending: null_mut() },
            entry: Entry { next: links.cast() },
        };
        // SAFETY: as above; nothing refers to it yet, and there is nothing to drop.
        unsafe { links.write(whole) };
        let before = registered();
        // A kernel or a sandbox that refuses leaves the word STARTING: then the pidfd reports the death.
        let mut ours = thread_word::STARTING;
        if set(links.cast()) {
            ours = thread_word::running(thread_id());
            // As in `free`: it may belong to another core by now.
            let _ = word.compare_exchange(thread_word::STARTING, ours, AcqRel, Relaxed);
        }
        Self { links, word, ours, before }
    }

    /// Frees the word, then unregisters. If the thread is killed in between, the kernel finds a word that is not this
    /// thread's, and leaves it.
    fn give_up(self) {
        free(self.word, self.ours);
        set(self.before);
        // SAFETY: it comes from a box in `register`, and the kernel has another list of this thread now.
        drop(unsafe { Box::from_raw(self.links) });
    }
}

/// The calling thread's list.
fn registered() -> *mut Head {
    let (mut head, mut len) = (null_mut::<Head>(), 0_usize);
    // SAFETY: the kernel writes a pointer and a length to the two live variables; process 0 is the calling thread.
    let result = unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut len) };
    if result == 0 && len == HEAD_BYTES { head } else { null_mut() }
}

/// Registers a list for the calling thread. Returns whether the kernel accepted it.
fn set(head: *mut Head) -> bool {
    // SAFETY: the kernel keeps the pointer and reads the list when this thread ends or executes another program. `head` is null, or the C
    // library's, which lives as long as the thread, or that of a `Links` from a box, which is freed only after another was registered.
    // The one word that the kernel writes then lies in the segment, which `CORE` keeps mapped until the process ends; it is an atomic, and the
    // kernel changes it by compare-and-swap and only if it bears this thread's id.
    unsafe { libc::syscall(libc::SYS_set_robust_list, head, HEAD_BYTES) == 0 }
}

#[cfg(test)]
mod tests;
