//! Storage nodes that are exports of NBD servers: nbdkit, qemu-nbd, nbd-server and another Everdisk, a directory beside them.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, symlink},
    path::Path,
    thread,
};

use everdisk_tests::{
    buffer,
    bytes::pattern,
    fio::{self, Job, Target},
    host::Host,
    load::Load,
    nbd::{Exported, fronts},
    processes,
    servers::{Kind, Server, one_of_each},
    volume::{Volume, striped},
    wait::until_true,
};

const MIB: usize = 1 << 20;
/// The last MiB of an export, which is not the volume's.
const TAIL: u64 = 1 << 20;
/// Linux's EIO.
const EIO: i32 = 5;

/// `volume create v` on these nodes.
fn making<'a>(size: &'a str, nodes: &'a [String], options: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["volume", "create", "v", "--size", size, "--stripe", "64K"];
    arguments.extend(nodes.iter().flat_map(|node| ["--node", node.as_str()]));
    arguments.extend(options);
    arguments
}

fn create<'a>(host: &'a Host, size: &str, nodes: &[String], options: &[&str]) -> Volume<'a> {
    host.everdisk(&making(size, nodes, options)).ok();
    Volume::new(host, "v")
}

fn nodes(servers: &[Server]) -> Vec<String> {
    servers.iter().map(Server::node).collect()
}

/// The file's bytes from its beginning on.
fn holds(file: &File, data: &[u8]) -> bool {
    let mut found = vec![0; data.len()];
    file.read_exact_at(&mut found, 0).unwrap();
    found == data
}

/// What lies on an export or in a node's data file.
fn stored(path: &Path, len: usize) -> Vec<u8> {
    let mut found = vec![0; len];
    File::open(path).unwrap().read_exact_at(&mut found, 0).unwrap();
    found
}

/// M7, M1, M4, G, beyond 4: a volume over four kinds of storage nodes serves a file and NBD clients, is upgraded in both ways
/// under fio's verification, grows, keeps its data when it is detached, and goes from all of them when it is deleted.
#[test]
fn m7_g_beyond4_a_volume_lies_on_exports_of_three_servers_and_in_a_directory() {
    let servers = one_of_each(32 * MIB as u64 + TAIL);
    let host = Host::new();
    let directory = host.node("v-3");
    let mut urls = nodes(&servers);
    urls.push(format!("dir:{}", directory.display()));
    let volume = create(&host, "64M", &urls, &["--create-dir", "--buffer", &buffer::size("16M")]);
    let exported = Exported::attach(volume.clone());
    let job = Job { depth: 16, direct: true, pattern: "randwrite", region: "8m", loops: 2 };
    let over_nbd = Target::Nbd { uri: exported.unix.uri(), offset: "32m" };
    let mut loads = [fio::Load::start(&job, &volume.path), fio::Load::start(&job, over_nbd)];
    for handover in ["carry", "flush", "carry", "flush"] {
        volume.upgrade_by(handover, &volume.other_core());
        loads.iter_mut().for_each(fio::Load::check);
    }
    loads.into_iter().for_each(|load| assert!(load.stop() > 0));
    let data = pattern(1, 64 * MIB);
    let file = volume.open();
    file.write_all_at(&data, 0).unwrap();
    file.sync_all().unwrap();
    let places = servers.iter().map(Server::image).chain([directory.join("data")]);
    let parts: Vec<Vec<u8>> = places.map(|place| stored(&place, 16 * MIB)).collect();
    assert!(striped(&parts, data.len()) == data, "what is durable lies striped on the nodes");
    let status = volume.status();
    let told = status.0["nodes"].as_array().unwrap();
    for (url, node) in urls.iter().zip(told) {
        assert_eq!((node["url"].as_str(), node["state"].as_str()), (Some(url.as_str()), Some("in-step")), "{status:?}");
    }
    assert_eq!((told.len(), status.health()), (4, "ok"), "{status:?}");
    drop(file);
    exported.detach();

    host.everdisk(&["volume", "resize", "v", "128M"]).ok();
    volume.attach(&[]);
    let file = volume.open();
    assert_eq!(file.metadata().unwrap().len(), 128 << 20);
    let grown = [data, vec![0; 64 * MIB]].concat();
    assert!(holds(&file, &grown), "the data, and zeros where it has grown");
    drop(file);
    volume.detach();

    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
    assert!(!directory.exists());
    // Nothing of it is left: each export is empty enough for another volume.
    create(&host, "64M", &nodes(&servers), &[]);
    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
}

