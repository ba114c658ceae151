//! Whether and with whom this host's traffic is encrypted: the operator's choice, the key, and what is to be said.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use flynn_overlay::{Encryption, PrivateKey, WIREGUARD_PORT, Wireguard};
use serde::{Deserialize, Serialize};

use crate::files;

/// What the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Nothing is encrypted.
    Off,
    /// With every host that can.
    On,
    /// No packets are exchanged with other hosts unless they are encrypted.
    Required,
}

/// What is wanted of the network. `direct` is whether the cluster's hosts reach each other without a tunnel: who asked
/// for that and for nothing else knows the link between them.
pub(crate) fn wanted(mode: Option<Mode>, direct: bool, key: &Path) -> io::Result<Option<Encryption>> {
    let mode = mode.unwrap_or(if direct { Mode::Off } else { Mode::On });
    if mode == Mode::Off {
        return Ok(None);
    }
    Ok(Some(Encryption {
        key: own_key(key)?,
        required: mode == Mode::Required,
    }))
}

/// The key in the file; a new one where there is none.
fn own_key(path: &Path) -> io::Result<PrivateKey> {
    match std::fs::read_to_string(path) {
        Ok(text) => text.parse().map_err(|error| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{}: {error}. Remove the file and start the daemon anew: it makes another key, and the other hosts \
                     hear of it",
                    path.display()
                ),
            )
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = PrivateKey::generate()?;
            files::write_atomic(path, format!("{}\n", key.to_text()).as_bytes())?;
            Ok(key)
        }
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!("{}: {error}", path.display()),
        )),
    }
}

/// What an operator has to know of traffic to other hosts. `hosts` are those by id; `handshakes` those with a key, and
/// whether they have answered.
pub(crate) fn notices(
    wireguard: &Wireguard,
    required: bool,
    hosts: &BTreeMap<&str, Ipv4Addr>,
    handshakes: &BTreeMap<Ipv4Addr, bool>,
) -> Vec<String> {
    if hosts.is_empty() {
        return Vec::new();
    }
    match wireguard {
        Wireguard::Off => vec![crate::notices::PLAIN.into()],
        Wireguard::Unavailable(why) if required => vec![format!(
            "encryption is required and cannot be had ({why}): no packets are exchanged with other hosts"
        )],
        Wireguard::Unavailable(why) => vec![format!("{} ({why})", crate::notices::PLAIN)],
        Wireguard::On(_) => {
            let so = |which: &[&str], why: &str| {
                let what = if required {
                    "no packets are exchanged with"
                } else {
                    "traffic is not encrypted with"
                };
                format!("{what} the hosts {}: {why}", which.join(", "))
            };
            let with = |wanted: Option<bool>| -> Vec<&str> {
                let with = |(_, address): &(&&str, &Ipv4Addr)| handshakes.get(address).copied() == wanted;
                hosts.iter().filter(with).map(|(id, _)| *id).collect()
            };
            let mut notices = Vec::new();
            let without_key = with(None);
            if !without_key.is_empty() {
                let why = "they have no key of their own (flynn-host status there says why)";
                notices.push(so(&without_key, why));
            }
            let silent = with(Some(false));
            if !silent.is_empty() {
                let why = format!(
                    "they have not answered yet. Are they up, and is UDP port {WIREGUARD_PORT} open between hosts?"
                );
                notices.push(so(&silent, &why));
            }
            notices
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wireguard.key");
        let get = |mode, direct| wanted(mode, direct, &path);
        assert!(get(Some(Mode::Off), false).unwrap().is_none() && !path.exists());
        assert!(
            get(None, true).unwrap().is_none(),
            "direct hosts are not slowed down unasked"
        );
        let first = get(None, false).unwrap().unwrap();
        assert!(!first.required);
        let required = get(Some(Mode::Required), true).unwrap().unwrap();
        assert!(required.required && required.key == first.key);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::write(&path, "c2VjcmV0").unwrap();
        let error = get(None, false).unwrap_err().to_string();
        assert!(
            error.contains("Remove the file") && !error.contains("c2VjcmV0"),
            "{error}"
        );
        std::fs::remove_file(&path).unwrap();
        assert_ne!(get(None, false).unwrap().unwrap().key, first.key);
    }

    #[test]
    fn who_is_not_encrypted_with_is_named() {
        let [a, b, c] = [1, 2, 3].map(|last| Ipv4Addr::new(192, 0, 2, last));
        let hosts = BTreeMap::from([("a", a), ("b", b), ("c", c)]);
        let none = BTreeMap::new();
        let key: flynn_overlay::Key = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=".parse().unwrap();
        let on = Wireguard::On(key);
        assert!(notices(&Wireguard::Off, false, &BTreeMap::new(), &none).is_empty());
        assert_eq!(
            notices(&Wireguard::Off, false, &hosts, &none),
            [crate::notices::PLAIN]
        );
        let all = BTreeMap::from([(a, true), (b, true), (c, true)]);
        assert!(notices(&on, false, &hosts, &all).is_empty());
        let some = BTreeMap::from([(a, true), (b, false)]);
        let said = notices(&on, false, &hosts, &some);
        assert!(
            said[0].starts_with("traffic is not encrypted with the hosts c: "),
            "{said:?}"
        );
        assert!(
            said[1].starts_with("traffic is not encrypted with the hosts b: "),
            "{said:?}"
        );
        let said = notices(&on, true, &hosts, &some);
        assert!(
            said[0].starts_with("no packets are exchanged with the hosts c: "),
            "{said:?}"
        );
        let why = Wireguard::Unavailable("no WireGuard".into());
        assert!(notices(&why, true, &hosts, &none)[0].contains("required and cannot be had (no WireGuard)"));
        assert!(notices(&why, false, &hosts, &none)[0].starts_with(crate::notices::PLAIN));
    }
}
