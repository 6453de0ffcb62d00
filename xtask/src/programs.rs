//! Foreign programs that the tests, the demo and the bench call, the packages they come from, and where they are here.
//!
//! A program counts as there when a package that is named for it brought it: one of the same name that someone has
//! built or wrapped (a Python under a version switcher, say) is another program. Where there is no dpkg, the first one on
//! PATH counts.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A program that something here calls.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    /// The Debian packages to try, one after another, until the program is there. Any of them may have brought it.
    pub(crate) packages: &'static [&'static str],
    pub(crate) purpose: &'static str,
}

const fn program(name: &'static str, packages: &'static [&'static str], purpose: &'static str) -> Program {
    Program { name, packages, purpose }
}

/// What every Debian has, unless someone has taken it out.
const fn of_the_base(name: &'static str, packages: &'static [&'static str]) -> Program {
    program(name, packages, "is called by the tests and their scripts")
}

const COREUTILS: &[&str] = &["coreutils", "coreutils-from-uutils", "coreutils-from-gnu"];

pub(crate) const FIO: Program = program("fio", &["fio"], "loads volumes with I/O and verifies it");
pub(crate) const FUSERMOUNT: Program = program("fusermount3", &["fuse3"], "mounts and unmounts without privilege");
pub(crate) const QEMU_STORAGE_DAEMON: Program = program(
    "qemu-storage-daemon",
    &["qemu-utils", "qemu-system-common"],
    "is the peer that the bench measures against",
);
const NBDKIT: Program =
    program("nbdkit", &["nbdkit"], "is an NBD server: a storage node of the tests, a peer of the bench");
const QEMU_NBD: Program =
    program("qemu-nbd", &["qemu-utils"], "is an NBD server: a storage node of the tests, a peer of the bench");
const NBD_SERVER: Program =
    program("nbd-server", &["nbd-server"], "is an NBD server: a storage node of the tests, a peer of the bench");

/// What the demo calls.
pub(crate) const DEMO: &[Program] = &[FIO, FUSERMOUNT];
/// What the bench calls.
pub(crate) const BENCH: &[Program] = &[FIO, FUSERMOUNT, QEMU_STORAGE_DAEMON, NBDKIT, QEMU_NBD, NBD_SERVER];
/// What the tests call. `cargo xtask test` runs them with nothing else on PATH (but [`TOOLS`]).
pub(crate) const TESTS: &[Program] = &[
    FIO,
    FUSERMOUNT,
    QEMU_STORAGE_DAEMON,
    program("mkfs.ext4", &["e2fsprogs"], "makes file systems on volumes"),
    program("mkfs.ext2", &["e2fsprogs"], "makes a file system that cannot reserve space"),
    program("e2fsck", &["e2fsprogs"], "proves that they are whole"),
    program("mkfs.xfs", &["xfsprogs"], "makes file systems on volumes"),
    program("xfs_repair", &["xfsprogs"], "proves that they are whole"),
    program("losetup", &["mount", "util-linux"], "makes block devices of volumes"),
    program("mount", &["mount", "util-linux"], "mounts file systems"),
    program("umount", &["mount", "util-linux"], "unmounts file systems"),
    program("findmnt", &["util-linux"], "shows what is mounted"),
    program("blkdiscard", &["util-linux"], "discards on volumes"),
    program("fstrim", &["util-linux"], "discards on file systems"),
    program("fsfreeze", &["util-linux"], "has a storage node hang"),
    program("qemu-img", &["qemu-utils"], "reads volumes as QEMU does"),
    program("python3", &["python3", "python3-minimal"], "speaks to sockets as another user"),
    program("qemu-io", &["qemu-utils"], "does I/O as QEMU does"),
    NBDKIT,
    QEMU_NBD,
    NBD_SERVER,
    program("nbdinfo", &["libnbd-bin"], "asks NBD servers what they can do"),
    program("nbdcopy", &["libnbd-bin"], "copies to and from NBD servers"),
    program("nbdsh", &["python3-libnbd"], "sends NBD servers what no other client sends"),
    of_the_base("sh", &["dash", "bash"]),
    of_the_base("bash", &["bash"]),
    of_the_base("flock", &["util-linux"]),
    of_the_base("nsenter", &["util-linux"]),
    of_the_base("prlimit", &["util-linux"]),
    of_the_base("setpriv", &["util-linux"]),
    of_the_base("setsid", &["util-linux"]),
    of_the_base("unshare", &["util-linux"]),
    of_the_base("cmp", &["diffutils"]),
    of_the_base("find", &["findutils"]),
    of_the_base("xargs", &["findutils"]),
    of_the_base("tar", &["tar"]),
    of_the_base("cat", COREUTILS),
    of_the_base("chmod", COREUTILS),
    of_the_base("cp", COREUTILS),
    of_the_base("dd", COREUTILS),
    of_the_base("env", COREUTILS),
    of_the_base("false", COREUTILS),
    of_the_base("mkfifo", COREUTILS),
    of_the_base("mknod", COREUTILS),
    of_the_base("mv", COREUTILS),
    of_the_base("rm", COREUTILS),
    of_the_base("sha256sum", COREUTILS),
    of_the_base("sleep", COREUTILS),
    of_the_base("sort", COREUTILS),
    of_the_base("sync", COREUTILS),
    of_the_base("touch", COREUTILS),
    of_the_base("true", COREUTILS),
];
/// What the tasks call, and their tests: it comes with the clone and its toolchain, from wherever.
pub(crate) const TOOLS: &[&str] = &["cargo", "rustc", "git", "dpkg-query"];

/// The directories of PATH, and those of the administrator's programs, which PATH often lacks.
pub(crate) fn search_path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(administrators).collect()
}

/// The first program of that name.
pub(crate) fn first(path: &[PathBuf], name: &str) -> Option<PathBuf> {
    all(path, name).next()
}

fn all(path: &[PathBuf], name: &str) -> impl Iterator<Item = PathBuf> {
    path.iter().map(move |directory| directory.join(name)).filter(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

/// The package that installed a file. `None`: this system has no dpkg, so the package is unknown.
pub(crate) struct Packages(Option<BTreeMap<PathBuf, Vec<String>>>);

impl Packages {
    /// What dpkg knows of all files of these names on the path.
    pub(crate) fn of(programs: &[Program], path: &[PathBuf]) -> Self {
        let Some(dpkg) = first(path, "dpkg-query") else { return Self(None) };
        let files = programs.iter().flat_map(|program| all(path, program.name)).flat_map(|file| names(&file));
        // It fails when it does not know one of the files, but still reports the others.
        let told = Command::new(dpkg).arg("--search").args(files).env("LC_ALL", "C").output();
        Self(told.ok().map(|told| owners(&String::from_utf8_lossy(&told.stdout))))
    }

    fn brought(&self, file: &Path, packages: &[&str]) -> bool {
        let Self(Some(owners)) = self else { return true };
        let of = names(file).into_iter().filter_map(|name| owners.get(&name)).flatten();
        of.into_iter().any(|owner| packages.contains(&owner.as_str()))
    }

    /// The first program on the path that one of its packages brought.
    pub(crate) fn find(&self, program: &Program, path: &[PathBuf]) -> Option<PathBuf> {
        all(path, program.name).find(|file| self.brought(file, program.packages))
    }
}

/// What dpkg may call a file: its directory by its true name, the file that it leads to, each with /usr and without (a
/// package from before directories were merged has it without).
fn names(file: &Path) -> Vec<PathBuf> {
    let by_directory = file.parent().and_then(|parent| parent.canonicalize().ok()).zip(file.file_name());
    let mut names: Vec<PathBuf> = by_directory.map(|(parent, name)| parent.join(name)).into_iter().collect();
    names.extend(file.canonicalize());
    let without = names.iter().filter_map(|name| Some(Path::new("/").join(name.strip_prefix("/usr").ok()?)));
    let without: Vec<PathBuf> = without.collect();
    names.extend(without);
    names.dedup();
    names
}

/// `package[:arch][, package …]: /file`, a line each.
fn owners(told: &str) -> BTreeMap<PathBuf, Vec<String>> {
    let lines = told.lines().filter(|line| !line.starts_with("diversion by "));
    let pairs = lines.filter_map(|line| line.split_once(": "));
    let name = |package: &str| package.split(':').next().unwrap_or(package).to_owned();
    pairs.map(|(packages, file)| (file.into(), packages.split(", ").map(name).collect())).collect()
}

/// The programs that are not there.
pub(crate) fn missing<'a>(programs: &'a [Program], path: &[PathBuf]) -> Vec<&'a Program> {
    let packages = Packages::of(programs, path);
    programs.iter().filter(|program| packages.find(program, path).is_none()).collect()
}

/// Makes a directory that can be the whole of PATH: the programs, and the tools of the tasks.
///
/// # Errors
/// One of them cannot be linked.
pub(crate) fn lay(programs: &[Program], path: &[PathBuf], directory: &Path) -> std::io::Result<()> {
    let packages = Packages::of(programs, path);
    // What was not brought by its package, even after the set-up, is better than nothing; a test of the set-up tells.
    let found = |program: &Program| packages.find(program, path).or_else(|| first(path, program.name));
    let programs = programs.iter().filter_map(|program| Some((program.name, found(program)?)));
    let tools = TOOLS.iter().filter_map(|name| Some((*name, first(path, name)?)));
    for (name, file) in programs.chain(tools) {
        std::os::unix::fs::symlink(file, directory.join(name))?;
    }
    // Every user that a test becomes has to be able to enter it.
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn executable(directory: &Path, name: &str) -> PathBuf {
        let program = directory.join(name);
        std::fs::write(&program, "").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        program
    }

    #[test]
    fn a_program_is_looked_for_on_the_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = [directory.path().to_path_buf()];
        assert_eq!(first(&path, "fio"), None);
        let program = directory.path().join("fio");
        std::fs::write(&program, "").unwrap();
        assert_eq!(first(&path, "fio"), None, "not executable");
        executable(directory.path(), "fio");
        assert_eq!(first(&path, "fio"), Some(program));
        let left: Vec<&str> = missing(DEMO, &path).iter().map(|program| program.name).collect();
        assert_eq!(left, ["fusermount3"], "without dpkg, what is on PATH counts");
    }

    #[test]
    fn a_program_that_its_package_did_not_bring_is_another_program() {
        let directory = tempfile::tempdir().unwrap();
        let (mine, theirs) = (directory.path().join("mine"), directory.path().join("usr-bin"));
        std::fs::create_dir(&mine).unwrap();
        std::fs::create_dir(&theirs).unwrap();
        executable(&mine, "fio");
        let packaged = executable(&theirs, "fio");
        let packages = Packages(Some(owners(&format!("fio:amd64: {}\n", packaged.display()))));
        assert_eq!(packages.find(&FIO, &[mine.clone(), theirs.clone()]), Some(packaged.clone()));
        assert_eq!(packages.find(&FIO, std::slice::from_ref(&mine)), None);
        let of_another = Packages(Some(owners(&format!("fiona: {}\n", packaged.display()))));
        assert_eq!(of_another.find(&FIO, &[mine, theirs]), None);
    }

    #[test]
    fn what_dpkg_tells_is_read() {
        let told = owners("diversion by dash from: /bin/sh\nlibc6:amd64, libc6:i386: /usr/share/doc\ndash: /bin/sh\n");
        assert_eq!(told[Path::new("/bin/sh")], ["dash"]);
        assert_eq!(told[Path::new("/usr/share/doc")], ["libc6", "libc6"]);
        assert!(names(Path::new("/bin/sh")).contains(&"/bin/sh".into()));
    }

    /// Says when a program that the tests call comes from neither its package nor the clone.
    #[test]
    fn every_program_that_the_tests_call_here_comes_from_its_package() {
        let path = search_path();
        let foreign = missing(TESTS, &path).into_iter().map(|program| {
            let found =
                first(&path, program.name).map_or_else(|| "missing".to_owned(), |file| file.display().to_string());
            format!("{}: {found}, not from {}", program.name, program.packages.join(" or "))
        });
        let foreign: Vec<String> = foreign.collect();
        assert!(foreign.is_empty(), "run `cargo xtask setup`: {foreign:#?}");
    }

    #[test]
    fn a_path_is_laid_of_the_programs_and_nothing_else() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["fio", "fusermount3", "cargo", "ceph"] {
            executable(from.path(), name);
        }
        std::fs::set_permissions(to.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        lay(DEMO, &[from.path().to_path_buf()], to.path()).unwrap();
        let laid = std::fs::read_dir(to.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut laid: Vec<_> = laid.collect();
        laid.sort();
        assert_eq!(laid, ["cargo", "fio", "fusermount3"]);
        assert_eq!(to.path().metadata().unwrap().permissions().mode() & 0o777, 0o755);
    }

    /// Every program that a test's source names is declared (what a shell script calls is found when the tests run:
    /// nothing else is on their PATH).
    #[test]
    fn every_program_that_a_test_names_is_declared() {
        let rooms = ["tests", "harness", "sys", "core", "interface", "control", "proto", "testkit", "telemetry"];
        let mut sources = Vec::new();
        rooms.iter().for_each(|room| read_sources(&crate::workspace::root().join(room), &mut sources));
        let called = sources.iter().flat_map(|(path, text)| named(text).map(move |name| (name, path)));
        let mut called: BTreeMap<&str, &PathBuf> = called.collect();
        assert!(
            called.contains_key("losetup") && called.contains_key("qemu-io"),
            "the calls are not found: {called:?}"
        );
        called.retain(|name, _| !TESTS.iter().any(|program| program.name == *name));
        assert!(called.is_empty(), "not in TESTS: {called:?}");
    }

    /// Every Rust source below a directory, without the lines that are comments.
    fn read_sources(directory: &Path, sources: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read_sources(&path, sources);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let code: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
                sources.push((path, code.join("\n")));
            }
        }
    }

    /// The names in `Command::new("…")`, `sh("…")`, `client("…")` and `need("…")`.
    fn named(text: &str) -> impl Iterator<Item = &str> {
        let calls = ["Command::new(\"", "sh(\"", "client(\"", "need(\"", "as_nobody(\""];
        let whole = |at: usize| !text[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
        let found = calls.into_iter().flat_map(move |call| text.match_indices(call));
        let after = found.filter(move |(at, _)| whole(*at)).map(|(at, call)| at + call.len());
        let quoted = after.filter_map(|from| text[from..].split_once('"'));
        let names = quoted.map(|(name, _)| name.rsplit_once('/').map_or(name, |(_, name)| name));
        names.filter(|name| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)))
    }
}