/// M7, G: exports that cannot be a storage node are refused, and what is wrong is told with what to do. What was made of the
/// other nodes by then is undone.
#[test]
fn m7_g_exports_that_cannot_be_storage_nodes_are_refused_and_nothing_of_the_volume_stays() {
    let good = Server::new(Kind::QemuNbd, 17 * MIB as u64);
    let mut bad = Server::new(Kind::QemuNbd, 16 * MIB as u64);
    let host = Host::new();
    let refused = |node: String, words: &[&str]| {
        let urls = [good.node(), node.clone()];
        let words: Vec<&str> = std::iter::once(node.as_str()).chain(words.iter().copied()).collect();
        host.everdisk(&making("32M", &urls, &[])).refused(1, &words);
        assert!(stored(&good.image(), 17 * MIB).iter().all(|byte| *byte == 0), "{node}: nothing was made of the other");
        assert!(!host.root().join("state/volumes/v").exists(), "{node}");
    };
    refused(bad.node(), &["16777216 bytes", "needs 17825792", "Enlarge the export"]);
    refused(bad.export("another"), &["cannot connect", "unknown export", "correct the storage node's address"]);
    refused("nbd://127.0.0.1:1/disk".to_owned(), &["cannot connect", "Start the server"]);
    refused(
        format!("nbd+unix:///disk?socket={}", host.file("none").display()),
        &["cannot connect", "Start the server"],
    );
    bad.kill();
    bad.set_len(17 * MIB as u64);
    bad.make_read_only();
    refused(bad.node(), &["for reading only", "Have it exported for writing"]);
}

/// G: what an export holds is not overwritten, unless that is asked for; then nothing of it can be read in the volume.
#[test]
fn g_an_export_that_is_not_empty_is_overwritten_only_by_force() {
    let server = Server::new(Kind::Nbdkit, 17 * MIB as u64);
    let image = File::options().write(true).open(server.image()).unwrap();
    let letter = pattern(3, 4096);
    image.write_all_at(&letter, 5 * MIB as u64).unwrap();
    let host = Host::new();
    let urls = [server.node()];
    let words = [urls[0].as_str(), "not empty", "5242880", "--force"];
    host.everdisk(&making("16M", &urls, &[])).refused(1, &words);
    assert!(stored(&server.image(), 6 * MIB)[5 * MIB..][..4096] == letter, "it stays");
    let volume = create(&host, "16M", &urls, &["--force"]);
    volume.attach(&[]);
    let file = volume.open();
    assert!(holds(&file, &vec![0; 16 * MIB]), "a new volume reads as zeros");
    drop(file);
    volume.detach();
    // What belongs to a volume stays that volume's, by force too.
    host.everdisk(&["volume", "forget", "v", "--yes"]).ok();
    host.everdisk(&making("16M", &urls, &["--force"])).refused(1, &[&urls[0], "storage node of volume", "already"]);
}

/// G: an export is one storage node of one volume, by whichever address it is named.
#[test]
fn g_one_export_by_two_addresses_is_refused_and_so_is_that_of_another_volume() {
    let server = Server::new(Kind::Nbdkit, 17 * MIB as u64);
    let host = Host::new();
    let link = host.file("link");
    symlink(server.socket(), &link).unwrap();
    let other_spelling = format!("nbd+unix:///disk?socket={}", link.display());
    let twice = [server.node(), other_spelling.clone()];
    host.everdisk(&making("16M", &[server.node(), server.node()], &[])).refused(1, &["is named twice"]);
    host.everdisk(&making("16M", &twice, &[])).refused(1, &[&twice[1]]);
    create(&host, "16M", &[server.node()], &[]);
    let another = |node: &str| host.everdisk(&["volume", "create", "w", "--size", "16M", "--node", node]);
    another(&server.node()).refused(1, &[&server.node(), "storage node of volume v already"]);
    another(&other_spelling).refused(1, &[&other_spelling, "storage node of volume v ("]);
    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
    another(&other_spelling).ok();
    host.everdisk(&["volume", "delete", "w", "--yes"]).ok();
}

