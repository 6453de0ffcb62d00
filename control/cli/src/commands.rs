//! Carries out the commands: each is one request to the control module, except `daemon`, `doctor` and `upgrade --all`.

use std::{
    env,
    io::{self, BufRead, IsTerminal, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process,
    time::{Duration, Instant},
};

use everdisk_api::{
    LastUpgrade,
    answer::Progress,
    client::{ClientError, ask},
    directories::Directories,
    frontends::{FileOptions, NbdOptions, exposure},
    request::Request,
    status::{State, UpgradePlan, VolumeDescription, VolumeLine, VolumeStatus},
};
use everdisk_proto::{ids::VolumeName, version::PRODUCT, volume::Timeouts};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{
    arguments::{Arguments, Attach, Command, Create, Upgrade, VolumeCommand},
    doctor,
    failure::Failure,
    health,
    output::{self, complain},
    show,
};

/// A step is shown again when it has lasted this much longer.
const PATIENCE: Duration = Duration::from_secs(5);

struct Session {
    socket: PathBuf,
    json: bool,
}

/// Carries out a command.
///
/// # Errors
/// [`Failure`], for exit status 1.
pub(crate) fn run(arguments: Arguments) -> Result<(), Failure> {
    let root = rustix::process::geteuid().is_root();
    if matches!(arguments.command, Command::Doctor) {
        let directories = Directories::resolve(arguments.run_dir, arguments.state_dir, root);
        return doctor::doctor(arguments.json, root, directories.map_err(|e| e.to_string()));
    }
    let directories = Directories::resolve(arguments.run_dir, arguments.state_dir, root)?;
    let session = Session { socket: directories.control_socket(), json: arguments.json };
    match arguments.command {
        Command::Daemon { hang_limit } => Err(daemon(&directories, hang_limit)),
        Command::Doctor => Ok(()),
        Command::Version => session.version(),
        Command::Volume(command) => session.volume(command),
        Command::Attach(attach) => session.attach(attach),
        Command::Detach { name, force, yes } => session.detach(&name, force, yes),
        Command::Status { name } => session.status(name),
        Command::Health { name } => health::health(&session.socket, session.json, name),
        Command::Flush { name } => {
            let value = session.ask(&Request::Flush { name: name.clone() })?;
            session.say(&value, &format!("{name} is flushed"));
            Ok(())
        }
        Command::Suspend { name, lease } => {
            let request = Request::Suspend { name: name.clone(), lease_ms: ms(lease) };
            session.status_after(&request, &format!("{name} is suspended for at most {lease:?}"))
        }
        Command::Resume { name } => {
            session.status_after(&Request::Resume { name: name.clone() }, &format!("{name} is resumed"))
        }
        Command::Upgrade(upgrade) => session.upgrade(&upgrade),
        Command::Rollback { name } => session.end_upgrade(&Request::Rollback { name }),
    }
}

/// Becomes `everdiskd`; returns only when that is not possible.
fn daemon(directories: &Directories, hang_limit: Duration) -> Failure {
    let program = match env::current_exe() {
        Ok(own) => own.with_file_name("everdiskd"),
        Err(source) => return Failure::Io { doing: "find the directory of this program".to_owned(), source },
    };
    let mut command = process::Command::new(&program);
    command.arg("--run-dir").arg(&directories.run).arg("--state-dir").arg(&directories.state);
    command.arg("--hang-limit").arg(format!("{}ms", ms(hang_limit)));
    Failure::Io { doing: format!("start {}", program.display()), source: command.exec() }
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).expect("a duration of the command line is shorter than a year")
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|source| Failure::Io { doing: format!("find {}", path.display()), source })
}

/// The answer to `volume forget`, as far as it is shown.
#[derive(Deserialize)]
struct Forgotten {
    files: PathBuf,
}

/// The answer to `version`, as far as it is shown.
#[derive(Deserialize)]
struct Version {
    version: String,
}

/// The version of the control module that runs.
pub(crate) fn daemon_version(socket: &Path) -> Result<String, ClientError> {
    let value = ask(socket, &Request::Version, |_| {})?;
    serde_json::from_value(value).map(|Version { version }| version).map_err(ClientError::Strange)
}

fn read<T: DeserializeOwned>(value: Value) -> Result<T, Failure> {
    serde_json::from_value(value).map_err(|e| ClientError::Strange(e).into())
}

