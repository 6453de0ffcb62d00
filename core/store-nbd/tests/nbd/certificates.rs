//! Certificates for the tests of TLS.

use std::{fs, path::Path};

use everdisk_store_nbd::{ClientFiles, TlsFiles};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose};

/// Makes an authority, and a certificate for a server and one for a client, under the names that nbdkit expects.
pub(crate) fn make(directory: &Path, host: &str) -> TlsFiles {
    fs::create_dir_all(directory).unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params.distinguished_name.push(rcgen::DnType::CommonName, "authority");
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    fs::write(directory.join("ca-cert.pem"), authority.pem()).unwrap();
    for (name, of) in [("server", host), ("client", "client")] {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![of.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        fs::write(directory.join(format!("{name}-cert.pem")), certificate.pem()).unwrap();
        fs::write(directory.join(format!("{name}-key.pem")), key.serialize_pem()).unwrap();
    }
    TlsFiles {
        authorities: directory.join("ca-cert.pem"),
        client: Some(ClientFiles {
            certificate: directory.join("client-cert.pem"),
            key: directory.join("client-key.pem"),
        }),
        server_name: Some(host.to_owned()),
    }
}