/// M7, G, beyond 4: a server is killed amid writes and started again. Its connections and what it had not flushed are made good:
/// no application sees an error, and everything acknowledged is there.
#[test]
fn m7_g_beyond4_a_server_that_is_killed_amid_writes_and_started_again_costs_no_error_and_no_data() {
    if !buffer::is_on() {
        return;
    }
    let mut servers = one_of_each(16 * MIB as u64 + TAIL);
    let host = Host::new();
    let volume = create(&host, "48M", &nodes(&servers), &["--buffer", &buffer::size("16M")]);
    volume.attach(&[]);
    let load = Load::start(&volume, 4);
    for round in 0..2 {
        for server in &mut servers {
            load.goes_on(200);
            server.kill();
            if round == 1 {
                // Its absence is noticed before it is back.
                let url = server.node();
                volume.wait("status names the server that has gone", |status| status.has_problem(&[&url]));
            }
            server.start();
        }
    }
    load.goes_on(200);
    load.stop();
    volume.ask("flush", &[]).ok();
    volume.wait("every node works again", |status| status.health() == "ok");
    volume.detach();
}

/// M7, G, M4, beyond 4: a server stands still. Writes are buffered, `status` names the node and says what is wrong, and an upgrade
/// succeeds in the middle of it. When the server goes on, everything arrives.
#[test]
fn m7_g_beyond4_a_server_that_stands_still_is_named_and_an_upgrade_succeeds_meanwhile() {
    if !buffer::is_on() {
        return;
    }
    let servers = [Kind::QemuNbd, Kind::NbdServer].map(|kind| Server::new(kind, 16 * MIB as u64 + TAIL));
    let host = Host::new();
    let volume = create(&host, "32M", &nodes(&servers), &["--buffer", &buffer::size("16M")]);
    volume.attach(&[]);
    let data = pattern(7, 8 * MIB);
    let file = volume.open();
    let frozen = servers[0].freeze();
    file.write_all_at(&data, 0).unwrap();
    let url = servers[0].node();
    let status = volume.wait("status names the server", |status| status.has_problem(&[&url, "does not end"]));
    assert!(!status.has_problem(&[&servers[1].node()]), "{status:?}");
    volume.upgrade_by("carry", &volume.other_core());
    assert!(holds(&file, &data), "what is buffered is read");
    drop(frozen);
    volume.ask("flush", &[]).ok();
    volume.wait("the node works again", |status| status.health() == "ok");
    let parts: Vec<Vec<u8>> = servers.iter().map(|server| stored(&server.image(), 4 * MIB)).collect();
    assert!(striped(&parts, data.len()) == data, "everything has arrived");
    drop(file);
    volume.detach();
}

/// G, beyond 2: a core is killed with a write in flight at a slow server. Its successor reaches the same disk by a quick one. Its
/// write to the same place is not overwritten by the dead core's: it waits until that is answered, and `status` says so.
#[test]
fn g_beyond2_nothing_that_a_killed_core_has_sent_lands_after_its_successors_writes() {
    if !buffer::is_on() {
        return;
    }
    let mut server = Server::new(Kind::Nbdkit, 2 * MIB as u64 + TAIL);
    let host = Host::new();
    let volume = create(&host, "2M", &[server.node()], &["--buffer", &buffer::size("16M")]);
    server.writes_take(5);
    volume.attach(&[]);
    let slow = volume.wait("a standby is ready", |status| status.standby().is_some()).standby().unwrap();
    server.writes_take(0);
    processes::kill(slow);
    volume.wait("a standby at the quick server", |status| status.standby().is_some_and(|standby| standby != slow));
    let [old, new] = [1, 2].map(|seed| pattern(seed, 4096));
    let file = volume.open();
    file.write_all_at(&old, 0).unwrap();
    thread::scope(|scope| {
        // It asks the core that is killed, and may fail.
        let flush = scope.spawn(|| volume.ask("flush", &[]));
        thread::sleep(std::time::Duration::from_millis(500));
        volume.kill_core();
        volume.wait("status says what is waited for", |status| status.has_problem(&["still in flight"]));
        file.write_all_at(&new, 0).unwrap();
        drop(flush.join().unwrap());
    });
    volume.ask("flush", &[]).ok();
    // Longer than the dead core's write takes.
    thread::sleep(std::time::Duration::from_millis(5500));
    assert!(stored(&server.image(), 4096) == new, "the dead core's write has landed after its successor's");
    drop(file);
    volume.detach();
}

