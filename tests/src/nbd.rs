//! NBD: a volume with every front end, and foreign clients.

use std::{fs::File, io, ops::Deref, process::Command, time::Duration};

pub use everdisk_harness::nbd::{
    Address, Client, Kind, bytes, go, greet, option, option_reply, request, wire, write_request,
};

use crate::{
    host::Host,
    programs::need,
    run::{Output, run},
    volume::Volume,
    wait::SOON,
};

/// A foreign client may take this long.
const CLIENT_LIMIT: Duration = Duration::from_secs(60);

/// Where a volume is exported.
#[derive(Clone, Debug)]
pub struct Front(Address);

impl Deref for Front {
    type Target = Address;
    fn deref(&self) -> &Address {
        &self.0
    }
}

impl Front {
    /// A stream to it. Every wait on it ends after [`SOON`].
    ///
    /// # Errors
    /// It is refused.
    pub fn try_stream(&self) -> io::Result<File> {
        self.connect(SOON)
    }

    /// A stream to it.
    pub fn stream(&self) -> File {
        self.try_stream().unwrap_or_else(|e| panic!("connect to {self:?}: {e}"))
    }

    /// A client that has shaken hands.
    pub fn client(&self) -> Client {
        Client::over(self.stream()).unwrap_or_else(|e| panic!("shake hands with {self:?}: {e}"))
    }

    /// Has libnbd's shell do this, connected as `h`; without `h.set_strict_mode` it refuses to send what is wrong.
    /// `fails(errno, f, …)` is there for what has to fail. Gives what it printed.
    pub fn nbdsh(&self, script: &str) -> String {
        nbdsh(&["--base-allocation", "--uri", &self.uri()], script)
    }
}

/// What every script for nbdsh may use.
const PRELUDE: &str = "
def fails(errors, f, *a, **k):
    try:
        f(*a, **k)
    except nbd.Error as e:
        assert e.errno in errors.split(), (f.__name__, a, k, e.errno, e.string)
        return
    raise AssertionError((f.__name__, a, k, 'did not fail'))

def handle(uri):
    c = nbd.NBD()
    c.connect_uri(uri)
    return c
";

/// libnbd's shell. It is Debian's and wants Debian's Python, whichever Python comes first on PATH.
pub fn nbdsh(arguments: &[&str], script: &str) -> String {
    need("/usr/bin/nbdsh");
    let mut command = Command::new("/usr/bin/nbdsh");
    command.env("PATH", "/usr/bin:/bin").args(arguments).args(["-c", PRELUDE, "-c", script]);
    run(command, CLIENT_LIMIT).ok()
}

/// Runs another client.
pub fn client(program: &str, arguments: &[&str]) -> Output {
    need(program);
    let mut command = Command::new(program);
    command.args(arguments);
    run(command, CLIENT_LIMIT)
}

/// A volume that is a file, an export on a unix socket and an export on TCP.
#[derive(Debug)]
pub struct Exported<'a> {
    /// The volume.
    pub volume: Volume<'a>,
    /// On a unix socket.
    pub unix: Front,
    /// On TCP.
    pub tcp: Front,
}

impl<'a> Exported<'a> {
    /// Makes it, on two storage nodes.
    pub fn new(host: &'a Host, name: &str, size: &str) -> Self {
        let volume = host.create(name, size, 2);
        Self::attach(volume)
    }

    /// Attaches a volume to all three front ends.
    pub fn attach(volume: Volume<'a>) -> Self {
        let unix = format!("unix:{}", volume.host.file(&format!("{}.sock", volume.name)).display());
        volume.attach(&["--nbd", &unix, "--nbd", "tcp:127.0.0.1:0"]);
        let fronts = fronts(&volume);
        let [unix, tcp] = <[Front; 2]>::try_from(fronts).unwrap_or_else(|_| panic!("{:?}", volume.status()));
        let (Address::Unix(_), Address::Tcp(address)) = (&*unix, &*tcp) else { panic!("{:?}", volume.status()) };
        assert_ne!(address.port(), 0, "the port that was chosen");
        Self { volume, unix, tcp }
    }

    /// Both NBD front ends.
    pub const fn both(&self) -> [&Front; 2] {
        [&self.unix, &self.tcp]
    }

    /// Clients that are connected, as status tells.
    pub fn connections(&self) -> u64 {
        let status = self.volume.status();
        let fronts = status.0["frontends"].as_array().expect("front ends");
        fronts.iter().filter_map(|front| front["connections"].as_u64()).sum()
    }

    /// Waits until the last client has gone and detaches the volume in order.
    pub fn detach(&self) {
        crate::wait::until_true("every client has gone", || self.connections() == 0);
        self.volume.detach();
    }
}

/// The NBD front ends of a volume, those on unix sockets first.
pub fn fronts(volume: &Volume<'_>) -> Vec<Front> {
    let status = volume.status();
    let fronts = status.0["frontends"].as_array().expect("front ends");
    let fronts = fronts.iter().filter(|front| front["kind"] == "nbd");
    let addresses = fronts.map(|front| front["address"].as_str().and_then(Address::parse).expect("an address"));
    let mut fronts: Vec<Front> = addresses.map(Front).collect();
    fronts.sort_by_key(|front| matches!(**front, Address::Tcp(_)));
    fronts
}
