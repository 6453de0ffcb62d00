//! The front ends that an operator asks for, and which of them go together.

use std::{net::IpAddr, path::PathBuf};

use everdisk_proto::{limits::LISTENERS_MAX, nbd::NbdAddress};
use serde::{Deserialize, Serialize};

/// The file front end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileOptions {
    /// Absolute path.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    /// Owner and group; the control module's own when none is given.
    pub owner: Option<(u32, u32)>,
    /// Let other users in, as far as `mode` permits.
    pub allow_other: bool,
}

/// An address for NBD clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdOptions {
    /// The address.
    pub address: NbdAddress,
    /// Permission bits of a UNIX socket.
    pub mode: u32,
    /// Its owner and group; the control module's own when none is given.
    pub owner: Option<(u32, u32)>,
}

/// Whether these front ends make an attach: a file or not, and NBD at these addresses.
///
/// # Errors
/// In words.
pub fn check_set<'a>(file: bool, nbd: impl IntoIterator<Item = &'a NbdAddress>) -> Result<(), String> {
    let mut seen: Vec<&NbdAddress> = Vec::new();
    for address in nbd {
        if seen.contains(&address) {
            return Err(format!("{address} is named twice: name each address once"));
        }
        seen.push(address);
    }
    match seen.len() {
        0 if !file => Err("no front end is named: give a file, an address for NBD clients, or both".to_owned()),
        n if n > LISTENERS_MAX => {
            Err(format!("{n} addresses for NBD clients are too many: a volume has at most {LISTENERS_MAX}"))
        }
        _ => Ok(()),
    }
}

/// What an operator must know to serve NBD at this address: beyond this machine anyone may read, change and imitate
/// the traffic. Of host names only `localhost` is known to stay on it.
pub fn exposure(address: &NbdAddress) -> Option<String> {
    let NbdAddress::Tcp { host, .. } = address else { return None };
    let local = match host.parse::<IpAddr>() {
        Ok(ip) => ip.to_canonical().is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    };
    (!local).then(|| {
        format!(
            "{address} can be reached from other machines, and its connections are neither encrypted nor authenticated \
             (TLS is not in this version): listen on loopback or a UNIX socket and use a tunnel, or keep strangers out \
             of that network"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<NbdAddress> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn one_front_end_at_least_and_each_address_once() {
        let check = |file, texts: &[&str]| check_set(file, &addresses(texts));
        assert_eq!(check(true, &[]), Ok(()));
        assert_eq!(check(false, &["unix:/a"]), Ok(()));
        assert_eq!(check(true, &["unix:/a", "unix:/b", "tcp:localhost:1", "tcp:localhost:2"]), Ok(()));
        assert!(check(false, &[]).unwrap_err().contains("no front end"));
        assert!(
            check(true, &["tcp:[::1]:1", "unix:/a", "tcp:[::1]:1"]).unwrap_err().contains("tcp:[::1]:1 is named twice")
        );
        let many: Vec<String> = (0..=LISTENERS_MAX).map(|n| format!("unix:/{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(check(false, &many[1..]), Ok(()));
        assert!(check(false, &many).unwrap_err().contains("at most 8"));
    }

    #[test]
    fn only_what_stays_on_this_machine_needs_no_warning() {
        for local in ["unix:/a", "tcp:127.0.0.1:1", "tcp:127.9.9.9:1", "tcp:LocalHost:1", "tcp:[::1]:1"] {
            assert_eq!(exposure(&local.parse().unwrap()), None, "{local}");
        }
        assert_eq!(exposure(&"tcp:[::ffff:127.0.0.1]:1".parse().unwrap()), None);
        for exposed in
            ["tcp:0.0.0.0:1", "tcp:[::]:1", "tcp:192.0.2.1:1", "tcp:[2001:db8::1]:1", "tcp:localhost.example:1"]
        {
            let warning = exposure(&exposed.parse().unwrap()).unwrap();
            assert!(
                warning.starts_with(exposed) && warning.contains("neither encrypted nor authenticated"),
                "{warning}"
            );
        }
    }
}
