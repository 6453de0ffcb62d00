use std::os::unix::fs::PermissionsExt;

use super::*;

/// A catalogue whose core program logs its orders, and comes to this `end` when its order is `fails`.
fn catalogue(root: &Path, fails: &str, end: &str) -> Result<Catalogue> {
    let core = root.join("everdisk-core");
    let script =
        format!("#!/bin/sh\necho \"$3\" >> {}/log\n[ \"$3\" != \"{fails}\" ] || {{ {end}\n:; }}\n", root.display());
    fs::write(&core, script).unwrap();
    fs::set_permissions(&core, fs::Permissions::from_mode(0o755)).unwrap();
    let directories = Directories { run: root.join("run"), state: root.join("state") };
    Catalogue::load(directories, Programs::in_directory(root))
}

fn create(catalogue: &Catalogue) -> Result<Arc<Volume>> {
    let node = NodeUrl::Dir("/srv/node".into());
    let shape =
        Shape { size: 1 << 30, stripe: 1 << 20, buffer: 4 << 20, bypass: Bypass::Auto, timeouts: Timeouts::default() };
    catalogue
        .create(&"v".parse().unwrap(), shape, vec![node], May::default(), &Progress::silent())
        .map(|(volume, _)| volume)
}

#[test]
fn a_volume_is_made_with_its_write_buffer_and_an_impossible_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let catalogue = catalogue(dir.path(), "", "").unwrap();
    let make = |name: &str, buffer| {
        let shape =
            Shape { size: 1 << 30, stripe: 1 << 20, buffer, bypass: Bypass::Auto, timeouts: Timeouts::default() };
        let node = NodeUrl::Dir(format!("/srv/{name}").into());
        catalogue
            .create(&name.parse().unwrap(), shape, vec![node], May::default(), &Progress::silent())
            .map(|(volume, _)| volume)
    };
    assert_eq!(make("a", 4 << 20).unwrap().spec().buffer, 4 << 20);
    assert_eq!(make("b", 0).unwrap().spec().buffer, 0);
    assert!(make("c", 4096).unwrap_err().to_string().contains("is no write buffer: give 0 for none"));
    for volume in catalogue.all() {
        volume.operations.set_deleted();
        volume.supervision.kick();
    }
}

/// The build before knew no write buffers; its volumes stay what they are, and the core they came with can read them.
#[test]
fn a_volume_of_version_1_grows_and_stays_one() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state/volumes/v");
    durable::make_dir(&state).unwrap();
    fs::write(state.join("volume.json"), include_str!("../../../../proto/golden/volume-v1.json")).unwrap();
    let before = catalogue(dir.path(), "", "").unwrap();
    let name: VolumeName = "v".parse().unwrap();
    let grown = before.resize(&name, 2 << 30, &Progress::silent()).unwrap().0.spec();
    assert_eq!((grown.spec_version, grown.buffer, grown.size), (1, 0, 2 << 30));
    assert_eq!(catalogue(dir.path(), "", "").unwrap().get(&name).unwrap().spec(), grown);
    assert_eq!(log(dir.path()), ["--check", "--resize"]);
}

fn log(root: &Path) -> Vec<String> {
    let text = fs::read_to_string(root.join("log")).unwrap_or_default();
    let _ = fs::remove_file(root.join("log"));
    text.lines().map(str::to_owned).collect()
}

#[test]
fn an_interrupted_creation_is_undone_before_its_description_goes() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let draft = root.join("state/volumes/.new-v");
    for with_description in [true, false] {
        durable::make_dir(&draft).unwrap();
        if with_description {
            fs::write(draft.join("volume.json"), "").unwrap();
        }
        catalogue(root, "", "").unwrap();
        assert!(!draft.exists());
        assert_eq!(log(root), if with_description { vec!["--destroy"] } else { Vec::new() });
    }
    // What cannot be undone stays, is reported, and delays no other volume.
    durable::make_dir(&draft).unwrap();
    fs::write(draft.join("volume.json"), "").unwrap();
    let catalogue = catalogue(root, "--destroy", "exit 1").unwrap();
    assert!(draft.join("volume.json").exists());
    assert!(create(&catalogue).unwrap_err().to_string().contains("cannot be undone"));
    assert!(draft.join("volume.json").exists());
}

#[test]
fn a_creation_that_fails_is_undone_and_one_that_does_not_leaves_nothing_beside_the_volume() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    // The last one is made, and cannot be entered.
    let undone = &["--create", "--destroy"][..];
    for (end, expected) in [("exit 1", &undone[..1]), ("kill -9 $$", undone), ("echo > \"$2\"", undone)] {
        let failing = catalogue(root, "--create", end).unwrap();
        assert!(create(&failing).is_err());
        assert_eq!(log(root), expected);
        assert!(failing.drafts.lock().is_empty());
        assert_eq!(fs::read_dir(root.join("state/volumes")).unwrap().count(), 0);
    }
    let good = catalogue(root, "", "").unwrap();
    let volume = create(&good).unwrap();
    volume.operations.set_deleted();
    volume.supervision.kick();
    assert_eq!(log(root), ["--create"]);
    assert_eq!(fs::read_dir(root.join("state/volumes")).unwrap().count(), 1);
}

