//! Third-party clients on the exports of a volume: libnbd's and QEMU's (M5).

use std::{
    io::{Read, Write},
    os::unix::fs::{FileExt, MetadataExt},
};

use everdisk_tests::{
    bytes::pattern,
    host::Host,
    nbd::{Exported, Front, Kind, client, go, greet, option, option_reply, request, wire},
    processes,
    run::Output,
};
use serde_json::Value;

const SIZE: u64 = 64 << 20;

fn json(output: Output) -> Value {
    serde_json::from_str(&output.ok()).unwrap()
}

fn nbdinfo(arguments: &[&str]) -> Output {
    client("nbdinfo", arguments)
}

/// The sum of the extents of a map that satisfy `wanted`, by their type: 1 is a hole, 2 reads as zeros.
fn mapped(uri: &str, wanted: impl Fn(u64) -> bool) -> u64 {
    let map = json(nbdinfo(&["--json", "--map", uri]));
    let extents = map.as_array().unwrap();
    let length = |extent: &Value| extent["length"].as_u64().unwrap();
    assert_eq!(extents.iter().map(length).sum::<u64>(), SIZE, "{map}");
    extents.iter().filter(|extent| wanted(extent["type"].as_u64().unwrap())).map(length).sum()
}

/// M5: what an export says of itself, by its name and by none, in a list, and as a map.
#[test]
fn m5_nbdinfo_shows_what_the_export_can_do_and_where_its_data_is() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    for front in exported.both() {
        for name in ["v", ""] {
            let export = json(nbdinfo(&["--json", &front.uri_of(name)]));
            assert_eq!(export["protocol"], "newstyle-fixed", "{export}");
            assert_eq!((&export["TLS"], &export["structured"]), (&Value::Bool(false), &Value::Bool(true)));
            let export = &export["exports"][0];
            assert_eq!(export["export-size"].as_u64(), Some(SIZE), "{export}");
            for can in ["cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"] {
                assert_eq!(export[format!("can_{can}")], true, "{can}: {export}");
            }
            assert_eq!((&export["is_read_only"], &export["is_rotational"]), (&false.into(), &false.into()));
            assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
            let sizes = ["minimum", "preferred", "maximum"].map(|size| export[format!("block_size_{size}")].as_u64());
            assert_eq!((sizes[0], sizes[2]), (Some(1), Some(u64::from(wire::PAYLOAD_MAX))), "{export}");
            assert!(sizes[1].is_some_and(|size| size.is_power_of_two() && size >= 4096), "{export}");
        }
        let list = json(nbdinfo(&["--list", "--json", &front.uri()]));
        let names: Vec<&Value> = list["exports"].as_array().unwrap().iter().map(|e| &e["export-name"]).collect();
        assert_eq!(names, ["v"], "{list}");
        assert_eq!(nbdinfo(&["--size", &front.uri()]).ok().trim(), SIZE.to_string());
        nbdinfo(&["--can", "multi-conn", &front.uri()]).ok();
        let output = nbdinfo(&[&front.uri_of("w")]);
        assert!(!output.status.success(), "an export that is not there: {output:?}");
    }
    assert_eq!(mapped(&exported.unix.uri(), |kind| kind == 3), SIZE, "a new volume is one hole");
    let data = pattern(1, 4 << 20);
    exported.volume.open().write_all_at(&data, 8 << 20).unwrap();
    for front in exported.both() {
        assert_eq!(mapped(&front.uri(), |kind| kind == 0), 4 << 20, "what was written to the file is there");
    }
    exported.unix.nbdsh("h.trim(4 << 20, 8 << 20); h.flush()");
    assert_eq!(mapped(&exported.tcp.uri(), |kind| kind == 3), SIZE, "what was trimmed is a hole again");
    exported.detach();
}

/// M5: in by one front end, out by another one, with a file beside them.
#[test]
fn m5_nbdcopy_copies_in_and_out_and_between_volumes() {
    let host = Host::new();
    let (exported, other) = (Exported::new(&host, "v", "64M"), Exported::new(&host, "w", "64M"));
    let path = |name: &str| host.root().join(name).to_str().unwrap().to_owned();
    let (source, target) = (path("source"), path("target"));
    let image = std::fs::File::create(&source).unwrap();
    image.set_len(SIZE).unwrap();
    let data = pattern(7, 24 << 20);
    image.write_all_at(&data, 3 << 20).unwrap();
    image.write_all_at(b"end", SIZE - 3).unwrap();
    client("nbdcopy", &["--flush", &source, &exported.unix.uri()]).ok();
    client("nbdcopy", &["--flush", &exported.tcp.uri(), &other.unix.uri()]).ok();
    client("nbdcopy", &[&other.tcp.uri(), &target]).ok();
    let source = std::fs::read(&source).unwrap();
    assert!(source == std::fs::read(&target).unwrap(), "other bytes than were copied in");
    assert!(source == std::fs::read(&exported.volume.path).unwrap(), "the file has other bytes than the export");
    assert!(mapped(&other.unix.uri(), |kind| kind == 3) >= 32 << 20, "holes were copied as holes");
    exported.detach();
    other.detach();
}

