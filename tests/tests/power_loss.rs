//! The power fails: what was said to be durable is there, on every storage node. Nodes with a volatile cache (`fault_store`) lose what
//! was not flushed; real disks show that a flush goes as far as the device.

use std::{fs::File, io::Write as _, os::unix::fs::FileExt};

use everdisk_tests::{
    buffer,
    bytes::{Aligned, Random, pattern},
    disks::Disk,
    faults::Faults,
    host::Host,
    nbd::{Client, Exported, Kind, request},
    promises::{Loss, Plan, Promises},
    volume::{STRIPE, Volume, striped},
};
use rustix::{fs::OFlags, io::ReadWriteFlags};

use crate::crash_consistency::{attach_again, kill_all};

const KIB: usize = 1 << 10;
const SIZE: usize = 8 << 20;
const FUA: u16 = 1;

/// D5: a load runs, every process dies and the power of every storage node fails: nothing is older than what was acknowledged before
/// the last acknowledged fsync began.
#[test]
fn d5_what_was_flushed_survives_a_power_failure_of_every_storage_node() {
    let host = Host::faulty();
    host.create_with("v", "64M", 3, &["--buffer", &buffer::size("4M")]);
    let volume = Volume::new(&host, "v");
    let faults = Faults::volatile(&volume);
    volume.attach(&[]);
    let promises = Promises::new(Plan::new(21));
    let mut random = Random::new(21);
    let (mut all, mut bytes) = (Loss::default(), 0);
    for round in 0..8 {
        faults.set(["", "write delay_us=1000", "flush delay_us=5000"][round % 3]);
        let load = promises.start(&volume);
        load.goes_on(200 + random.below(600));
        kill_all(&volume);
        load.stop_with_errors();
        faults.clear();
        bytes += faults.lose_power();
        attach_again(&volume);
        let loss = promises.check_after_loss(&volume.open());
        all = Loss { blocks: all.blocks + loss.blocks, of: all.of + loss.of };
    }
    println!("{bytes} bytes lost, {} of {} blocks older, {} fsyncs", all.blocks, all.of, promises.flushes());
    assert!(bytes > 0, "the nodes lost nothing: this test shows nothing");
    volume.detach();
}

/// One way to have something durable: its name, and how it is done at an offset. Zeros are written where `data` is all zeros.
type Way = (&'static str, fn(&mut Ends<'_>, u64, &[u8]));

/// The ends of a volume that a test writes at.
struct Ends<'a> {
    volume: &'a Volume<'a>,
    file: File,
    client: Client,
    other: Client,
}

impl Ends<'_> {
    fn with(&self, flags: OFlags) -> File {
        self.volume.open_with(flags).unwrap()
    }

    fn fua(&mut self, kind: Kind, offset: u64, len: usize, payload: &[u8]) {
        let head = request(kind as u16, FUA, offset, offset, u32::try_from(len).unwrap());
        self.client.stream.write_all(&[&head[..], payload].concat()).unwrap();
        self.client.good(offset);
    }
}

const WAYS: [Way; 14] = [
    ("fsync", |ends, at, data| {
        ends.file.write_all_at(data, at).unwrap();
        ends.file.sync_all().unwrap();
    }),
    ("fdatasync by another descriptor", |ends, at, data| {
        ends.file.write_all_at(data, at).unwrap();
        ends.volume.open().sync_data().unwrap();
    }),
    ("O_DSYNC", |ends, at, data| ends.with(OFlags::DSYNC).write_all_at(data, at).unwrap()),
    ("O_SYNC", |ends, at, data| ends.with(OFlags::SYNC).write_all_at(data, at).unwrap()),
    ("O_DSYNC and O_DIRECT", |ends, at, data| {
        ends.with(OFlags::DSYNC | OFlags::DIRECT).write_all_at(Aligned::of(data).as_ref(), at).unwrap();
    }),
    ("RWF_DSYNC", |ends, at, data| {
        let data = [std::io::IoSlice::new(data)];
        let written = rustix::io::pwritev2(&ends.file, &data, at, ReadWriteFlags::DSYNC).unwrap();
        assert_eq!(written, data[0].len());
    }),
    ("NBD flush", |ends, at, data| {
        ends.client.write(at, data);
        ends.client.flush();
    }),
    ("NBD flush by another connection", |ends, at, data| {
        ends.client.write(at, data);
        ends.other.flush();
    }),
    ("NBD flush of what the file wrote", |ends, at, data| {
        ends.file.write_all_at(data, at).unwrap();
        ends.client.flush();
    }),
    ("fsync of what NBD wrote", |ends, at, data| {
        ends.client.write(at, data);
        ends.file.sync_data().unwrap();
    }),
    ("NBD write with FUA", |ends, at, data| ends.fua(Kind::Write, at, data.len(), data)),
    ("NBD zeroing with FUA", |ends, at, data| ends.fua(Kind::WriteZeroes, at, data.len(), &[])),
    ("NBD trim with FUA", |ends, at, data| ends.fua(Kind::Trim, at, data.len(), &[])),
    ("everdisk flush", |ends, at, data| {
        ends.file.write_all_at(data, at).unwrap();
        ends.volume.ask("flush", &[]).ok();
    }),
];

