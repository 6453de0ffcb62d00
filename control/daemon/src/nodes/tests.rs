use std::{
    fs,
    os::unix::fs::PermissionsExt,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use everdisk_api::directories::Directories;

use super::*;
use crate::{durable, paths::VolumePaths, programs::Programs};

/// A volume whose core program logs its task, and does what the file of that name says.
fn volume(root: &Path) -> Arc<Volume> {
    let core = root.join("everdisk-core");
    let script = format!(
        "#!/bin/sh\nshift 2\necho \"$*\" >> {0}/log\n[ ! -e \"{0}/at $*\" ] || . \"{0}/at $*\"\n",
        root.display()
    );
    fs::write(&core, script).unwrap();
    fs::set_permissions(&core, fs::Permissions::from_mode(0o755)).unwrap();
    let directories = Directories { run: root.join("run"), state: root.join("state") };
    let name: everdisk_proto::ids::VolumeName = "v".parse().unwrap();
    let paths = VolumePaths::new(&directories, &name);
    durable::make_dir(&paths.state).unwrap();
    durable::write(&paths.spec(), include_bytes!("../../../../proto/golden/volume-v2.json")).unwrap();
    Arc::new(Volume::load(&directories, name, Programs::in_directory(root)).unwrap())
}

fn at(root: &Path, task: &str, script: &str) {
    fs::write(root.join(format!("at {task}")), script).unwrap();
}

fn log(root: &Path) -> Vec<String> {
    let text = fs::read_to_string(root.join("log")).unwrap_or_default();
    let _ = fs::remove_file(root.join("log"));
    text.lines().map(str::to_owned).collect()
}

const OLD: u64 = 1 << 30;
const NEW: u64 = 2 << 30;

fn check() -> String {
    format!("--check resize --bytes {NEW}")
}

#[test]
fn a_resize_counts_once_the_description_says_it() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    at(dir.path(), &format!("--resize {NEW}"), "echo short 1 5 1073741824");
    let warnings = resize(&volume, NEW, &Progress::silent()).unwrap();
    let words = "the file system of dir:/srv/2 has 5 free, and the volume's part there may come to need 1G: when it is full, writes fail";
    assert_eq!(warnings, [words]);
    assert_eq!((volume.spec().size, volume.record().nodes.resizing), (NEW, None));
    assert_eq!(log(dir.path()), [check(), format!("--resize {NEW}")]);
    assert!(resize(&volume, OLD, &Progress::silent()).unwrap_err().to_string().contains("can only grow"));
    assert!(log(dir.path()).is_empty());
}

/// Whatever becomes of the core that grows the nodes: the volume has its old size, and nothing is left on record.
#[test]
fn a_resize_that_fails_or_is_killed_is_undone() {
    for end in ["echo 'no such length' >&2; exit 1", "kill -9 $$"] {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        at(dir.path(), &format!("--resize {NEW}"), end);
        assert!(resize(&volume, NEW, &Progress::silent()).is_err());
        assert_eq!(log(dir.path()), [check(), format!("--resize {NEW}"), format!("--resize {OLD}")]);
        assert_eq!((volume.spec().size, volume.record().nodes.resizing), (OLD, None));
    }
}

/// A resize that is refused before anything is done, such as when a node is being served, is not on record as interrupted.
#[test]
fn a_resize_that_is_refused_leaves_nothing_to_be_undone() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    at(dir.path(), &check(), "echo 'it is in use' >&2; exit 1");
    assert!(resize(&volume, NEW, &Progress::silent()).unwrap_err().to_string().contains("it is in use"));
    assert_eq!(log(dir.path()), [check()]);
    assert_eq!((volume.spec().size, volume.record().nodes.resizing), (OLD, None));
}

/// The control module died: before the description said the new size the resize is undone, afterwards it is done.
#[test]
fn a_resize_that_was_left_is_undone_unless_the_description_says_the_new_size() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    volume.update(|record| record.nodes.resizing = Some(NEW)).unwrap();
    at(dir.path(), &format!("--resize {OLD}"), "echo 'the node is not there' >&2; exit 1");
    let stuck = settle(&volume).unwrap_err().to_string();
    assert!(stuck.contains("the node is not there") && stuck.contains("`everdisk volume resize v 2G`"), "{stuck}");
    assert_eq!(volume.record().nodes.resizing, Some(NEW));
    fs::remove_file(dir.path().join(format!("at --resize {OLD}"))).unwrap();
    settle(&volume).unwrap();
    assert_eq!(volume.record().nodes.resizing, None);
    log(dir.path());
    volume.update(|record| record.nodes.resizing = Some(NEW)).unwrap();
    volume.set_spec(VolumeSpec { size: NEW, ..volume.spec() }).unwrap();
    settle(&volume).unwrap();
    assert_eq!((volume.spec().size, volume.record().nodes.resizing), (NEW, None));
    assert!(log(dir.path()).is_empty());
}

/// A process whose arguments can be read: execve closes descriptors, which ends the wait of `spawn`, before it sets the arguments.
fn started(command: &mut std::process::Command) -> std::process::Child {
    let child = crate::programs::spawn(command).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while fs::read(format!("/proc/{}/cmdline", child.id())).unwrap().is_empty() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    child
}

