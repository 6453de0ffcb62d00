//! `everdisk-interface`: the interface module (D1), one small process per volume.
//!
//! It keeps what must outlive every core: the /dev/fuse fd with its clones, the NBD clients' connections and the
//! segment. It lends them to the cores, carries out suspend, hand-over and resume, notices a core's death and gives the
//! gate to the next core. It is not on the data path. When it dies itself, the cores go on serving and give the
//! descriptors back to a new one.
//!
//! It is a library, so that a test build can make an interface of another version from the same parts.
#![forbid(unsafe_code)]

mod acts;
mod args;
mod cores;
mod deaths;
mod fatal;
mod front;
mod fronts;
mod hearing;
mod holder;
mod life;
mod listen;
mod locks;
mod marks;
mod nbd;
mod nodes;
mod peers;
mod requests;
mod restore;
mod start;
mod suspension;
mod unmounting;

use std::process::ExitCode;

use everdisk_proto::identity::Identity;

/// Runs the program of an interface with this identity: it makes segments of the newest ABI that the identity names, and adopts
/// those of the others.
pub fn run(identity: &Identity) -> ExitCode {
    let arguments = match args::parse(std::env::args_os().skip(1)) {
        Ok(args::Parsed::Run(arguments)) => arguments,
        Ok(args::Parsed::Version) => {
            println!("{identity}");
            return ExitCode::SUCCESS;
        }
        Ok(args::Parsed::Help) => {
            print!("{}", args::HELP);
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            eprintln!("everdisk-interface: {wrong}\nusage: {}", args::USAGE);
            return ExitCode::from(2);
        }
    };
    everdisk_telemetry::init();
    match start::run(&arguments, identity) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("everdisk-interface: {error}");
            ExitCode::FAILURE
        }
    }
}
