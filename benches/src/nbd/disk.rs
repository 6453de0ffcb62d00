//! A volume as the verified load sees it over NBD: a connection that broke is replaced and its request repeated, as an
//! application's client does, and counted.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use everdisk_harness::nbd::{Address, Client, Kind};

use crate::{host::VOLUME, load::Disk};

/// A server takes a client again within this time.
const RECONNECTED_WITHIN: Duration = Duration::from_secs(20);
const AGAIN_AFTER: Duration = Duration::from_millis(10);

/// A server that is silent for so long hangs.
const SILENT_FOR: Duration = Duration::from_secs(30);

/// A client of the volume.
///
/// # Errors
/// The operating system's; `InvalidData` when it is not NBD that the server speaks.
pub fn connect(address: &Address) -> io::Result<Client> {
    Client::of_export(address.connect(SILENT_FOR)?, VOLUME)
}

/// Takes leave of the server, which may have gone.
pub fn leave(client: &mut Client) {
    let _ = client.send(Kind::Disconnect, 0, 0, 0, &[]);
}

/// One connection.
#[derive(Debug)]
pub struct NbdDisk {
    address: Address,
    client: Client,
    broken: Arc<AtomicU64>,
}

impl NbdDisk {
    /// Connects; adds to `broken` whenever the connection breaks.
    ///
    /// # Errors
    /// As [`connect`].
    pub fn connect(address: &Address, broken: &Arc<AtomicU64>) -> io::Result<Self> {
        Ok(Self { address: address.clone(), client: connect(address)?, broken: Arc::clone(broken) })
    }

    fn request(&mut self, mut request: impl FnMut(&mut Client) -> io::Result<()>) -> io::Result<()> {
        let deadline = Instant::now() + RECONNECTED_WITHIN;
        loop {
            match request(&mut self.client) {
                Err(error) if is_end_of_connection(&error) && Instant::now() < deadline => {}
                other => return other,
            }
            self.broken.fetch_add(1, Relaxed);
            self.client = loop {
                match connect(&self.address) {
                    Err(_) if Instant::now() < deadline => thread::sleep(AGAIN_AFTER),
                    other => break other?,
                }
            };
        }
    }
}

impl Disk for NbdDisk {
    fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.request(|client| client.try_read(offset, bytes)).map(|()| bytes.len())
    }

    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.request(|client| client.try_write(offset, bytes)).map(|()| bytes.len())
    }
}

impl Drop for NbdDisk {
    fn drop(&mut self) {
        leave(&mut self.client);
    }
}

/// Neither an error that the server reports, nor silence, nor nonsense.
fn is_end_of_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::{UnixListener, UnixStream},
    };

    use super::*;

    fn take(stream: &mut UnixStream, bytes: usize) -> Vec<u8> {
        let mut taken = vec![0; bytes];
        stream.read_exact(&mut taken).unwrap();
        taken
    }

    /// Says what a server says, to a client that does as ours.
    fn serve(stream: &mut UnixStream, replies: usize) {
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
        assert_eq!(take(stream, 4), [0, 0, 0, 3]);
        assert_eq!(take(stream, 17), b"IHAVEOPT\0\0\0\x01\0\0\0\x01v");
        stream.write_all(&[0; 10]).unwrap();
        for _ in 0..replies {
            let request = take(stream, 28);
            assert_eq!(request[..8], [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0], "a read");
            stream.write_all(&[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], &request[8..16], &[9; 4]].concat()).unwrap();
        }
    }

    #[test]
    fn a_connection_that_breaks_is_counted_and_its_request_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            for replies in [1, 2] {
                serve(&mut listener.accept().unwrap().0, replies);
            }
        });
        let broken = Arc::default();
        let mut disk = NbdDisk::connect(&Address::Unix(path), &broken).unwrap();
        for expected in [0, 1, 1] {
            let mut bytes = [0; 4];
            assert_eq!(disk.read_at(&mut bytes, 0).unwrap(), 4);
            assert_eq!((bytes, broken.load(Relaxed)), ([9; 4], expected));
        }
        server.join().unwrap();
    }
}