impl Session {
    /// Sends the request, and shows on stderr the steps that take long.
    fn ask(&self, request: &Request) -> Result<Value, Failure> {
        let mut last = (String::new(), Instant::now());
        let watch = |progress: &Progress| {
            let news = progress.step != last.0;
            if !news && last.1.elapsed() < PATIENCE {
                return;
            }
            if !self.json && (!news || progress.step != "start") {
                let seconds = Duration::from_millis(progress.elapsed_ms).as_secs_f64();
                complain(&format!("{seconds:8.3} s  {}", progress.step));
            }
            last = (progress.step.clone(), Instant::now());
        };
        Ok(ask(&self.socket, request, watch)?)
    }

    fn say(&self, value: &Value, words: &str) {
        if self.json { output::json(value) } else { output::line(words) }
    }

    fn status_after(&self, request: &Request, words: &str) -> Result<(), Failure> {
        let value = self.ask(request)?;
        let warnings = value.get("warnings").cloned().map(read::<Vec<String>>).transpose()?;
        for warning in warnings.into_iter().flatten() {
            complain(&format!("everdisk: warning: {warning}"));
        }
        self.say(&value, words);
        Ok(())
    }

    fn version(&self) -> Result<(), Failure> {
        let daemon = daemon_version(&self.socket);
        let words = match &daemon {
            Ok(version) => format!("everdisk {PRODUCT}\neverdiskd {version}"),
            Err(ClientError::NotRunning { .. }) => format!("everdisk {PRODUCT}\neverdiskd is not running"),
            Err(e) => format!("everdisk {PRODUCT}\n{e}"),
        };
        let daemon = daemon.ok();
        self.say(&json!({ "version": PRODUCT, "everdisk": PRODUCT, "everdiskd": daemon }), &words);
        Ok(())
    }

    fn volume(&self, command: VolumeCommand) -> Result<(), Failure> {
        match command {
            VolumeCommand::Create(create) => self.create(create),
            VolumeCommand::List => {
                let value = self.ask(&Request::VolumeList)?;
                if self.json {
                    read::<Vec<Value>>(value)?.iter().for_each(output::json);
                } else {
                    show::volumes(&read::<Vec<VolumeLine>>(value)?);
                }
                Ok(())
            }
            VolumeCommand::Show { name } => {
                let value = self.ask(&Request::VolumeShow { name })?;
                if self.json {
                    output::json(&value);
                } else {
                    show::description(&read::<VolumeDescription>(value)?);
                }
                Ok(())
            }
            VolumeCommand::Resize { name, size } => {
                self.status_after(&Request::VolumeResize { name: name.clone(), size }, &format!("{name} is resized"))
            }
            VolumeCommand::Delete { name, yes, force } => {
                if !yes {
                    confirm(&name, &format!("deleting {name} destroys its data"))?;
                }
                self.status_after(&Request::VolumeDelete { name: name.clone(), force }, &format!("{name} is deleted"))
            }
            VolumeCommand::Forget { name, yes } => {
                if !yes {
                    confirm(&name, &format!("once {name} is forgotten, nothing here knows where its data lie"))?;
                }
                let value = self.ask(&Request::VolumeForget { name: name.clone() })?;
                let Forgotten { files } = read(value.clone())?;
                self.say(&value, &format!("{name} is forgotten; its files lie in {}", files.display()));
                Ok(())
            }
        }
    }

    /// By force: where something is given up, the control module says what, and is asked again once the operator has agreed.
    fn detach(&self, name: &VolumeName, force: bool, yes: bool) -> Result<(), Failure> {
        let request = |yes| Request::Detach { name: name.clone(), force, yes };
        let value = match self.ask(&request(yes)) {
            Err(Failure::Client(ClientError::Refused(refusal))) if refusal.needs_yes() && io::stdin().is_terminal() => {
                confirm(name, refusal.message.strip_suffix(": say --yes to do it").unwrap_or(&refusal.message))?;
                self.ask(&request(true))?
            }
            other => other?,
        };
        let words = match value.get("given_up_bytes").map(Value::as_u64) {
            Some(Some(0)) => format!("{name} is detached"),
            Some(Some(bytes)) => format!("{name} is detached; {bytes} bytes that were acknowledged are given up"),
            _ => format!("{name} is detached; what was acknowledged and on no storage node is given up"),
        };
        self.say(&value, &words);
        Ok(())
    }

    fn create(&self, create: Create) -> Result<(), Failure> {
        let Create { name, size, stripe, buffer, bypass, nodes, create_dir, force, .. } = create;
        let timeouts = Timeouts {
            room_ms: ms(create.room_timeout),
            full_node_ms: ms(create.full_node_timeout),
            flush_ms: ms(create.flush_timeout),
            io_ms: ms(create.io_timeout),
        };
        let words = format!("{name} is made");
        let request = Request::VolumeCreate { name, size, stripe, buffer, bypass, timeouts, nodes, create_dir, force };
        self.status_after(&request, &words)
    }

