//! The cluster's certificate authority as discoverd keeps it, and as it is shown.
//!
//! Roots overlap when they change: a new one is trusted everywhere before it signs, and the old one for as long as
//! anybody may hold a certificate of its. Besides, the old root certifies the new one ([`Retired::link`]); that goes
//! along with what the new one signs, so that whoever knows the old root alone can verify it.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{Digest, Meta};

/// Metadata of [`CA_SERVICE`](super::CA_SERVICE). Only `host:` certificates and discoverd itself may read it.
///
/// Version 1 was `cert` and `key` alone; members of that release go on reading these two.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterCa {
    /// The roots that are trusted, PEM. The first one signs.
    pub cert: String,
    /// Its key, PEM. Secret.
    pub key: String,
    /// What `cert` holds, with the facts; empty in version 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roots: Vec<Root>,
    /// Another root is wanted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub requested: bool,
    /// The change of roots that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<Rotation>,
    /// Roots that sign no more, the latest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retired: Vec<Retired>,
}

impl ClusterCa {
    /// A new cluster's.
    pub fn new(cert: impl Into<String>, key: impl Into<String>) -> Self {
        Self {
            cert: cert.into(),
            key: key.into(),
            roots: Vec::new(),
            requested: false,
            rotation: None,
            retired: Vec::new(),
        }
    }

    /// What goes along with a certificate that is signed now, PEM.
    pub fn links(&self) -> String {
        self.retired.iter().map(|retired| retired.link.as_str()).collect()
    }
}

impl std::fmt::Debug for ClusterCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterCa")
            .field("roots", &self.roots)
            .field("requested", &self.requested)
            .field("rotation", &self.rotation)
            .finish_non_exhaustive()
    }
}

/// A root certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// The digest of its DER.
    pub fingerprint: Digest,
    /// From when it is valid.
    pub not_before: Timestamp,
    /// Until when.
    pub not_after: Timestamp,
    /// PEM.
    pub cert: String,
}

/// A change of roots.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// How far it is.
    pub stage: Stage,
    /// Since when.
    pub since: Timestamp,
    /// The new root's key, as long as it does not sign. Secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The new root certified by the old one, PEM, as long as it does not sign.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
}

impl std::fmt::Debug for Rotation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rotation")
            .field("stage", &self.stage)
            .field("since", &self.since)
            .finish_non_exhaustive()
    }
}

/// How far a change of roots is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The old root signs; all are to trust the new one as well.
    Spread,
    /// The new root signs; certificates of the old one are renewed.
    Renew,
}

/// A root that signs no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    /// That root.
    pub root: Root,
    /// The one that came after it, certified by it, PEM.
    pub link: String,
    /// Until when hosts that know nothing newer find the way back by it.
    pub until: Timestamp,
}

/// What components trust, and who signed what they show.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Roots that all of them trust.
    pub trusts: BTreeSet<Digest>,
    /// Roots that signed the certificates of any of them.
    pub holds: BTreeSet<Digest>,
}

impl Held {
    const TRUSTS: &str = "trusts";
    const HOLDS: &str = "holds";

    /// Takes in what further components say.
    pub fn join(&mut self, other: &Self) {
        self.trusts = &self.trusts & &other.trusts;
        self.holds.extend(&other.holds);
    }

    /// As labels of the host's instance in [`CA_SERVICE`](super::CA_SERVICE), by which it tells discoverd's leader.
    pub fn to_meta(&self, host: &str) -> Meta {
        let list = |of: &BTreeSet<Digest>| of.iter().map(Digest::to_string).collect::<Vec<_>>().join(",");
        Meta::from([
            ("id".to_owned(), host.to_owned()),
            (Self::TRUSTS.to_owned(), list(&self.trusts)),
            (Self::HOLDS.to_owned(), list(&self.holds)),
        ])
    }

    /// Reads such labels; `None` when they say something else, or not all.
    pub fn of_meta(meta: &Meta) -> Option<(String, Self)> {
        let list = |name: &str| -> Option<BTreeSet<Digest>> {
            meta.get(name)?
                .split(',')
                .map(|digest| digest.parse().ok())
                .collect()
        };
        let held = Self {
            trusts: list(Self::TRUSTS)?,
            holds: list(Self::HOLDS)?,
        };
        Some((meta.get("id")?.clone(), held))
    }
}

