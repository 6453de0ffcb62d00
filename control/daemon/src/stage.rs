//! The programs that a volume keeps: each is copied into the state directory before it runs, so that what is started anew is of the
//! recorded program, whatever lies beside the control module by then (D13).

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use everdisk_proto::{
    frame::InterfaceStatus,
    identity::{Build, Component, Identity},
};
use tracing::warn;

use crate::{
    durable,
    error::{Doing, Error, Result},
    origin::Source,
    process::ProcessId,
    programs,
    record::VolumeRecord,
    volume::Volume,
};

/// A version line comes within this time.
const VERSION_WITHIN: Duration = Duration::from_secs(5);
/// A program is copied within this time.
const COPIED_WITHIN: Duration = Duration::from_secs(30);
/// So often the interface program on record has to fail to restore the volume before another one is tried.
const RECORDED_FIRST: u32 = 3;

/// Copies the program of a component into a directory of its own, and asks what it is.
///
/// # Errors
/// It cannot be copied, or is no program of that component. Nothing is left of it then.
fn stage(volume: &Volume, component: Component, source: &Path) -> Result<Build> {
    let program = next_program(volume, component)?;
    let copied =
        Source::open(source, component).and_then(|mut source| programs::copy(&mut source, &program, COPIED_WITHIN));
    let checked = copied.and_then(|digest| {
        let identity = programs::identify(component, &program, source, VERSION_WITHIN)?;
        Ok(Build { program: program.clone(), identity, digest: Some(digest) })
    });
    // Only this one: another that is not on record may be that of an upgrade which is left to be taken up.
    checked.inspect_err(|_| remove(volume, &program))
}

/// Removes the copy of a program.
fn remove(volume: &Volume, program: &Path) {
    let directory = program.parent().expect("every program is staged into a directory of its own");
    match fs::remove_dir_all(directory) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            warn!(volume = %volume.name, "cannot remove {}: {e}", directory.display());
        }
        // It is not there when it could not be made.
        Ok(()) | Err(_) => {}
    }
}

/// Where the next program of a component will lie: one above the highest number in use.
///
/// # Errors
/// The directory cannot be read.
pub fn next_program(volume: &Volume, component: Component) -> Result<PathBuf> {
    let directory = volume.paths.programs(component);
    durable::make_dir(&directory).doing(|| format!("make {}", directory.display()))?;
    let reading = || format!("read {}", directory.display());
    let mut highest = 0;
    for entry in fs::read_dir(&directory).doing(reading)? {
        // What has no number of ours for a name is not of ours.
        let number = entry.doing(reading)?.file_name().to_str().and_then(|name| name.parse::<u64>().ok());
        highest = highest.max(number.unwrap_or(0));
    }
    Ok(directory.join((highest + 1).to_string()).join(component.program()))
}

/// Removes every program that is not on record and of which no core runs.
pub fn prune(volume: &Volume) {
    for component in [Component::Core, Component::Interface] {
        prune_of(volume, component);
    }
}

fn prune_of(volume: &Volume, component: Component) {
    let record = volume.record();
    let kept = [record.current, record.previous, record.interface].into_iter().flatten().map(|build| build.program);
    let cores = record.attachment.into_iter().flat_map(|attachment| attachment.cores).map(|core| core.program);
    let kept: Vec<_> = kept.chain(cores).filter_map(|program| program.parent().map(Path::to_owned)).collect();
    let directory = volume.paths.programs(component);
    let copies = match fs::read_dir(&directory).and_then(Iterator::collect::<io::Result<Vec<_>>>) {
        Ok(entries) => entries,
        // None was made yet.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return,
        Err(e) => return warn!(volume = %volume.name, "cannot read {}: {e}", directory.display()),
    };
    for copy in copies.into_iter().map(|entry| entry.path()).filter(|path| !kept.contains(path)) {
        if let Err(e) = fs::remove_dir_all(&copy) {
            warn!(volume = %volume.name, "cannot remove {}: {e}", copy.display());
        }
    }
}

/// What an attach runs. Unless it is kept, the programs that were on record before it are on record again, and the copies that were made
/// for it go.
#[derive(Debug)]
pub struct Staged<'a> {
    volume: &'a Volume,
    interface: Option<Build>,
    core: Option<Build>,
    kept: bool,
}