/// D5, G, beyond 4: how long a read waits for a server that is out of reach is the operator's choice. Buffered writes do not wait
/// for it, and are there when it is back.
#[test]
fn d5_g_beyond4_a_read_of_a_server_that_has_gone_fails_after_the_time_that_was_chosen() {
    if !buffer::is_on() {
        return;
    }
    let mut server = Server::new(Kind::Nbdkit, 16 * MIB as u64 + TAIL);
    let host = Host::new();
    let options = ["--buffer", &buffer::size("16M"), "--io-timeout", "500ms"];
    let volume = create(&host, "16M", &[server.node()], &options);
    volume.attach(&[]);
    let status = volume.ask("status", &["--json"]).ok();
    assert!(status.contains("\"io_ms\":500"), "{status}");
    assert!(host.everdisk(&["volume", "show", "v"]).ok().contains("I/O 500ms"));
    let file = volume.open();
    server.kill();
    let data = pattern(9, MIB);
    file.write_all_at(&data, 0).unwrap();
    // Nothing of this range was ever read or written, so nobody but the node has it.
    let failed = thread::scope(|scope| {
        let reader = scope.spawn(|| file.read_exact_at(&mut [0; 4096], 8 * MIB as u64).unwrap_err());
        until_true("the read times out", || reader.is_finished());
        reader.join().unwrap()
    });
    assert_eq!(failed.raw_os_error(), Some(EIO));
    let url = server.node();
    volume.wait("status names the server", |status| status.has_problem(&[&url]));
    server.start();
    until_true("the range can be read", || file.read_exact_at(&mut [0; 4096], 8 * MIB as u64).is_ok());
    volume.ask("flush", &[]).ok();
    assert!(stored(&server.image(), MIB) == data, "what was buffered has arrived");
    volume.wait("the node works again", |status| status.health() == "ok");
    drop(file);
    volume.detach();
}

/// M7, G: a volume is not attached while a server is out of reach, nor deleted. What has another size than it had is refused.
#[test]
fn m7_g_a_volume_whose_server_has_gone_is_neither_attached_nor_deleted() {
    let mut servers = [Kind::Nbdkit, Kind::QemuNbd].map(|kind| Server::new(kind, 8 * MIB as u64 + TAIL));
    let host = Host::new();
    let volume = create(&host, "16M", &nodes(&servers), &[]);
    volume.attach(&[]);
    let data = pattern(5, 16 * MIB);
    volume.open().write_all_at(&data, 0).unwrap();
    volume.detach();
    let urls = nodes(&servers);
    servers[0].kill();
    volume.try_attach(&[]).refused(1, &[&urls[0], "cannot connect", "Start the server"]);
    host.everdisk(&["volume", "delete", "v", "--yes"]).refused(1, &[&urls[0], "nothing of it was touched", "--force"]);
    servers[0].set_len(9 * MIB as u64 + TAIL);
    servers[0].start();
    volume.try_attach(&[]).refused(1, &[&urls[0], "restore"]);
    servers[0].kill();
    servers[0].set_len(8 * MIB as u64 + TAIL);
    servers[0].start();
    volume.attach(&[]);
    let file = volume.open();
    assert!(holds(&file, &data));
    drop(file);
    volume.detach();
    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
}

/// M7, M4, G, beyond 4: an Everdisk serves the storage node of another one, over TCP. Either core is replaced under the load of both.
#[test]
fn m7_g_beyond4_an_everdisk_is_the_storage_node_of_another_one_and_both_are_upgraded() {
    let host = Host::new();
    let inner = host.create("inner", "33M", 1);
    inner.attach(&["--nbd", "tcp:127.0.0.1:0"]);
    let uri = fronts(&inner)[0].uri_of("inner");
    let volume = create(&host, "32M", std::slice::from_ref(&uri), &["--buffer", &buffer::size("8M")]);
    volume.attach(&[]);
    let load = Load::start(&volume, 4);
    for handover in ["carry", "flush"] {
        load.goes_on(100);
        inner.upgrade_by(handover, &inner.other_core());
        load.goes_on(100);
        volume.upgrade_by(handover, &volume.other_core());
    }
    load.goes_on(100);
    inner.kill_core();
    load.goes_on(100);
    load.stop();
    // Nobody takes the ground from under it.
    host.everdisk(&["detach", "inner"]).refused(1, &["inner"]);
    volume.detach();
    host.everdisk(&["volume", "delete", "v", "--yes"]).ok();
    inner.detach();
    assert!(fs::metadata(inner.node(0).join("data")).is_ok());
}
