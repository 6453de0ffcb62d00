//! TLS as the files say: the authorities, and who the client is.

use std::{path::Path, sync::Arc};

use everdisk_proto::nbd::NbdAddress;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};

use super::ConnectError;
use crate::address::TlsFiles;

/// The client's side of TLS with this server. The files are read anew for every connection, so that certificates can be replaced.
pub(super) fn client(server: &NbdAddress, files: &TlsFiles) -> Result<ClientConnection, ConnectError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&files.authorities)? {
        roots.add(certificate).map_err(|why| unusable(&files.authorities, &why))?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let config = match &files.client {
        None => builder.with_no_client_auth(),
        Some(own) => {
            let key = PrivateKeyDer::from_pem_file(&own.key).map_err(|why| unusable(&own.key, &why))?;
            builder.with_client_auth_cert(certificates(&own.certificate)?, key)?
        }
    };
    let name = match (&files.server_name, server) {
        (Some(name), _) => name.clone(),
        (None, NbdAddress::Tcp { host, .. }) => host.clone(),
        (None, NbdAddress::Unix(_)) => return Err(ConnectError::ServerName),
    };
    let name = ServerName::try_from(name)
        .map_err(|why| ConnectError::Tls(rustls::Error::General(format!("the server's name: {why}"))))?;
    Ok(ClientConnection::new(Arc::new(config), name)?)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, ConnectError> {
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = read.map_err(|why| unusable(file, &why))?;
    if certificates.is_empty() { Err(unusable(file, &"it has no certificate")) } else { Ok(certificates) }
}

fn unusable(file: &Path, why: &dyn std::fmt::Display) -> ConnectError {
    ConnectError::TlsFile { file: file.display().to_string(), why: why.to_string() }
}