impl<'a> Staged<'a> {
    /// Puts the programs of an attach on record: the interface beside the control module, and a core.
    ///
    /// # Errors
    /// One cannot be staged, or they do not fit each other.
    pub fn for_attach(volume: &'a Volume) -> Result<(Self, Build, Build)> {
        let VolumeRecord { interface, current, .. } = volume.record();
        let staged = Self { volume, interface, core: current, kept: false };
        let interface = interface_beside(volume)?;
        let core = core(volume, &interface.identity)?;
        Ok((staged, interface, core))
    }

    /// The attach has succeeded. The interface program of the attach before is not needed any more.
    pub fn keep(mut self) {
        self.kept = true;
        // Not the cores: one that is not on record may be that of an upgrade which is left to be taken up.
        prune_of(self.volume, Component::Interface);
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        let now = self.volume.record();
        // While there is an attachment, a process of it that does not end may run them.
        if self.kept || now.attachment.is_some() {
            return;
        }
        let taken_back = self.volume.update(|record| {
            (record.interface, record.current) = (self.interface.clone(), self.core.clone());
        });
        match taken_back {
            Ok(()) => {
                let made = [(now.interface, &self.interface), (now.current, &self.core)];
                for (build, before) in made {
                    if let Some(build) = build.filter(|build| before.as_ref() != Some(build)) {
                        remove(self.volume, &build.program);
                    }
                }
            }
            Err(e) => warn!(volume = %self.volume.name, "the programs of a failed attach stay on record: {e}"),
        }
    }
}

/// The interface program that an attach begins with: the one beside the control module. One that is on record already is not copied
/// again.
fn interface_beside(volume: &Volume) -> Result<Build> {
    let beside = volume.programs.interface();
    let mut source = Source::open(&beside, Component::Interface)?;
    let digest = programs::digest(&mut source).doing(|| format!("read {}", beside.display()))?;
    if let Some(build) = volume.record().interface
        && build.digest.as_ref() == Some(&digest)
        && build.program.is_file()
    {
        return Ok(build);
    }
    record_interface(volume, &beside)
}

/// Stages an interface program and puts it on record.
fn record_interface(volume: &Volume, source: &Path) -> Result<Build> {
    let build = stage(volume, Component::Interface, source)?;
    record(volume, &build, |record| &mut record.interface)?;
    Ok(build)
}

/// Puts a program that was just staged on record, or removes it.
fn record(volume: &Volume, build: &Build, place: fn(&mut VolumeRecord) -> &mut Option<Build>) -> Result<()> {
    volume.update(|record| *place(record) = Some(build.clone())).inspect_err(|_| remove(volume, &build.program))
}

/// The program that an interface is started from to take a dead one's place, after `failures` attempts in a row that did not restore the
/// volume. It is the one on record. The one beside the control module is started where none is on record, and in turn with the one on
/// record once that has failed [`RECORDED_FIRST`] times. [`adopt_interface`] puts it on record when it has restored.
pub fn restoring_interface(volume: &Volume, failures: u32) -> PathBuf {
    let is_the_others_turn = failures >= RECORDED_FIRST && (failures - RECORDED_FIRST).is_multiple_of(2);
    let recorded = volume.record().interface.filter(|_| !is_the_others_turn);
    recorded.map_or_else(|| volume.programs.interface(), |build| build.program)
}

/// The program that a process runs.
fn program_of(process: ProcessId) -> Result<Source> {
    let source = Source::open(&PathBuf::from(format!("/proc/{}/exe", process.pid)), Component::Interface)?;
    // Looked at after it was opened: another process that has this number now would have another start time.
    if process.alive() { Ok(source) } else { Err(Error::Failed(format!("process {} has ended", process.pid))) }
}

