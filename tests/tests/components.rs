//! D13: every process is of a recorded program, whatever lies on disk; and a program of ABI N works with a segment of N−1.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use everdisk_proto::{
    identity::{self, Component},
    version::ABI,
};
use everdisk_tests::{
    bytes::pattern,
    host::{Host, Identity},
    load::Load,
    processes,
    programs::{self, VERSION, VERSION_ABI_NEXT, abi_after, abi_next, core_next, need_root, script},
    run::sh,
    status::Status,
    volume::Volume,
};
use serde_json::{Value, json};

/// A host that runs copies of the programs, which a test may replace.
fn host_with_copies() -> Host {
    need_root();
    let mut host = Host::idle(Identity::default());
    host.take_programs();
    host.start_daemon();
    host
}

/// Puts another program in the place of an installed one, as a package does.
fn install(host: &Host, name: &str, program: &Path) {
    let place = host.root().join("bin").join(name);
    let new = place.with_extension("new");
    fs::copy(program, &new).unwrap();
    fs::rename(new, place).unwrap();
}

/// Puts programs that end at once in the place of those that the control module starts.
fn break_installed(host: &Host) {
    let broken = script(&host.root().join("broken"), "exit 1");
    for name in ["everdisk-interface", "everdisk-core"] {
        install(host, name, &broken);
    }
}

fn record(host: &Host) -> PathBuf {
    host.root().join("state/volumes/v/state.json")
}

/// Changes the record of the volume while no control module runs.
fn rewrite(host: &mut Host, change: impl FnOnce(&mut Value)) {
    host.kill_daemon();
    let mut state: Value = serde_json::from_str(&fs::read_to_string(record(host)).unwrap()).unwrap();
    change(&mut state);
    fs::write(record(host), state.to_string()).unwrap();
    host.start_daemon();
}

/// Records another interface program than the one that runs, as its upgrade will: the next one that is started is of it.
fn record_interface(host: &mut Host, program: &Path) {
    let staged = host.root().join("state/volumes/v/interfaces/77/everdisk-interface");
    fs::create_dir_all(staged.parent().unwrap()).unwrap();
    fs::copy(program, &staged).unwrap();
    let (_, identity) = version_of(&staged);
    let digest = sha256(&staged);
    rewrite(host, |state| {
        state["interface"] = json!({ "program": staged, "identity": identity, "digest": digest });
    });
}

/// The version line of a program, and what it says.
fn version_of(program: &Path) -> (String, identity::Identity) {
    let line = sh(program.to_str().unwrap(), &["--version"]);
    let identity = identity::Identity::parse(&line).unwrap();
    (line, identity)
}

fn sha256(program: &Path) -> String {
    sh("sha256sum", &[program]).split(' ').next().unwrap().to_owned()
}

fn build(status: &Status, of: &str) -> String {
    status.0[of]["build"].as_str().expect("a recorded build").to_owned()
}

/// Kills the interface and waits until another one has taken its place.
fn kill_interface(volume: &Volume<'_>) -> Status {
    let before = volume.settled();
    processes::kill(before.interface().unwrap());
    volume.wait("a new interface", |s| s.serves() && s.interface().is_some() && s.interface() != before.interface())
}

/// The interface handles the deaths of cores.
fn cores_may_die(volume: &Volume<'_>, load: &Load) {
    for _ in 0..3 {
        volume.settled();
        volume.kill_core();
        load.goes_on(50);
    }
}

fn range(min: u32, max: u32) -> Value {
    json!({ "min": min, "max": max })
}

/// D13: every program says what it is in the same form.
#[test]
fn d13_every_program_says_which_formats_it_knows() {
    for name in ["everdisk-core", "everdisk-interface", "everdiskd", "everdisk"] {
        let (line, known) = version_of(&programs::program(name));
        assert_eq!(line.trim_end(), format!("{name} {}", known.details()));
        assert!(known.abi.contains(ABI) && known.version == VERSION, "{line}");
    }
}

/// D13: the programs on disk are replaced, by ones that do not run at all: an interface that dies comes back as the recorded build, and
/// so does a standby, also after the control module was started anew; deaths of cores are handled all the while.
#[test]
fn d13_what_is_started_anew_is_of_the_recorded_build_whatever_lies_on_disk() {
    let mut host = host_with_copies();
    let installed = |name: &str| sha256(&host.root().join("bin").join(name));
    let [core, interface, daemon] = ["everdisk-core", "everdisk-interface", "everdiskd"].map(installed);
    let same = |status: &Status| {
        for of in ["core", "standby"] {
            assert_eq!(build(status, of), core, "{status:?}");
        }
        assert_eq!((build(status, "interface"), build(status, "daemon")), (interface.clone(), daemon.clone()));
        assert_eq!(status.0["segment_abi"], ABI);
        assert_eq!(status.0["daemon"]["version"], VERSION);
    };
    host.volume("v", "64M");
    let load = Load::start(&Volume::new(&host, "v"), 2);
    same(&Volume::new(&host, "v").settled());
    break_installed(&host);
    for _ in 0..2 {
        let volume = Volume::new(&host, "v");
        kill_interface(&volume);
        same(&volume.settled());
        cores_may_die(&volume, &load);
        same(&volume.settled());
        host.kill_daemon();
        host.start_daemon();
        same(&Volume::new(&host, "v").settled());
    }
    load.stop();
    let volume = Volume::new(&host, "v");
    volume.detach();
    for name in ["everdisk-interface", "everdisk-core"] {
        install(&host, name, &programs::program(name));
    }
}

