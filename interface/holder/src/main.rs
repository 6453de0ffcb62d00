//! `everdisk-interface`: the interface module (D1), one small process per volume.
//!
//! It keeps what must outlive every core: the /dev/fuse fd with its clones, the NBD clients' connections and the segment. It lends them to the
//! cores, carries out suspend, hand-over and resume, notices a core's death and gives the gate to the next. It is
//! not on the data path, and when it dies itself, the cores go on serving and give a new one the descriptors back.
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
mod peers;
mod requests;
mod restore;
mod start;
mod suspension;
mod unmounting;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = match args::parse(std::env::args_os().skip(1)) {
        Ok(args::Parsed::Run(arguments)) => arguments,
        Ok(args::Parsed::Version) => {
            println!("everdisk-interface {} (abi {})", everdisk_proto::version::PRODUCT, everdisk_proto::version::ABI);
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
    match start::run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("everdisk-interface: {error}");
            ExitCode::FAILURE
        }
    }
}