/// Whether the interface program on record is there, and the one that this process runs: the copy itself, or a program with the same digest.
///
/// # Errors
/// It cannot be read.
pub fn is_on_record(volume: &Volume, process: ProcessId) -> Result<bool> {
    let Some(build) = volume.record().interface else { return Ok(false) };
    let mut source = program_of(process)?;
    let running = source.id()?;
    // A copy that has gone is not what runs.
    if fs::metadata(&build.program).is_ok_and(|copy| (copy.dev(), copy.ino()) == running) {
        return Ok(true);
    }
    let digest = programs::digest(&mut source).doing(|| format!("read {}", source.name().display()))?;
    Ok(build.program.is_file() && build.digest == Some(digest))
}

/// Puts the program of an interface that serves on record: what this process runs, whatever lies on disk by now. No operation may have the
/// volume, because its end could remove the copy before it is on record.
///
/// # Errors
/// It cannot be copied or recorded.
pub fn adopt_interface(volume: &Volume, process: ProcessId) -> Result<Build> {
    let program = program_of(process)?;
    let bytes = program.bytes()?;
    // A copy that does not fit would fill the state directory, and records could not be written.
    durable::check_room(&volume.paths.state, bytes).doing(|| format!("copy {}", program.name().display()))?;
    let build = record_interface(volume, program.name())?;
    prune_of(volume, Component::Interface);
    Ok(build)
}

/// The core program that an attach begins with: the one on record, or the one beside the control module where that cannot serve the
/// segments that the interface makes.
fn core(volume: &Volume, interface: &Identity) -> Result<Build> {
    let abi = interface.abi.max;
    match volume.record().current {
        Some(build) if build.identity.abi.contains(abi) => return Ok(build),
        Some(old) => warn!(
            volume = %volume.name,
            "{} does not serve the segments of ABI {abi} that {interface} makes: the volume goes on with the core that came with it",
            old.identity
        ),
        None => {}
    }
    let build = stage(volume, Component::Core, &volume.programs.core())?;
    programs::serves(&build.identity, abi).inspect_err(|_| remove(volume, &build.program))?;
    record(volume, &build, |record| &mut record.current)?;
    Ok(build)
}

/// ABI of the segment of an attached volume: as its interface says, or, where that does not tell, the one that the program on record makes.
pub fn segment_abi_on_record(volume: &Volume, status: &InterfaceStatus) -> Option<u32> {
    status.segment_abi.or_else(|| volume.record().interface.map(|build| build.identity.abi.max))
}

