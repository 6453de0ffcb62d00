//! Storage nodes on a file system that can do little: ramfs makes no holes, reserves no space and zeroes no ranges.

use std::fs;

use everdisk_tests::{
    bytes::pattern,
    guards::Mount,
    host::Host,
    nbd::{Exported, Kind, request},
    volume::Volume,
};
use rustix::fs::{FallocateFlags as F, SeekFrom, fallocate, seek};
use std::{io::Write, os::unix::fs::FileExt};

const MIB: usize = 1 << 20;
const NO_HOLE: u16 = 1 << 1;

/// M7: everything an application may ask for is done where the nodes cannot do it by themselves, on the file and over NBD.
#[test]
fn m7_what_a_node_cannot_do_by_itself_is_done_all_the_same() {
    for buffer in ["4M", "0"] {
        let host = Host::new();
        let plain = host.root().join("nodes/plain");
        fs::create_dir(&plain).unwrap();
        let mount = Mount::new(&["-t", "ramfs", "none"], &plain);
        let nodes = ["a", "b"].map(|name| format!("dir:{}", plain.join(name).display()));
        let create = ["volume", "create", "v", "--create-dir", "--size", "8M", "--stripe", "64K", "--buffer", buffer];
        host.everdisk(&[&create[..], &["--node", &nodes[0], "--node", &nodes[1]]].concat()).ok();
        let exported = Exported::attach(Volume::new(&host, "v"));
        let (file, mut client) = (exported.volume.open(), exported.unix.client());
        let mut expected = pattern(1, 8 * MIB);
        file.write_all_at(&expected, 0).unwrap();
        let mut zeroed = |at: usize, len: usize| expected[at..at + len].fill(0);
        for (kind, flags, at) in
            [(Kind::WriteZeroes, NO_HOLE, 0), (Kind::WriteZeroes, 0, MIB), (Kind::Trim, 0, 2 * MIB)]
        {
            let head = request(kind as u16, flags, 1, at as u64 + 77, 300_000);
            client.stream.write_all(&head).unwrap();
            assert_eq!(client.reply().unwrap(), (1, 0), "{kind:?} {flags}");
            zeroed(at + 77, 300_000);
        }
        for (mode, at) in [(F::PUNCH_HOLE | F::KEEP_SIZE, 3 * MIB), (F::ZERO_RANGE | F::KEEP_SIZE, 4 * MIB)] {
            fallocate(&file, mode, at as u64 + 77, 300_000).unwrap();
            zeroed(at + 77, 300_000);
        }
        for mode in [F::empty(), F::KEEP_SIZE] {
            fallocate(&file, mode, 5 * MIB as u64, 2 * MIB as u64).unwrap();
        }
        // What is discarded is a hole as long as the discard is buffered.
        file.sync_data().unwrap();
        assert_eq!(seek(&file, SeekFrom::Data(0)).unwrap(), 0);
        assert_eq!(seek(&file, SeekFrom::Hole(0)).unwrap(), 8 * MIB as u64, "no hole is known");
        let mut found = vec![0; 8 * MIB];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected);
        assert!(client.read(0, 300_000) == expected[..300_000]);
        client.end();
        drop(file);
        exported.detach();
        host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
        drop(mount);
    }
}
