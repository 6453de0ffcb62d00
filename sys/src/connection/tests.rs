use std::{
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use super::*;

const RING: u64 = INPUT_BYTES as u64;

/// The byte at a position of a test's stream.
fn byte(position: u64) -> u8 {
    u8::try_from(position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56).unwrap()
}

fn bytes(from: u64, len: u64) -> Vec<u8> {
    (from..from + len).map(byte).collect()
}

fn at(position: u64, ring: usize) -> usize {
    usize::try_from(position).unwrap() % ring
}

#[test]
fn what_is_sent_and_received_is_counted_and_rings_have_no_seam() {
    let memory = ConnectionMemory::create().unwrap();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let seam = INPUT_BYTES - 3;
    assert_eq!(memory.receive(ours.as_fd(), seam, 10).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    theirs.write_all(b"seamless").unwrap();
    assert_eq!(memory.receive(ours.as_fd(), seam, 100).unwrap(), 8);
    let mut got = [0; 8];
    assert!(memory.read_input(seam, &mut got) && &got == b"seamless" && memory.received() == 8);
    assert!(memory.read_input(0, &mut got[..5]) && &got[..5] == b"mless");
    assert!(memory.write_output(OUTPUT_BYTES - 1, b"xyz") && !memory.write_output(OUTPUT_BYTES, b"x"));
    assert_eq!(memory.send(ours.as_fd(), OUTPUT_BYTES - 1, 3).unwrap(), 3);
    assert_eq!(memory.send_direct(ours.as_fd(), b"!").unwrap(), 1);
    let mut got = [0; 4];
    theirs.read_exact(&mut got).unwrap();
    assert!(&got == b"xyz!" && memory.sent() == 4);
    drop(theirs);
    assert_eq!(memory.receive(ours.as_fd(), 0, 10).unwrap(), 0);
    assert!(memory.send_direct(ours.as_fd(), b"!").is_err() && memory.sent() == 4);
    let again = ConnectionMemory::adopt(memory.as_fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!((again.received(), again.sent()), (8, 4));
}

#[test]
fn a_part_of_a_file_is_sent_and_counted_and_a_full_socket_is_no_error() {
    let memory = ConnectionMemory::create().unwrap();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes(0, 4 << 20)).unwrap();
    let mut sent = 0;
    loop {
        match memory.send_file(ours.as_fd(), file.as_fd(), sent, 100_000) {
            Ok(n) => sent += n as u64,
            Err(e) => break assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
        }
    }
    assert!(sent > 0 && memory.sent() == sent);
    let mut got = vec![0; usize::try_from(sent).unwrap()];
    theirs.read_exact(&mut got).unwrap();
    assert_eq!(got, bytes(0, sent));
    assert_eq!(memory.send_file(ours.as_fd(), file.as_fd(), 4 << 20, 10).unwrap(), 0);
    assert_eq!(memory.send_direct(ours.as_fd(), b"!").unwrap(), 1);
    assert_eq!(memory.sent(), sent + 1);
}

#[test]
fn what_is_no_memory_of_a_connection_is_refused() {
    let fd = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let why = |fd: &OwnedFd| ConnectionMemory::adopt(fd.try_clone().unwrap()).unwrap_err().to_string();
    assert!(why(&fd).contains("length"));
    rustix::fs::ftruncate(&fd, BYTES as u64).unwrap();
    assert!(why(&fd).contains("sealed"));
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    assert!(why(&fd).contains("layout"));
}

/// Names the memory for the process that dies, whose standard input is the socket.
const MEMORY: &str = "EVERDISK_TEST_MEMORY";

/// The process that dies.
#[test]
#[ignore = "started by beyond2_beyond7_a_killed_thread_leaves_the_position_behind"]
fn victim() {
    let Some(memory) = std::env::var_os(MEMORY) else { return };
    let memory = File::options().read(true).write(true).open(memory).unwrap();
    let memory = ConnectionMemory::adopt(memory.into()).unwrap();
    let socket = io::stdin().as_fd().try_clone_to_owned().unwrap();
    let pattern = tempfile::tempfile().unwrap();
    (&pattern).write_all(&bytes(0, 4 << 20)).unwrap();
    let mut step: u64 = std::process::id().into();
    loop {
        step = step.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let len = 1 + (step >> 33) % 6000;
        let sent = memory.sent();
        if step >> 62 == 3 {
            // A file whose every byte is the one of its position.
            let _ = memory.send_file(socket.as_fd(), pattern.as_fd(), sent, usize::try_from(len).unwrap());
        } else if step >> 63 == 0 {
            assert!(memory.write_output(at(sent, OUTPUT_BYTES), &bytes(sent, len)));
            let _ = memory.send(socket.as_fd(), at(sent, OUTPUT_BYTES), usize::try_from(len).unwrap());
        } else {
            let _ = memory.send_direct(socket.as_fd(), &bytes(sent, len));
        }
        let received = memory.received();
        let _ = memory.receive(socket.as_fd(), at(received, INPUT_BYTES), usize::try_from(len).unwrap());
    }
}

trait Stream: Read + Write + Send {
    fn set_limit(&self);
    fn twin(&self) -> Self;
}

macro_rules! stream {
    ($kind:ty) => {
        impl Stream for $kind {
            fn set_limit(&self) {
                self.set_nonblocking(true).unwrap();
            }
            fn twin(&self) -> Self {
                self.try_clone().unwrap()
            }
        }
    };
}
stream!(UnixStream);
stream!(TcpStream);

/// Reads up to `expected`, for which TCP may take its time, and what else comes soon after.
fn drain(socket: &mut impl Stream, position: &mut u64, expected: u64) {
    let mut chunk = [0; 8192];
    let mut silent = 0;
    while silent < if *position < expected { 2000 } else { 3 } {
        match socket.read(&mut chunk) {
            Ok(0) => return,
            Ok(n) => {
                assert_eq!(chunk[..n], bytes(*position, n as u64), "at {position}");
                *position += n as u64;
                silent = 0;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_micros(300));
                silent += 1;
            }
            Err(e) => panic!("{e}"),
        }
    }
}

/// Kills a process that sends and receives continually, and counts what came out at the other end.
fn kill_once(ours: impl Stream + Into<OwnedFd>, mut theirs: impl Stream, after: Duration) {
    theirs.set_limit();
    let memory = ConnectionMemory::create().unwrap();
    let mut kept = ours.twin();
    let mut victim = Command::new(std::env::current_exe().unwrap());
    victim.args(["--ignored", "--exact", "connection::tests::victim"]);
    victim.env(MEMORY, format!("/proc/{}/fd/{}", std::process::id(), memory.as_fd().as_raw_fd()));
    victim.stdin(Stdio::from(ours.into())).stdout(Stdio::null()).stderr(Stdio::null());
    let mut victim = victim.spawn().unwrap();
    let (mut read, mut written) = (0, 0);
    let begun = std::time::Instant::now();
    while memory.sent() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(20), "the victim does not begin");
        thread::sleep(Duration::from_micros(100));
    }
    let end = std::time::Instant::now() + after;
    while std::time::Instant::now() < end {
        written += theirs.write(&bytes(written, 3000)).unwrap_or(0) as u64;
        let mut chunk = [0; 4096];
        let n = theirs.read(&mut chunk).unwrap_or(0);
        assert_eq!(chunk[..n], bytes(read, n as u64));
        read += n as u64;
    }
    victim.kill().unwrap();
    victim.wait().unwrap();
    drain(&mut theirs, &mut read, memory.sent());
    assert_eq!(memory.sent(), read, "bytes that were sent");
    let received = memory.received();
    let mut rest = received;
    kept.set_limit();
    drain(&mut kept, &mut rest, written);
    assert_eq!(rest, written, "bytes that were received, and those that were not");
    let kept_len = received.min(RING);
    let mut got = vec![0; usize::try_from(kept_len).unwrap()];
    if !got.is_empty() {
        assert!(memory.read_input(at(received - kept_len, INPUT_BYTES), &mut got));
    }
    assert_eq!(got, bytes(received - kept_len, kept_len));
}

/// Beyond 2, beyond 7: a process is killed at any moment. The memory then says, exact to the byte, how far its socket
/// was read and written.
#[test]
fn beyond2_beyond7_a_killed_thread_leaves_the_position_behind() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for round in 0..40 {
        let after = Duration::from_micros(200 + 97 * round);
        let (ours, theirs) = UnixStream::pair().unwrap();
        kill_once(ours, theirs, after);
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        kill_once(ours, listener.accept().unwrap().0, after);
    }
}