/// A process that an earlier control module started still works on the nodes: it ends before anything else is done with them.
#[test]
fn a_task_that_was_left_running_is_ended_first() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let tail = dir.path().join("everdisk-core-left");
    fs::copy(fs::canonicalize("/usr/bin/tail").unwrap(), &tail).unwrap();
    let mut command = std::process::Command::new(&tail);
    command.arg("-F").arg(volume.paths.spec()).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    // One that may serve the volume is left alone.
    let mut serving = started(&mut command);
    let refused = resize(&volume, NEW, &Progress::silent()).unwrap_err().to_string();
    let ended = serving.try_wait().unwrap();
    let _ = (serving.kill(), serving.wait());
    assert!(ended.is_none() && refused.contains("in use by process"), "{ended:?} {refused}");
    let mut left = started(command.args(["--", "--resize"]));
    resize(&volume, NEW, &Progress::silent()).unwrap();
    let ended = left.try_wait().unwrap();
    let _ = left.kill();
    assert!(ended.is_some(), "it was still at work");
}

#[test]
fn a_delete_touches_nothing_before_every_node_was_found() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    at(dir.path(), "--check delete", "echo '/srv/2: there is no such directory' >&2; exit 1");
    at(dir.path(), "--destroy", "echo gone 1");
    let refused = delete(&volume, false, &Progress::silent()).unwrap_err().to_string();
    assert!(refused.contains("volume v is not deleted") && refused.contains("/srv/2: there is no"), "{refused}");
    assert_eq!(log(dir.path()), ["--check delete"]);
    assert!(!volume.record().nodes.deleting);
    let left = delete(&volume, true, &Progress::silent()).unwrap();
    assert!(left.len() == 1 && left[0].contains("dir:/srv/2"), "{left:?}");
    assert_eq!(log(dir.path()), ["--destroy"]);
    // The forced delete did not need every node. The repeated one checks for every node again.
    assert!(!volume.record().nodes.deleting);
    assert!(delete(&volume, false, &Progress::silent()).is_err());
    assert_eq!(log(dir.path()), ["--check delete"]);
    fs::remove_file(dir.path().join("at --check delete")).unwrap();
    delete(&volume, false, &Progress::silent()).unwrap();
    assert_eq!(log(dir.path()), ["--check delete", "--destroy"]);
    // Repeated after a death: what was found then and is gone now was deleted.
    assert!(volume.record().nodes.deleting);
    assert!(delete(&volume, false, &Progress::silent()).unwrap().is_empty());
    assert_eq!(log(dir.path()), ["--destroy"]);
}

#[test]
fn only_directories_that_were_made_for_the_volume_go_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let [made, filled, own] = ["made", "filled", "own"].map(|name| dir.path().join(name));
    [&made, &filled, &own].into_iter().for_each(|path| fs::create_dir(path).unwrap());
    fs::write(filled.join("letter"), "keep me").unwrap();
    volume.update(|record| record.nodes.made = vec![made.clone(), filled.clone()]).unwrap();
    delete(&volume, false, &Progress::silent()).unwrap();
    assert_eq!((made.exists(), filled.exists(), own.exists()), (false, true, true));
}

#[test]
fn g_what_is_made_of_exports_is_no_directory_and_what_is_left_on_them_is_told_in_their_words() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let mut spec = volume.spec();
    spec.nodes[0].url = "nbd://host/x".parse().unwrap();
    let (core, file) = (volume.programs.core(), volume.paths.spec());
    for (may, task) in [
        (May::default(), "--create"),
        (May { create_dir: true, force: false }, "--create --create-dir"),
        (May { create_dir: false, force: true }, "--create --force"),
        (May { create_dir: true, force: true }, "--create --create-dir --force"),
    ] {
        at(dir.path(), task, "echo made 0; echo made 1");
        assert_eq!(create(&core, &file, &spec, may).unwrap().directories, [PathBuf::from("/srv/2")]);
        assert_eq!(log(dir.path()), [task]);
    }
    volume.set_spec(spec).unwrap();
    at(dir.path(), "--destroy", "echo gone 0; echo gone 1");
    let left = delete(&volume, true, &Progress::silent()).unwrap();
    assert!(left[0].starts_with("nbd://host/x had nothing") && left[0].contains("exports another disk"), "{left:?}");
    assert!(left[1].starts_with("dir:/srv/2 had nothing") && left[1].contains("not mounted"), "{left:?}");
}

#[test]
fn g_a_task_has_the_time_that_reading_an_export_takes() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = volume(dir.path()).spec();
    assert_eq!(within(&spec, 1 << 50), WITHIN);
    spec.nodes[1].url = "nbd://host/x".parse().unwrap();
    assert_eq!((within(&spec, 1 << 20), within(&spec, 500 << 30)), (WITHIN, WITHIN + Duration::from_secs(10_240)));
}

#[test]
fn what_a_core_says_of_its_nodes_is_read_and_nonsense_is_left_out() {
    let text = "made 0\nwarning: x\nshort 1 10 20\nshort 1 10\ngone 2\ngone\nmade x\n\n";
    assert_eq!(told(text), [Told::Made(0), Told::Short { place: 1, free: 10, needed: 20 }, Told::Gone(2)]);
}