/// M5: every command, with every flag that it may have.
#[test]
fn m5_nbdsh_every_command_does_what_it_says() {
    let host = Host::new();
    for number in 0..2 {
        let exported = Exported::new(&host, &format!("v{number}"), "64M");
        exported.both()[number].nbdsh(include_str!("nbdsh/commands.py"));
        exported.detach();
    }
}

/// M5: zeros that may be no hole take their space on the storage nodes, those that may be one give it back. A map does not
/// tell: most file systems show what was allocated and never written as a hole.
#[test]
fn m5_zeros_that_may_be_no_hole_have_their_space() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    let taken = || (0..2).map(|node| exported.volume.node(node).join("data").metadata().unwrap().blocks() * 512).sum();
    let before: u64 = taken();
    exported.unix.nbdsh("h.zero(8 << 20, 16 << 20, nbd.CMD_FLAG_NO_HOLE); h.flush()");
    assert!(taken() >= before + (8 << 20), "{before} and {} bytes", taken());
    exported.unix.nbdsh("assert h.pread(8 << 20, 16 << 20) == bytes(8 << 20); h.zero(8 << 20, 16 << 20); h.flush()");
    assert!(taken() < before + (1 << 20), "{before} and {} bytes", taken());
    exported.detach();
}

/// M5: whatever a client asks for and may not get fails by the error that the protocol gives it, and nothing else.
#[test]
fn m5_nbdsh_whatever_is_wrong_is_refused_and_does_no_harm() {
    let host = Host::new();
    for number in 0..2 {
        let exported = Exported::new(&host, &format!("v{number}"), "64M");
        exported.both()[number].nbdsh(include_str!("nbdsh/errors.py"));
        exported.detach();
    }
}

/// M5: multi-conn is told, and true.
#[test]
fn m5_connections_see_each_others_writes_and_a_flush_on_one_is_a_flush_of_all() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    let uris = format!("uris = ['{}', '{}']\n", exported.unix.uri(), exported.tcp.uri());
    everdisk_tests::nbd::nbdsh(&[], &(uris + include_str!("nbdsh/connections.py")));

    // That what one has written is durable after another's flush: everything dies.
    let data = pattern(3, 3 << 20);
    let (mut writer, mut other) = (exported.unix.client(), exported.tcp.client());
    for (at, part) in (0..).step_by(1 << 20).zip(data.chunks(1 << 20)) {
        writer.write(20_000_001 + at, part);
    }
    other.flush();
    let status = exported.volume.settled();
    let mut all = status.cores();
    all.extend(status.interface());
    processes::kill_together(&all);
    exported.volume.wait("a clear state", |status| status.state() == "failed");
    drop((writer, other));
    let exported = Exported::attach(exported.volume.clone());
    let mut reader = exported.unix.client();
    assert!(reader.read(20_000_001, 3 << 20) == data, "what was flushed is not there");
    reader.end();
    exported.detach();
}

/// 5: the file and the exports are one volume: each sees at once what was written to the others.
#[test]
fn m5_the_file_and_the_exports_have_the_same_bytes() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    let file = exported.volume.open();
    let (mut unix, mut tcp) = (exported.unix.client(), exported.tcp.client());
    assert_eq!((unix.size, tcp.size), (SIZE, SIZE));
    let mut found = vec![0; 70_000];
    for number in 0..40 {
        let (data, at) = (pattern(number, 70_000), number * 1_000_003);
        match number % 3 {
            0 => file.write_all_at(&data, at).unwrap(),
            1 => unix.write(at, &data),
            _ => tcp.write(at, &data),
        }
        file.read_exact_at(&mut found, at).unwrap();
        assert!(found == data, "the file, write {number}");
        assert!(unix.read(at, 70_000) == data, "unix, write {number}");
        assert!(tcp.read(at, 70_000) == data, "TCP, write {number}");
    }
    assert_eq!(exported.connections(), 2);
    exported.volume.ask("detach", &[]).refused(1, &["--force"]);
    unix.end();
    tcp.end();
    drop(file);
    exported.detach();
}

fn qemu_io(uri: &str, commands: &[&str]) -> String {
    let mut arguments = Vec::new();
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.extend(["-f", "raw", uri]);
    let text = client("qemu-io", &arguments).ok();
    let bad = ["failed", "error", "verification"].iter().any(|word| text.to_lowercase().contains(word));
    assert!(!bad, "{text}");
    text
}

