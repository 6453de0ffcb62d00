//! What a process waits for that does not end. A thread that hangs in the kernel for a storage node cannot be killed; which node it is,
//! the system call that it hangs in tells.

use std::{
    fs,
    path::{Path, PathBuf},
};

use everdisk_proto::volume::{NodeUrl, VolumeSpec};

/// The file that a thread of the process waits for in an uninterruptible system call.
pub fn file(pid: u32) -> Option<PathBuf> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    threads.flatten().find_map(|thread| waits_for(&thread.path()))
}

fn waits_for(thread: &Path) -> Option<PathBuf> {
    let stat = fs::read_to_string(thread.join("stat")).ok()?;
    // The name before may hold anything, a parenthesis too.
    let state = stat.rsplit_once(')')?.1.trim_start().chars().next()?;
    if state != 'D' {
        return None;
    }
    let call = fs::read_to_string(thread.join("syscall")).ok()?;
    descriptor(&call).and_then(|fd| fs::read_link(thread.join("fd").join(fd.to_string())).ok())
}

/// The first argument of a system call, as proc(5) writes it, if it can be a descriptor.
fn descriptor(call: &str) -> Option<u32> {
    let argument = call.split(' ').nth(1)?.strip_prefix("0x")?;
    u32::from_str_radix(argument, 16).ok().filter(|fd| i32::try_from(*fd).is_ok())
}

/// The node that a file lies in. None lies in an export: a thread that waits for a server can be killed.
pub fn node<'a>(spec: &'a VolumeSpec, file: &Path) -> Option<&'a NodeUrl> {
    // As it is written: to follow its links would be to wait for it too.
    let inside = spec.nodes.iter().find(|node| node.url.as_directory().is_some_and(|path| file.starts_with(path)));
    inside.map(|node| &node.url)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn the_first_argument_of_a_system_call_is_its_descriptor() {
        assert_eq!(descriptor("75 0x9 0x0 0x0 0x0 0x0 0x0 0x7ffd 0x7f12"), Some(9));
        for none in ["running", "-1 0x7ffd 0x7f12", "257 0xffffffffffffff9c 0x7ffd 0x0", ""] {
            assert_ne!(descriptor(none), Some(9), "{none}");
        }
        assert_eq!(descriptor("257 0xffffffffffffff9c 0x7ffd 0x0"), None);
    }

    #[test]
    fn g_a_file_lies_in_a_directory_and_never_in_an_export() {
        let mut spec: VolumeSpec = serde_json::from_str(include_str!("../../../proto/golden/volume-v2.json")).unwrap();
        spec.nodes[0].url = "nbd+unix:///x?socket=/srv/1/s".parse().unwrap();
        assert_eq!(node(&spec, Path::new("/srv/1/s")), None);
        assert_eq!(node(&spec, Path::new("/srv/2/data")), Some(&spec.nodes[1].url));
    }

    /// Not of this process: other tests beside this one make files durable.
    #[test]
    fn a_process_that_waits_for_a_pipe_waits_for_no_file() {
        let mut cat =
            Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("coreutils are there");
        let mut line = [0; 1];
        cat.stdin.as_mut().unwrap().write_all(b"a").unwrap();
        cat.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        assert_eq!(file(cat.id()), None);
        drop(cat.stdin.take());
        assert!(cat.wait().unwrap().success());
    }
}
