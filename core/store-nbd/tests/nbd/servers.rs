//! Real servers, started and ended by the tests, and clients of them.

use std::ops::{Deref, DerefMut};

use everdisk_harness::servers;
use everdisk_store_nbd::{Address, Client, Config, Tls};

/// A server, and where its export is.
pub(crate) struct Server {
    server: servers::Server,
    pub(crate) address: Address,
}

impl Server {
    pub(crate) fn nbdkit(arguments: &[&str]) -> Self {
        servers::Server::nbdkit(arguments).into()
    }

    pub(crate) fn nbdkit_tcp(arguments: &[&str]) -> Self {
        servers::Server::nbdkit_tcp(arguments).into()
    }

    pub(crate) fn nbdkit_file(size: u64, arguments: &[&str]) -> Self {
        servers::Server::nbdkit_file(size, arguments).into()
    }

    pub(crate) fn qemu_nbd(size: u64) -> Self {
        servers::Server::qemu_nbd(size).into()
    }

    pub(crate) fn qemu_nbd_on(disk: &Self) -> Self {
        servers::Server::qemu_nbd_on(&disk.server).into()
    }

    pub(crate) fn nbd_server(size: u64) -> Self {
        servers::Server::nbd_server(size).into()
    }

    pub(crate) fn kill(&mut self) {
        self.server.kill();
    }

    pub(crate) fn terminate(&mut self) {
        self.server.terminate();
    }

    pub(crate) fn client(&self, config: Config) -> Client {
        Client::connect(self.address.clone(), config).unwrap()
    }
}

impl From<servers::Server> for Server {
    fn from(server: servers::Server) -> Self {
        let export = server.export().clone();
        Self { server, address: Address { server: export.server, export: export.name, tls: Tls::Off } }
    }
}

/// The default export of a server.
pub(crate) fn parse(server: &str) -> Address {
    Address { server: server.parse().unwrap(), export: String::new(), tls: Tls::Off }
}

impl Deref for Server {
    type Target = servers::Server;

    fn deref(&self) -> &servers::Server {
        &self.server
    }
}

impl DerefMut for Server {
    fn deref_mut(&mut self) -> &mut servers::Server {
        &mut self.server
    }
}