    fn attach(&self, attach: Attach) -> Result<(), Failure> {
        let Attach { name, file, nbd, allow_other, mode, owner } = attach;
        let file = file.as_deref().map(absolute).transpose()?;
        let file = file.map(|path| FileOptions { path, mode, owner, allow_other });
        let nbd: Vec<_> = nbd.into_iter().map(|address| NbdOptions { address, mode, owner }).collect();
        let exposed: Vec<String> = nbd.iter().filter_map(|nbd| exposure(&nbd.address)).collect();
        let value = self.ask(&Request::Attach { name: name.clone(), file, nbd })?;
        exposed.iter().for_each(|words| complain(&format!("everdisk: warning: {words}")));
        if self.json {
            output::json(&value);
        } else {
            // As the control module says: if the system chose the port, it was not known before.
            output::line(&format!("{name} is attached at {}", show::places(&read::<VolumeStatus>(value)?)));
        }
        Ok(())
    }

    fn status(&self, name: Option<VolumeName>) -> Result<(), Failure> {
        let all = name.is_none();
        let value = self.ask(&Request::Status { name })?;
        match (self.json, all) {
            (true, false) => output::json(&value),
            (true, true) => read::<Vec<Value>>(value)?.iter().for_each(output::json),
            (false, false) => show::status(&read::<VolumeStatus>(value)?),
            (false, true) => show::statuses(&read::<Vec<VolumeStatus>>(value)?),
        }
        Ok(())
    }

    fn upgrade(&self, upgrade: &Upgrade) -> Result<(), Failure> {
        let Some(core) = &upgrade.core else {
            // The command line has checked this.
            return Err(Failure::Other("give the new core with --core FILE".to_owned()));
        };
        let core = absolute(core)?;
        for name in self.chosen(upgrade)? {
            let request = Request::Upgrade {
                name,
                core: core.clone(),
                handover: upgrade.handover,
                flush_limit_ms: ms(upgrade.flush_limit),
                pause_budget_ms: ms(upgrade.pause_budget),
                soak_ms: ms(upgrade.soak),
                plan: upgrade.plan,
            };
            if upgrade.plan {
                let value = self.ask(&request)?;
                if self.json { output::json(&value) } else { show::plan(&read::<UpgradePlan>(value)?) }
            } else {
                self.end_upgrade(&request)?;
            }
        }
        Ok(())
    }

    fn chosen(&self, upgrade: &Upgrade) -> Result<Vec<VolumeName>, Failure> {
        if let Some(name) = &upgrade.name {
            return Ok(vec![name.clone()]);
        }
        let lines: Vec<VolumeLine> = read(self.ask(&Request::VolumeList)?)?;
        let attached = lines.into_iter().filter(|line| line.state != State::Detached && line.reason.is_none());
        let strange = |name, e| Failure::Other(format!("everdiskd names a volume {name:?}, and that is no name: {e}"));
        let named = attached.map(|line| line.name.parse().map_err(|e| strange(line.name, e)));
        let names = named.collect::<Result<Vec<VolumeName>, Failure>>()?;
        if names.is_empty() {
            return Err(Failure::Other("no volume is attached: there is nothing to upgrade".to_owned()));
        }
        Ok(names)
    }

    /// Shows the report of an upgrade whether it was committed or not.
    fn end_upgrade(&self, request: &Request) -> Result<(), Failure> {
        let ended = self.ask(request);
        let answer = match &ended {
            Ok(value) => Some(value),
            Err(Failure::Client(ClientError::Refused(refusal))) => refusal.detail.as_ref(),
            Err(_) => None,
        };
        if let Some(value) = answer {
            let report = read::<LastUpgrade>(value.clone())?;
            if self.json {
                output::json(value);
            } else if ended.is_ok() || !report.was_refused() {
                // The report of an upgrade that was refused has nothing but the reason. That of one which a rollback ended is the answer.
                show::upgrade(&report);
            }
        }
        ended.map(|_| ())
    }
}

/// Asks the operator to agree, on a terminal.
fn confirm(name: &VolumeName, what: &str) -> Result<(), Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure::Other(format!("{what}: say --yes to do it without a question")));
    }
    let asked = |source| Failure::Io { doing: "ask".to_owned(), source };
    write!(io::stderr(), "{what}. Type the volume's name to agree: ").map_err(asked)?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).map_err(asked)?;
    if answer.trim() == name.as_str() {
        return Ok(());
    }
    Err(Failure::Other(format!("nothing was done to {name}")))
}