/// Does every call that means durable, at both nodes and at one alone, and checks at once what a power failure would leave.
fn each_way_is_durable(exported: &Exported<'_>, durable: &dyn Fn() -> Vec<Vec<u8>>) {
    let volume = &exported.volume;
    let (client, other) = (exported.unix.client(), exported.tcp.client());
    let mut ends = Ends { volume, file: volume.open(), client, other };
    let mut expected = pattern(1, SIZE);
    ends.file.write_all_at(&expected, 0).unwrap();
    ends.file.sync_data().unwrap();
    assert!(striped(&durable(), SIZE) == expected, "what was flushed is not durable");
    for (seed, (name, way)) in (2..).zip(WAYS) {
        // On the first node, on the second, on both; the last is longer than what NBD executes in one piece.
        for (offset, len) in
            [(0, 4 * KIB), (STRIPE, 4 * KIB), (3 * STRIPE - 4 * KIB, 8 * KIB), (4 * STRIPE, 2052 * KIB)]
        {
            let data =
                if name.contains("zeroing") || name.contains("trim") { vec![0; len] } else { pattern(seed, len) };
            way(&mut ends, offset as u64, &data);
            expected[offset..offset + len].copy_from_slice(&data);
            let found = striped(&durable(), SIZE);
            assert!(found == expected, "{name}: {len} bytes at {offset} are not durable");
        }
        // So that the next zeros are none already.
        ends.file.write_all_at(&pattern(seed, SIZE), 0).unwrap();
        ends.file.sync_data().unwrap();
        expected = pattern(seed, SIZE);
    }
    ends.client.end();
    ends.other.end();
    drop(ends.file);
    exported.detach();
}

/// D5: each way to have something durable is one by itself, on every node; with a buffer and without.
#[test]
fn d5_what_is_said_to_be_durable_survives_a_power_failure_at_once() {
    for size in ["4M", "0"] {
        let host = Host::faulty();
        let volume = host.create_with("v", "8M", 2, &["--buffer", size]);
        let faults = Faults::volatile(&volume);
        let exported = Exported::attach(volume);
        each_way_is_durable(&exported, &|| faults.durable());
        // It would not be found otherwise: data that was not flushed is not durable.
        exported.volume.attach(&[]);
        let file = exported.volume.open();
        let before = faults.durable();
        file.write_all_at(&vec![0x77; SIZE], 0).unwrap();
        assert!(faults.durable() == before || size != "0");
        drop(file);
        exported.volume.detach();
    }
}

/// D5: the same on disks of their own: a flush of a storage node goes as far as its device.
#[test]
fn d5_what_is_said_to_be_durable_has_come_as_far_as_the_disk_of_each_storage_node() {
    for size in ["4M", "0"] {
        let disks = [Disk::new(), Disk::new()];
        let host = Host::new();
        let nodes = disks.each_ref().map(|disk| format!("dir:{}", disk.node().display()));
        let create = ["volume", "create", "v", "--create-dir", "--size", "8M", "--stripe", "64K", "--buffer", size];
        host.everdisk(&[&create[..], &["--node", &nodes[0], "--node", &nodes[1]]].concat()).ok();
        let exported = Exported::attach(Volume::new(&host, "v"));
        each_way_is_durable(&exported, &|| disks.iter().map(Disk::durable).collect());
    }
}
