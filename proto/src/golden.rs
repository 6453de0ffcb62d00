//! The golden files: the bytes of every published version of each stored or sent format. One test walks the folder, so
//! that no file in it is left untested.

use std::{collections::BTreeSet, path::Path};

use crate::{buffer, connection, frame, journal, superblock, volume};

/// Decodes the bytes of a file, compares the content, and encodes it again.
type Check = fn(&str);

const FILES: &[(&str, Check)] = &[
    ("connection-v1.hex", connection::tests::golden_record_of_version_1),
    ("connection-v2.hex", connection::tests::golden_record_of_version_2),
    ("frames-v1.jsonl", frame::tests::golden_frames_of_abi_1),
    ("frames-v2.jsonl", frame::tests::golden_frames_of_abi_2),
    ("frames-v3-owners.jsonl", frame::tests::golden_frames_about_owners),
    ("frames-v3.jsonl", frame::tests::golden_frames_of_abi_3),
    ("frames-v4-nodes.jsonl", frame::tests::golden_frames_about_nodes),
    ("frames-v4.jsonl", frame::tests::golden_frames_of_abi_4),
    ("journal-v1.jsonl", journal::tests::golden_journal_of_version_1_is_read),
    ("journal-v2.jsonl", journal::tests::golden_journal_of_version_2_reads_and_writes_the_same_bytes),
    ("slot-v1.hex", buffer::tests::golden_slot_of_version_1),
    ("slot-v2.hex", buffer::tests::golden_slot_of_version_2),
    ("superblock-v1.hex", superblock::tests::golden_superblock_of_format_1),
    ("volume-v1.json", volume::tests::golden_json_of_version_1_still_reads_as_a_volume_without_a_buffer),
    ("volume-v2.json", volume::tests::golden_json_of_version_2_reads_and_writes_the_same_bytes),
];

#[test]
#[expect(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a test of the files in a folder")]
fn every_golden_file_reads_and_writes_the_same_bytes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let Some((_, check)) = FILES.iter().find(|(known, _)| *known == name) else {
            panic!("proto/golden/{name}: nothing reads it; write a check of its bytes and name it in {}", file!());
        };
        println!("proto/golden/{name}:");
        check(&std::fs::read_to_string(path).unwrap());
        found.insert(name);
    }
    let listed: BTreeSet<String> = FILES.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(found, listed, "a golden file is gone: its version is still out there");
}