/// M5: QEMU's block layer as a client, with its own patterns and its own conversion.
#[test]
fn m5_qemu_io_and_qemu_img_work_on_the_exports() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    for (front, byte) in exported.both().into_iter().zip([17, 40]) {
        let uri = front.uri_of("v");
        let commands =
            [format!("write -P {byte} 1M 5M"), format!("write -P {} 9000k 7k", byte + 1), "flush".to_owned()];
        qemu_io(&uri, &commands.each_ref().map(String::as_str));
        let commands = [format!("read -P {byte} 1M 5M"), format!("read -P {} 9000k 7k", byte + 1)];
        qemu_io(&uri, &commands.each_ref().map(String::as_str));
        qemu_io(&uri, &["write -z 2M 1M", "discard 4M 1M", "read -P 0 2M 1M", "read -P 0 4M 1M"]);
        qemu_io(&uri, &["aio_write -P 9 32M 1M", "aio_write -P 8 33M 1M", "aio_flush", "read -P 9 32M 1M", "flush"]);
        let map = client("qemu-img", &["map", "--output=json", "-f", "raw", &uri]).ok();
        assert!(map.contains("\"zero\": true") && map.contains("\"data\": true"), "{map}");
        client("qemu-img", &["bench", "-f", "raw", "-w", "-d", "32", "-s", "4k", "-c", "20000", &uri]).ok();
    }
    let source = host.root().join("source.raw");
    std::fs::write(&source, pattern(3, 64 << 20)).unwrap();
    let source = source.to_str().unwrap();
    let (unix, tcp) = (exported.unix.uri(), exported.tcp.uri());
    client("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source, &unix]).ok();
    client("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &tcp]).ok();
    client("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, exported.volume.path.to_str().unwrap()]).ok();
    exported.detach();
}

/// M5: commands that no library sends. The error is the protocol's, the stream stays in step, the connection goes on.
#[test]
fn m5_unknown_commands_are_refused_and_the_connection_goes_on() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    for front in exported.both() {
        let mut connection = front.client();
        for (cookie, command) in [(1, 8), (2, 9), (3, 100), (u64::MAX, u16::MAX)] {
            connection.stream.write_all(&request(command, 0, cookie, 0, 0)).unwrap();
            assert_eq!(connection.reply().unwrap(), (cookie, 22), "EINVAL for command {command}");
        }
        connection.stream.write_all(&request(Kind::Read as u16, 1 << 12, 4, 0, 512)).unwrap();
        assert_eq!(connection.reply().unwrap(), (4, 22));
        // The bytes of a write that is refused are not the next request.
        connection.send(Kind::Write, 5, SIZE - 512, 1024, &[7; 1024]).unwrap();
        let (cookie, error) = connection.reply().unwrap();
        assert!(cookie == 5 && [22, 28].contains(&error), "{cookie} {error}");
        connection.write(4096, b"and on it goes");
        assert_eq!(connection.read(4096, 14), b"and on it goes");
        connection.end();

        // A write of more than any may have, and what is no request at all: that connection has come to its end.
        for bytes in [request(1, 0, 6, 0, u32::MAX), [0; 28]] {
            let mut connection = front.client();
            connection.stream.write_all(&bytes).unwrap();
            let mut rest = Vec::new();
            let _ = connection.stream.read_to_end(&mut rest);
            assert!(rest.is_empty() || rest.len() == 16, "{rest:?}");
        }
    }
    exported.detach();
}

fn ends_after(front: &Front, options: &[u8]) -> Vec<u8> {
    let mut stream = front.stream();
    greet(&mut stream).unwrap();
    stream.write_all(options).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    rest
}

/// M5: the handshake's options, known and unknown, in a row, and the old way in.
#[test]
fn m5_options_are_answered_one_by_one_and_the_old_way_in_works() {
    let host = Host::new();
    let exported = Exported::new(&host, "v", "64M");
    let mut stream = exported.unix.stream();
    greet(&mut stream).unwrap();
    for (number, data, answer) in [
        (99, vec![1, 2, 3], wire::UNSUPPORTED),
        (wire::INFO, go("no such volume"), wire::UNKNOWN),
        (wire::GO, go("no such volume"), wire::UNKNOWN),
        (wire::GO, vec![0xff; 6], 0x8000_0003),
        (8, vec![], wire::ACK),
    ] {
        stream.write_all(&option(number, &data)).unwrap();
        assert_eq!(option_reply(&mut stream, number).unwrap().0, answer, "option {number} with {data:?}");
    }
    stream.write_all(&option(wire::LIST, &[])).unwrap();
    assert_eq!(option_reply(&mut stream, wire::LIST).unwrap(), (2, b"\0\0\0\x01v".to_vec()));
    assert_eq!(option_reply(&mut stream, wire::LIST).unwrap().0, wire::ACK);
    stream.write_all(&option(wire::ABORT, &[])).unwrap();
    assert_eq!(option_reply(&mut stream, wire::ABORT).unwrap().0, wire::ACK);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the end after an abort");

    // NBD_OPT_EXPORT_NAME has no way to refuse but to hang up; it answers with size and flags alone.
    let mut old = option(wire::EXPORT_NAME, b"v");
    old.extend_from_slice(&request(Kind::Disconnect as u16, 0, 0, 0, 0));
    let answer = ends_after(&exported.tcp, &old);
    assert_eq!((answer.len(), &answer[..8]), (10, &SIZE.to_be_bytes()[..]));
    assert!(ends_after(&exported.tcp, &option(wire::EXPORT_NAME, b"no such volume")).is_empty());
    exported.detach();
}
