//! The file mapped into memory, beside other front ends and alone.

use everdisk_tests::{
    guards::Loop,
    host::Host,
    nbd::{Exported, client, nbdsh},
    processes,
    run::sh,
};

/// What both scripts begin with; the file's path follows.
const PRELUDE: &str = "
import errno, mmap, os

def mapped(fd, kind, protection=mmap.PROT_READ | mmap.PROT_WRITE):
    return mmap.mmap(fd, 8192, flags=kind, prot=protection)
";

/// The file of a volume with an NBD front end cannot be mapped shared, by whatever core and interface; what is mapped privately is
/// up to date when it is mapped.
const BESIDE_NBD: &str = "
fd = os.open(path, os.O_RDWR)
for protection in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
    try:
        mapped(fd, mmap.MAP_SHARED, protection)
    except OSError as e:
        assert e.errno == errno.ENODEV, e
    else:
        raise AssertionError('a shared mapping beside an NBD front end')
for n in range(1, 4):
    h.pwrite(bytes([n]) * 8192, 0)
    assert os.pread(fd, 8192, 0) == bytes([n]) * 8192, 'read'
    private = mapped(fd, mmap.MAP_PRIVATE)
    assert private[:] == bytes([n]) * 8192, 'a private mapping'
    # A page of its own, which the file never sees.
    private[0:1] = b'x'
    assert h.pread(1, 0) == bytes([n])
    os.pwrite(fd, bytes([n + 64]) * 8192, 0)
    assert h.pread(8192, 0) == bytes([n + 64]) * 8192, 'NBD'
    private.close()
os.close(fd)
";

fn refused_beside_nbd(exported: &Exported<'_>) {
    let path = format!("path = {:?}\n", exported.volume.path);
    exported.unix.nbdsh(&[PRELUDE, &path, BESIDE_NBD].concat());
}

/// D5: an NBD client's flushed write could be destroyed by a store through a stale page: there are no shared mappings beside NBD. What works
/// without them works.
#[test]
fn d5_a_file_beside_an_nbd_front_end_cannot_be_mapped_shared() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "16M");
    refused_beside_nbd(&exported);
    exported.volume.turn();
    exported.volume.kill_core();
    let interface = exported.volume.settled().interface();
    processes::kill(interface.unwrap());
    let restored =
        |status: &everdisk_tests::status::Status| status.serves() && ![None, interface].contains(&status.interface());
    exported.volume.wait("a new interface", restored);
    refused_beside_nbd(&exported);
    // A loop device, and QEMU, read and write the file.
    let mut nbd = exported.unix.client();
    {
        let device = Loop::on(&exported.volume.path);
        nbd.write(0, &[7; 8192]);
        let (from, to) = (format!("if={}", device.device()), format!("of={}", exported.volume.path.display()));
        sh("dd", &[&from, &to, "bs=4k", "count=1", "seek=1", "conv=notrunc", "iflag=direct", "status=none"]);
    }
    assert_eq!(nbd.read(4096, 4096), [7; 4096]);
    client("qemu-io", &["-f", "raw", "-c", "write -P 9 0 4k", "-c", "flush", exported.volume.path.to_str().unwrap()])
        .ok();
    assert_eq!(nbd.read(0, 4096), [9; 4096]);
    nbd.end();
    exported.detach();
}

/// The file alone can be mapped shared: it and other descriptors see each other's bytes, also after another core has come.
#[test]
fn d5_a_file_alone_can_be_mapped_shared() {
    const ALONE: &str = "
a, b = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
shared = mapped(a, mmap.MAP_SHARED)
for n in range(1, 4):
    os.pwrite(b, bytes([n]) * 8192, 0)
    assert shared[:] == bytes([n]) * 8192, 'a write is seen in the mapping'
    shared[4096:4097] = b'x'
    shared.flush()
    assert os.pread(b, 2, 4095) == bytes([n]) + b'x', 'a store is read'
";
    let host = Host::new();
    let volume = host.volume("v", "16M");
    let look = || nbdsh(&["-n"], &[PRELUDE, &format!("path = {:?}\n", volume.path), ALONE].concat());
    look();
    volume.turn();
    look();
    volume.detach();
}