/// As [`segment_abi_on_record`]. Where no program is on record yet, the one that the interface runs is asked.
///
/// # Errors
/// Unknown.
pub fn segment_abi(volume: &Volume, status: &InterfaceStatus) -> Result<u32> {
    if let Some(abi) = segment_abi_on_record(volume, status) {
        return Ok(abi);
    }
    let asked = volume.attached()?.interface.map(|process| {
        let source = program_of(process)?;
        programs::identify(Component::Interface, &source.in_proc(), source.name(), VERSION_WITHIN)
    });
    let unknown = |why: String| {
        Error::Failed(format!(
            "it is not known which ABI the segment of volume {0} has{why}: `everdisk detach {0}` and attach it again",
            volume.name
        ))
    };
    match asked {
        Some(Ok(identity)) => Ok(identity.abi.max),
        Some(Err(e)) => Err(unknown(format!(" ({e})"))),
        None => Err(unknown(String::new())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{fake, record::KnownCore, volume::tests::volume};

    fn program(path: &Path, line: &str) {
        fs::write(path, format!("#!/bin/sh\necho '{line}'\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    const INTERFACE_1: &str = "everdisk-interface 1.0 (abi 4..4, buffer 2..2)";
    const INTERFACE_2: &str = "everdisk-interface 2.0 (abi 5..5, buffer 2..2)";
    const CORE_1: &str = "everdisk-core 1.0 (abi 3..4, buffer 2..2)";
    const CORE_2: &str = "everdisk-core 2.0 (abi 4..5, buffer 2..2)";

    /// A volume whose installed programs lie in `dir`.
    fn world(dir: &Path, interface: &str, core: &str) -> Volume {
        let mut volume = std::sync::Arc::into_inner(volume(dir)).unwrap();
        volume.programs = programs::Programs::in_directory(dir);
        program(&volume.programs.interface(), interface);
        program(&volume.programs.core(), core);
        volume
    }

    /// Stages the programs of an attach that succeeds: the interface and the core.
    fn attached(volume: &Volume) -> (Build, Build) {
        let (staged, interface, core) = Staged::for_attach(volume).unwrap();
        staged.keep();
        (interface, core)
    }

    /// The copies of a component's programs, by number.
    fn copies(volume: &Volume, component: Component) -> Vec<String> {
        let entries = fs::read_dir(volume.paths.programs(component)).into_iter().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }

    /// D13: a program whose copy has gone is not on record any more, although what runs has its digest.
    #[test]
    fn d13_a_program_whose_copy_has_gone_is_not_on_record() {
        let dir = tempfile::tempdir().unwrap();
        let volume = world(dir.path(), INTERFACE_1, CORE_1);
        let process = ProcessId::of(std::process::id()).unwrap();
        let copy = dir.path().join("copy");
        fs::copy("/proc/self/exe", &copy).unwrap();
        let digest = programs::digest(&mut fs::File::open(&copy).unwrap()).unwrap();
        let identity = Identity::parse(INTERFACE_1).unwrap();
        let build = Build { program: copy.clone(), identity, digest: Some(digest) };
        volume.update(|record| record.interface = Some(build)).unwrap();
        assert!(is_on_record(&volume, process).unwrap());
        fs::remove_file(&copy).unwrap();
        assert!(!is_on_record(&volume, process).unwrap());
    }

    /// D13: the programs of an attach are the installed interface, copied once, and the core on record; what is on record is not changed by
    /// what is installed later.
    #[test]
    fn d13_the_programs_of_an_attach_are_staged_and_stay_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let volume = world(dir.path(), INTERFACE_1, CORE_1);
        let (first, core) = attached(&volume);
        assert_eq!((first.identity.to_string(), core.identity.to_string()), (INTERFACE_1.into(), CORE_1.into()));
        assert_eq!(attached(&volume), (first.clone(), core), "not copied again");
        program(&volume.programs.interface(), INTERFACE_2);
        program(&volume.programs.core(), CORE_2);
        assert_eq!(restoring_interface(&volume, 0), first.program, "what is started anew is of the record");
        let (second, newer) = attached(&volume);
        assert_eq!((second.identity.to_string(), newer.identity.to_string()), (INTERFACE_2.into(), CORE_2.into()));
        assert_eq!(restoring_interface(&volume, 0), second.program, "until the next attach");
        assert!(!first.program.exists() && second.program.exists());
        program(&volume.programs.interface(), CORE_2);
        assert!(Staged::for_attach(&volume).unwrap_err().to_string().contains("is not an everdisk-interface"));
        fs::remove_file(volume.programs.interface()).unwrap();
        fs::create_dir(volume.programs.interface()).unwrap();
        let no_file = Staged::for_attach(&volume).unwrap_err().to_string();
        assert!(no_file.contains("is not a program: it has to be the file of an everdisk-interface"), "{no_file}");
        assert_eq!(restoring_interface(&volume, 0), second.program);
        assert!(second.program.exists());
    }

    /// D13: an attach that fails leaves the record as it was, and no copy that it made; and it takes no other, for an upgrade that is left to
    /// be taken up may need it.
    #[test]
    fn d13_an_attach_that_fails_takes_its_programs_back_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let volume = world(dir.path(), INTERFACE_2, "no program of ours");
        durable::make_dir(&volume.paths.cores().join("9")).unwrap();
        let programs = || {
            let record = volume.record();
            let copies = [Component::Interface, Component::Core].map(|component| copies(&volume, component).join(","));
            ([record.interface, record.current].map(|build| build.map(|build| build.identity.to_string())), copies)
        };
        let nothing = ([None, None], [String::new(), "9".to_owned()]);
        assert!(Staged::for_attach(&volume).unwrap_err().to_string().contains("is not an everdisk-core"));
        assert_eq!(programs(), nothing, "the core is none");
        program(&volume.programs.core(), CORE_1);
        assert!(Staged::for_attach(&volume).unwrap_err().to_string().contains("has ABI 5"));
        assert_eq!(programs(), nothing, "the core does not serve the interface's segment");
        program(&volume.programs.core(), CORE_2);
        drop(Staged::for_attach(&volume).unwrap());
        assert_eq!(programs(), nothing, "what came after failed");
        // And where programs are on record.
        program(&volume.programs.interface(), INTERFACE_1);
        program(&volume.programs.core(), CORE_1);
        attached(&volume);
        let before = programs();
        program(&volume.programs.interface(), INTERFACE_2);
        program(&volume.programs.core(), CORE_2);
        drop(Staged::for_attach(&volume).unwrap());
        assert_eq!(programs(), before);
        // A process that did not end may run them.
        let (staged, ..) = Staged::for_attach(&volume).unwrap();
        let during = programs();
        let _interface = fake::Interface::start(&volume);
        drop(staged);
        assert_eq!(programs(), during);
        assert_ne!(during, before);
    }

    /// D13: no program goes that is on record or of which a core runs, whichever component is tidied; every other one does.
    #[test]
    fn d13_prune_keeps_what_is_on_record_or_runs() {
        let dir = tempfile::tempdir().unwrap();
        let volume = world(dir.path(), INTERFACE_1, CORE_1);
        attached(&volume);
        let build = stage(&volume, Component::Core, &volume.programs.core()).unwrap();
        volume.update(|record| record.previous = Some(build)).unwrap();
        let _interface = fake::Interface::start(&volume);
        let runs = stage(&volume, Component::Core, &volume.programs.core()).unwrap();
        let process = ProcessId::of(std::process::id()).unwrap();
        let core = KnownCore { process, program: runs.program, digest: None };
        volume.update_attachment(|attachment| attachment.cores.push(core)).unwrap();
        for component in [Component::Core, Component::Interface] {
            durable::make_dir(&volume.paths.programs(component).join("7")).unwrap();
        }
        prune_of(&volume, Component::Interface);
        assert_eq!(copies(&volume, Component::Core), ["1", "2", "3", "7"]);
        prune(&volume);
        assert_eq!(copies(&volume, Component::Core), ["1", "2", "3"]);
        assert_eq!(copies(&volume, Component::Interface), ["1"]);
    }

    /// D13: where the interface program on record does not restore the volume, the installed one is tried in turn with it.
    #[test]
    fn d13_the_interface_on_record_is_started_first_and_then_in_turn_with_the_installed_one() {
        let dir = tempfile::tempdir().unwrap();
        let volume = world(dir.path(), INTERFACE_1, CORE_1);
        let installed = volume.programs.interface();
        assert_eq!(restoring_interface(&volume, 0), installed, "none is on record");
        let (recorded, _) = attached(&volume);
        let turns: Vec<_> = (0..7).map(|failures| restoring_interface(&volume, failures) == recorded.program).collect();
        assert_eq!(turns, [true, true, true, false, true, false, true]);
        assert_eq!(restoring_interface(&volume, 3), installed);
    }

    /// D13: the ABI of the segment is the interface's word, else what the program on record makes.
    #[test]
    fn d13_the_abi_of_the_segment_is_known_or_it_is_said_that_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume(dir.path());
        let mut status = fake::Interface::start(&volume).status();
        status.segment_abi = Some(7);
        assert_eq!(segment_abi(&volume, &status).unwrap(), 7);
        status.segment_abi = None;
        // The program that runs is asked, and is none of ours.
        let mut sleeps = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        volume.update_attachment(|attachment| attachment.interface = ProcessId::of(sleeps.id())).unwrap();
        let unknown = segment_abi(&volume, &status).unwrap_err().to_string();
        let asked = format!("/proc/{}/exe is not an everdisk-interface", sleeps.id());
        assert!(unknown.contains(&asked) && unknown.contains("attach it again"), "{unknown}");
        sleeps.kill().unwrap();
        sleeps.wait().unwrap();
        assert_eq!(segment_abi_on_record(&volume, &status), None);
        let identity = Identity::parse("everdisk-interface 0.1.0 (abi 3)").unwrap();
        let build = Build { program: "/i".into(), identity, digest: None };
        volume.update(|record| record.interface = Some(build)).unwrap();
        assert_eq!(segment_abi(&volume, &status).unwrap(), 3);
        assert_eq!(segment_abi_on_record(&volume, &status), Some(3));
    }
}
