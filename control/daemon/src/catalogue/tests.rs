use std::os::unix::fs::PermissionsExt;

use super::*;

/// A catalogue whose core program logs what it is told, and comes to this `end` when told to `fails`.
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
    let shape = Shape { size: 1 << 30, stripe: 1 << 20, buffer: 4 << 20 };
    catalogue.create("v".parse().unwrap(), shape, vec![node], &Progress::silent())
}

#[test]
fn a_volume_is_made_with_its_write_buffer_and_an_impossible_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let catalogue = catalogue(dir.path(), "", "").unwrap();
    let make = |name: &str, buffer| {
        let shape = Shape { size: 1 << 30, stripe: 1 << 20, buffer };
        let node = NodeUrl::Dir(format!("/srv/{name}").into());
        catalogue.create(name.parse().unwrap(), shape, vec![node], &Progress::silent())
    };
    assert_eq!(make("a", 4 << 20).unwrap().spec().buffer, 4 << 20);
    assert_eq!(make("b", 0).unwrap().spec().buffer, 0);
    assert!(make("c", 4096).unwrap_err().to_string().contains("is no write buffer: give 0 for none"));
    for volume in catalogue.all() {
        volume.deleted.store(true, Ordering::Relaxed);
        volume.kick();
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
    let grown = before.resize(&name, 2 << 30, &Progress::silent()).unwrap().spec();
    assert_eq!((grown.spec_version, grown.buffer, grown.size), (1, 0, 2 << 30));
    assert_eq!(catalogue(dir.path(), "", "").unwrap().get(&name).unwrap().spec(), grown);
    assert_eq!(log(dir.path()), ["--resize"]);
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
    // What cannot be undone stays, is said, and holds nobody else up.
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
    for (end, expected) in [("exit 1", &["--create"][..]), ("kill -9 $$", &["--create", "--destroy"])] {
        let failing = catalogue(root, "--create", end).unwrap();
        assert!(create(&failing).is_err());
        assert_eq!(log(root), expected);
        assert!(lock(&failing.drafts).is_empty());
        assert_eq!(fs::read_dir(root.join("state/volumes")).unwrap().count(), 0);
    }
    let good = catalogue(root, "", "").unwrap();
    let volume = create(&good).unwrap();
    volume.deleted.store(true, Ordering::Relaxed);
    volume.kick();
    assert_eq!(log(root), ["--create"]);
    assert_eq!(fs::read_dir(root.join("state/volumes")).unwrap().count(), 1);
}