/// D13: an attach that fails keeps nothing of the programs it began with, so the next one takes what is installed by then.
#[test]
fn d13_a_failed_first_attach_does_not_tie_the_volume_to_its_core() {
    let host = host_with_copies();
    let volume = host.create("v", "64M", 2);
    let core = programs::program("everdisk-core");
    let text =
        format!("case \"$*\" in *--interface*) echo broken >&2; exit 1;; esac; exec '{}' \"$@\"", core.display());
    install(&host, "everdisk-core", &script(&host.root().join("broken"), &text));
    volume.try_attach(&[]).refused(1, &["the core ended: broken"]);
    for copies in ["cores", "interfaces"] {
        let copies = host.root().join("state/volumes/v").join(copies);
        assert_eq!(fs::read_dir(&copies).unwrap().count(), 0, "{}", copies.display());
    }
    install(&host, "everdisk-core", &core);
    volume.attach(&[]);
    assert_eq!(build(&volume.settled(), "core"), sha256(&core));
}

/// D13: a control module of record version 1 has started the interface and left no program of it: the one that runs is kept, although
/// another lies in its place by now. It is tried until it succeeds.
#[test]
fn d13_the_program_of_an_interface_that_runs_is_kept_where_the_record_does_not_tell_of_it() {
    let mut host = host_with_copies();
    host.volume("v", "64M");
    let load = Load::start(&Volume::new(&host, "v"), 2);
    let before = Volume::new(&host, "v").settled();
    break_installed(&host);
    let copies = host.root().join("state/volumes/v/interfaces");
    rewrite(&mut host, |state| {
        let state = state.as_object_mut().unwrap();
        state.insert("record_version".to_owned(), json!(1));
        state.remove("interface");
        state["current"]["identity"].as_object_mut().unwrap().remove("component");
        // For a while no copy can be made.
        fs::remove_dir_all(&copies).unwrap();
        fs::write(&copies, "").unwrap();
    });
    let volume = Volume::new(&host, "v");
    let is_recorded = |status: &Status| status.0["interface"]["build"] == before.0["interface"]["build"];
    volume.settled();
    assert!(!host.logged(&["cannot be recorded, which is tried again"]).is_empty());
    fs::remove_file(&copies).unwrap();
    volume.wait("the program on record", is_recorded);
    let after = kill_interface(&volume);
    assert_eq!(build(&after, "interface"), build(&before, "interface"));
    cores_may_die(&volume, &load);
    load.stop();
    let state: Value = serde_json::from_str(&fs::read_to_string(record(&host)).unwrap()).unwrap();
    assert_eq!(state["record_version"], 2);
}

/// D13: a core of N serves a segment of N−1, also what is buffered in it, and the way back is open.
#[test]
fn d13_a_core_of_n_serves_a_segment_of_n_minus_1() {
    let host = Host::new();
    let volume = host.create_with("v", "64M", 2, &["--buffer", "16M"]);
    volume.attach(&[]);
    let data = pattern(5, 1 << 20);
    volume.open().write_all_at(&data, 40_012_345).unwrap();
    let load = Load::start(&volume, 2);
    volume.settled();
    volume.upgrade_by("carry", &abi_next(Component::Core));
    let status = volume.settled();
    assert_eq!((status.version(), status.standby_version()), (VERSION_ABI_NEXT, VERSION_ABI_NEXT));
    assert_eq!((&status.0["core"]["abi"], &status.0["segment_abi"]), (&range(ABI, ABI + 1), &json!(ABI)));
    cores_may_die(&volume, &load);
    kill_interface(&volume);
    cores_may_die(&volume, &load);
    let mut found = vec![0; data.len()];
    volume.open().read_exact_at(&mut found, 40_012_345).unwrap();
    assert!(found == data);
    volume.settled();
    volume.upgrade(&core_next());
    load.stop();
}

