//! Giving up the privileges that a process does not need.

use std::{fs, io};

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Needed by a core while it opens its storage nodes: they may belong to other users, and so may a file that is opened
/// with `O_NOATIME`.
pub const OPENING: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::FOWNER).union(SERVING);
/// Needed by a core while it serves: to lock the buffers of workers that it starts, beyond RLIMIT_MEMLOCK; to read its
/// storage nodes' superblocks again, and to reopen their data for flushes, although they belong to other users.
pub const SERVING: CapabilitySet = CapabilitySet::IPC_LOCK.union(CapabilitySet::DAC_READ_SEARCH);

/// Gives up every capability but `kept` for good, and the gain of any by execve(2) (`no_new_privs`). A capability that
/// the process lacks is not gained.
///
/// # Errors
/// The operating system's. A process with more than one thread: the others would keep theirs.
pub fn keep_only(kept: CapabilitySet) -> io::Result<()> {
    let threads = fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!(
            "{threads} threads run, privileges are given up before there is a second"
        )));
    }
    set_no_new_privs(true)?;
    let had = capabilities(None)?;
    // Without CAP_SETPCAP the bounding set stays; nothing in it can be gained without new privileges.
    if had.effective.contains(CapabilitySet::SETPCAP) {
        for number in 0..u64::BITS {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            match capability_is_in_bounding_set(capability) {
                Ok(true) => remove_capability_from_bounding_set(capability)?,
                Ok(false) => {}
                // The kernel has no capability of this number or above.
                Err(_) => break,
            }
        }
    }
    clear_ambient_capability_set()?;
    let left = kept.intersection(had.permitted);
    Ok(set_capabilities(
        None,
        CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() },
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_refused_and_keeps_what_it_has() {
        let had = capabilities(None).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let second = std::thread::spawn(move || receiver.recv());
        assert!(keep_only(SERVING).unwrap_err().to_string().contains("threads run"));
        assert_eq!(capabilities(None).unwrap(), had);
        drop(sender);
        assert!(second.join().unwrap().is_err());
    }
}