#[test]
fn g_an_export_that_a_volume_uses_or_that_is_named_twice_is_refused_before_anything_is_formatted() {
    let dir = tempfile::tempdir().unwrap();
    let catalogue = catalogue(dir.path(), "", "").unwrap();
    let make = |name: &str, urls: &[&str]| {
        let shape =
            Shape { size: 1 << 30, stripe: 1 << 20, buffer: 0, bypass: Bypass::Auto, timeouts: Timeouts::default() };
        let nodes = urls.iter().map(|url| url.parse().unwrap()).collect();
        catalogue.create(&name.parse().unwrap(), shape, nodes, May::default(), &Progress::silent())
    };
    let made = make("a", &["nbd://host/x", "nbd://host/y"]).unwrap().0;
    assert_eq!(log(dir.path()), ["--create"]);
    let taken = make("b", &["nbd://host/z", "nbd://host:10809/y"]).unwrap_err().to_string();
    assert!(taken.contains("nbd://host/y") && taken.contains("volume a already"), "{taken}");
    let twice = make("b", &["nbd://host/z", "nbd://host:10809/z"]).unwrap_err().to_string();
    assert!(twice.contains("nbd://host/z is named twice"), "{twice}");
    assert_eq!(log(dir.path()), [""; 0]);
    made.operations.set_deleted();
    made.supervision.kick();
}

fn damaged(catalogue: &Catalogue) -> String {
    let damaged = catalogue.damaged();
    assert_eq!(damaged.len(), 1, "{damaged:?}");
    let line = crate::status::damaged_line(&damaged[0].0, damaged[0].1.clone());
    assert_eq!((line.name.as_str(), line.state), ("v", everdisk_api::status::State::Failed));
    damaged[0].1.clone()
}

/// Each kind of damage is shown, says the way out, and the way leads out.
#[test]
fn a_damaged_volume_is_shown_and_has_a_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let name: VolumeName = "v".parse().unwrap();
    let state = dir.path().join("state/volumes/v");
    let sound = include_str!("../../../../proto/golden/volume-v2.json");
    for description in [None, Some("{"), Some("{}")] {
        durable::make_dir(&state).unwrap();
        let file = state.join("volume.json");
        let _ = fs::remove_file(&file);
        description.iter().for_each(|text| fs::write(&file, text).unwrap());
        let catalogue = catalogue(dir.path(), "", "").unwrap();
        let why = damaged(&catalogue);
        assert!(why.contains("volume.json") && why.contains("`everdisk volume forget v`"), "{why}");
        assert!(catalogue.get(&name).unwrap_err().to_string().contains(&why));
        assert!(create(&catalogue).unwrap_err().to_string().contains(&why));
        assert!(catalogue.begin_record_anew(&name, true).unwrap().is_none(), "what a volume is nobody else knows");
        let files = catalogue.forget(&name).unwrap();
        assert_eq!(files.join("volume.json").exists(), description.is_some());
        assert!(catalogue.damaged().is_empty() && !state.exists());
        assert!(matches!(catalogue.forget(&name), Err(Error::NotFound(_))));
    }
    durable::make_dir(&state).unwrap();
    fs::write(state.join("volume.json"), sound).unwrap();
    fs::write(state.join("state.json"), "[").unwrap();
    let again = catalogue(dir.path(), "", "").unwrap();
    let why = damaged(&again);
    assert!(why.contains("state.json is damaged") && why.contains("`everdisk detach v --force`"), "{why}");
    let volume = again.begin_record_anew(&name, false).unwrap().unwrap();
    assert!(again.damaged().is_empty() && again.get(&name).is_ok());
    assert!(state.join("state.json.damaged").exists());
    assert!(again.begin_record_anew(&name, false).unwrap().is_none(), "it is sound");
    let files = again.forget(&name).unwrap();
    assert_eq!(fs::read_to_string(files.join("volume.json")).unwrap(), sound);
    assert!(volume.operations.is_deleted() && again.all().is_empty());
    assert!(log(dir.path()).is_empty(), "no storage node was touched");
}

/// An attempt that has moved the damaged record, and could then not read the volume's files, is repeated and ends well.
#[test]
fn a_record_can_be_begun_anew_after_an_attempt_that_went_half_way() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state/volumes/v");
    durable::make_dir(&state).unwrap();
    fs::write(state.join("volume.json"), include_str!("../../../../proto/golden/volume-v2.json")).unwrap();
    fs::write(state.join("state.json"), "[").unwrap();
    let catalogue = catalogue(dir.path(), "", "").unwrap();
    fs::rename(state.join("state.json"), state.join("state.json.damaged")).unwrap();
    let volume = catalogue.begin_record_anew(&"v".parse().unwrap(), false).unwrap().unwrap();
    volume.operations.set_deleted();
    volume.supervision.kick();
    assert!(catalogue.damaged().is_empty());
}

#[test]
fn errors_name_the_volumes_that_storage_nodes_belong_to() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state/volumes/v");
    durable::make_dir(&state).unwrap();
    fs::write(state.join("volume.json"), include_str!("../../../../proto/golden/volume-v2.json")).unwrap();
    let uuid = Uuid::from_u128(9);
    let end = format!("echo '/srv/node: it is a storage node of volume {uuid} already' >&2; exit 1");
    let catalogue = catalogue(dir.path(), "--create", &end).unwrap();
    let shape =
        Shape { size: 1 << 30, stripe: 1 << 20, buffer: 4 << 20, bypass: Bypass::Auto, timeouts: Timeouts::default() };
    let node = NodeUrl::Dir("/srv/node".into());
    let refused =
        catalogue.create(&"w".parse().unwrap(), shape, vec![node], May::default(), &Progress::silent()).unwrap_err();
    assert_eq!(refused.to_string(), format!("/srv/node: it is a storage node of volume v ({uuid}) already"));
    let taken = create(&catalogue).unwrap_err().to_string();
    assert!(taken.contains("a volume v already") && !taken.contains("delete"), "{taken}");
}