/// D13: an interface of N restores a segment of N−1, and goes on as the one before did.
#[test]
fn d13_an_interface_of_n_restores_a_segment_of_n_minus_1() {
    let mut host = Host::new();
    host.volume("v", "64M");
    let load = Load::start(&Volume::new(&host, "v"), 2);
    Volume::new(&host, "v").settled();
    record_interface(&mut host, &abi_next(Component::Interface));
    let volume = Volume::new(&host, "v");
    let after = kill_interface(&volume);
    assert_eq!(after.0["interface"]["version"], VERSION_ABI_NEXT, "{after:?}");
    assert_eq!((&after.0["interface"]["abi"], &after.0["segment_abi"]), (&range(ABI, ABI + 1), &json!(ABI)));
    cores_may_die(&volume, &load);
    // Both kinds of core serve that segment, and the interface may die again.
    volume.upgrade(&core_next());
    volume.upgrade(&abi_next(Component::Core));
    assert_eq!(kill_interface(&volume).0["segment_abi"], ABI);
    cores_may_die(&volume, &load);
    load.stop();
    // A new attachment begins with what is installed.
    volume.detach();
    volume.attach(&[]);
    assert_eq!(volume.settled().0["interface"]["version"], VERSION);
}

/// D13: it is the ABI of the segment that a core has to serve, not that of the control module: on a segment of N+1 a core of N is
/// refused, and one of N+1 is not.
#[test]
fn d13_a_new_core_is_held_against_the_abi_of_the_segment() {
    let host = host_with_copies();
    install(&host, "everdisk-interface", &abi_next(Component::Interface));
    install(&host, "everdisk-core", &abi_next(Component::Core));
    let volume = host.volume("v", "64M");
    let status = volume.settled();
    assert_eq!((&status.0["segment_abi"], status.version()), (&json!(ABI + 1), VERSION_ABI_NEXT));
    let old = programs::core();
    let words = [&*format!("serves segments of ABI {ABI}..{ABI}"), &*format!("has ABI {}", ABI + 1), "attach it again"];
    volume.upgrade_fails(&old, &[], "aborted", &words);
    volume.try_upgrade(&old, &["--plan"]).refused(1, &words);
    volume.upgrade(&abi_after(host.root(), Component::Core));
    kill_interface(&volume);
    assert_eq!(volume.settled().0["segment_abi"], ABI + 1);
}

/// D13: N−2 is refused in words that say what to do: a core before anything is done, an interface while I/O goes on, until one that
/// fits is installed or the volume is detached by force.
#[test]
fn d13_a_segment_of_n_minus_2_is_refused_in_words() {
    let mut host = host_with_copies();
    host.volume("v", "64M");
    let volume = Volume::new(&host, "v");
    volume.settled();
    let words =
        [&*format!("serves segments of ABI {}..{}", ABI + 1, ABI + 2), &*format!("has ABI {ABI}"), "in between"];
    volume.upgrade_fails(&abi_after(host.root(), Component::Core), &[], "aborted", &words);
    // One that an interface of N+2 can speak to, and whose segment it cannot adopt.
    volume.upgrade(&abi_next(Component::Core));
    let load = Load::start(&volume, 2);
    let good = volume.settled();
    let after = abi_after(host.root(), Component::Interface);
    break_installed(&host);
    record_interface(&mut host, &after);
    let volume = Volume::new(&host, "v");
    processes::kill(good.interface().unwrap());
    let words =
        [&*format!("segment is of ABI {ABI}, buffer"), "cannot adopt it", "Install an everdisk-interface that can"];
    volume.wait("the refusal", |status| status.has_problem(&words));
    load.goes_on(100);
    // It is tried with pauses of up to 5 s. Then it is the one on record, and the installed one is needed no more.
    install(&host, "everdisk-interface", &programs::program("everdisk-interface"));
    let fits = |status: &Status| {
        status.serves()
            && status.interface().is_some()
            && status.0["interface"]["build"] == good.0["interface"]["build"]
    };
    volume.wait("the interface that fits, on record", fits);
    cores_may_die(&volume, &load);
    break_installed(&host);
    assert_eq!(build(&kill_interface(&volume), "interface"), build(&good, "interface"));
    cores_may_die(&volume, &load);
    load.stop();
    // The other way that the refusal names.
    install(&host, "everdisk-interface", &programs::program("everdisk-interface"));
    record_interface(&mut host, &after);
    let volume = Volume::new(&host, "v");
    fs::remove_file(host.root().join("bin/everdisk-interface")).unwrap();
    processes::kill(volume.settled().interface().unwrap());
    volume.wait("the refusal", |status| status.has_problem(&words));
    host.everdisk(&["detach", "v", "--force", "--yes"]).ok();
    install(&host, "everdisk-interface", &programs::program("everdisk-interface"));
    volume.attach(&[]);
    assert_eq!(build(&volume.settled(), "interface"), build(&good, "interface"));
}