/// How the cluster's certificate authority is (`GET /cluster/ca`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaStatus {
    /// The roots that are trusted, PEM.
    pub trusted: String,
    /// All roots that are of any use.
    pub roots: Vec<RootStatus>,
    /// Another root is wanted.
    #[serde(default)]
    pub requested: bool,
    /// The change of roots that is under way.
    #[serde(default)]
    pub rotation: Option<RotationStatus>,
    /// What the discoverd that answers has loaded.
    #[serde(default)]
    pub loaded: Option<Loaded>,
}

impl CaStatus {
    /// The fingerprints of the roots that are trusted.
    pub fn trusts(&self) -> BTreeSet<Digest> {
        let trusted = self.roots.iter().filter(|root| root.trusted);
        trusted.map(|root| root.fingerprint).collect()
    }

    /// The root that signs.
    pub fn signer(&self) -> Option<&RootStatus> {
        self.roots.iter().find(|root| root.signs)
    }

    /// Whether certificates and trust are as they should be now.
    pub fn fits(&self, held: &Held) -> bool {
        let signer: BTreeSet<Digest> = self.signer().map(|root| root.fingerprint).into_iter().collect();
        held.trusts == self.trusts() && held.holds == signer
    }
}

/// A root, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootStatus {
    /// The digest of its DER.
    pub fingerprint: Digest,
    /// From when it is valid.
    pub not_before: Timestamp,
    /// Until when.
    pub not_after: Timestamp,
    /// Whether it signs.
    pub signs: bool,
    /// Whether it is trusted. The others are there for hosts that were away and know nothing newer.
    pub trusted: bool,
}

/// A change of roots, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationStatus {
    /// How far it is.
    pub stage: Stage,
    /// Since when.
    pub since: Timestamp,
    /// What it waits for.
    #[serde(default)]
    pub waits: Vec<Wait>,
    /// When it waits no longer, whoever is missing.
    #[serde(default)]
    pub until: Option<Timestamp>,
}

/// What a change of roots waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    /// Which host.
    pub host: String,
    /// Whether it is there at all.
    pub away: bool,
    /// What is to happen.
    pub why: String,
}

/// The certificate that a component uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// The digest of its DER.
    pub certificate: Digest,
    /// Until when it is valid.
    pub not_after: Timestamp,
    /// What is trusted, and who signed it; `None` when that is unknown.
    pub held: Option<Held>,
}

/// Asks for a new certificate with one that may have run out (`POST /cluster/renew-late`, without a client's
/// certificate). The key proves who asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LateRequest {
    /// The host's certificate with what goes along with it, PEM.
    pub cert: String,
    /// A certificate signing request for the same key, PEM.
    pub csr: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_is_read_and_reads_the_next() {
        let ca: ClusterCa = serde_json::from_str(r#"{"cert": "C", "key": "K"}"#).unwrap();
        assert_eq!(ca, ClusterCa::new("C", "K"));
        assert_eq!(
            serde_json::to_value(&ca).unwrap(),
            serde_json::json!({ "cert": "C", "key": "K" })
        );
        assert!(!format!("{ca:?}").contains('K'));
    }

    #[test]
    fn what_is_held_is_told_as_labels() {
        let held = |trusts: &[&str], holds: &[&str]| {
            let set = |of: &[&str]| of.iter().map(|name| Digest::of(name.as_bytes())).collect();
            Held {
                trusts: set(trusts),
                holds: set(holds),
            }
        };
        let mut all = held(&["a", "b"], &["a"]);
        let meta = all.to_meta("h1");
        assert_eq!(Held::of_meta(&meta), Some(("h1".to_owned(), all.clone())));
        for name in ["id", "trusts", "holds"] {
            let mut less = meta.clone();
            less.remove(name);
            assert_eq!(Held::of_meta(&less), None);
        }
        assert_eq!(Held::of_meta(&held(&[], &["a"]).to_meta("h1")), None);
        all.join(&held(&["b"], &["b"]));
        assert_eq!(all, held(&["b"], &["a", "b"]));
    }
}
