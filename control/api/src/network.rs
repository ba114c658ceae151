//! The documents of the cluster network: what the hosts agree on, as metadata of services in discoverd.
//!
//! | service | document | written by | when |
//! | --- | --- | --- | --- |
//! | [`HOST_SERVICE`](crate::discovery::HOST_SERVICE) | [`NetworkLeases`](crate::discovery::NetworkLeases) | hosts | a host joins, starts, is removed |
//! | [`IDENTITIES_SERVICE`] | [`NetworkIdentities`] | hosts | an app's first job starts |
//! | [`POLICY_SERVICE`] | [`NetworkPolicy`] | the scheduler that leads | an app's labels change |
//! | [`endpoints_service`] | [`HostEndpoints`] | its host | a job gets or loses its address |
//!
//! Each is changed by compare-and-swap and watched by every host, which keeps what it saw last on its disk.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::controller::App;
use crate::{Error, ErrorCode, Meta, Result};

/// The service whose metadata holds the [`NetworkIdentities`].
pub const IDENTITIES_SERVICE: &str = "flynn-identities";

/// The service whose metadata holds the [`NetworkPolicy`].
pub const POLICY_SERVICE: &str = "flynn-policy";

/// What the names of services begin with whose metadata hold [`HostEndpoints`].
pub const ENDPOINTS_PREFIX: &str = "flynn-endpoints-";

/// The form of these documents.
pub const VERSION: u32 = 1;

/// The service whose metadata holds the endpoints of the host with this subnet: no two hosts ever share one.
pub fn endpoints_service(subnet: &str) -> String {
    let subnet: String = subnet
        .chars()
        .map(|c| if c.is_ascii_digit() { c } else { '-' })
        .collect();
    format!("{ENDPOINTS_PREFIX}{subnet}")
}

/// The identity of what is not in the cluster.
pub const OUTSIDE: u32 = 0;
/// The identity of hosts, and of what runs in their network.
pub const HOST: u32 = 1;
/// The identity of jobs that belong to no app: an operator's own.
pub const OPERATOR: u32 = 2;
/// The first identity that is given to an app.
const FIRST_APP: u32 = 16;
/// The last: packets between hosts carry it in 24 bits.
const LAST_APP: u32 = (1 << 24) - 1;

/// The number by which the data plane knows each app, the same on all hosts. A number is never given twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkIdentities {
    /// The form of this document.
    pub version: u32,
    /// The next number to give.
    pub next: u32,
    /// By app id.
    pub apps: BTreeMap<String, u32>,
    /// Ids of the apps that belong to the platform: ordinary jobs reach only those of their ports that have a service,
    /// and they alone reach all ports of hosts.
    #[serde(default)]
    pub system: BTreeSet<String>,
}

impl Default for NetworkIdentities {
    fn default() -> Self {
        Self {
            version: VERSION,
            next: FIRST_APP,
            apps: BTreeMap::new(),
            system: BTreeSet::new(),
        }
    }
}

impl NetworkIdentities {
    /// The number of an app whose jobs are of the platform or not, if both are known.
    pub fn find(&self, app: &str, system: bool) -> Option<u32> {
        let known = !system || self.system.contains(app);
        self.apps.get(app).copied().filter(|_| known)
    }

    /// The number of an app, given now if it had none.
    pub fn assign(&mut self, app: &str, system: bool) -> Result<u32> {
        if system {
            self.system.insert(app.to_owned());
        }
        if let Some(identity) = self.apps.get(app) {
            return Ok(*identity);
        }
        let highest = self.apps.values().max().map_or(0, |highest| highest + 1);
        let identity = self.next.max(highest).max(FIRST_APP);
        if identity > LAST_APP {
            return Err(Error::new(
                ErrorCode::LimitExceeded,
                "all identities of the cluster network are given: a cluster can have had 16 million apps",
            ));
        }
        self.apps.insert(app.to_owned(), identity);
        self.next = identity + 1;
        Ok(identity)
    }
}

/// Which apps may speak to which.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPolicy {
    /// The form of this document.
    pub version: u32,
    /// By app id. An app that is not named is open to all others.
    pub apps: BTreeMap<String, AppPolicy>,
    /// Ports of hosts that routes lead to: every job reaches them.
    #[serde(default)]
    pub routed: BTreeSet<u16>,
}

impl Default for NetworkPolicy {
    fn default() -> Self {
        Self {
            version: VERSION,
            apps: BTreeMap::new(),
            routed: BTreeSet::new(),
        }
    }
}

impl NetworkPolicy {
    /// What the labels of all apps, and the ports of all routes, add up to.
    pub fn of<'a>(apps: impl IntoIterator<Item = &'a App>, routed: impl IntoIterator<Item = u16>) -> Self {
        let apps = apps
            .into_iter()
            .map(|app| (app.id.clone(), AppPolicy::of(&app.meta)));
        Self {
            version: VERSION,
            apps: apps.filter(|(_, policy)| policy.isolated).collect(),
            routed: routed.into_iter().collect(),
        }
    }

    /// Whether jobs of two apps may speak to each other: whoever of them is isolated must name the other.
    pub fn allows(&self, one: &str, other: &str) -> bool {
        let names = |from: &str, to: &str| {
            self.apps
                .get(from)
                .is_none_or(|policy| !policy.isolated || policy.allow.contains(to))
        };
        one == other || (names(one, other) && names(other, one))
    }
}

/// Whom an app's jobs may speak to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppPolicy {
    /// Only hosts (and so the router), itself and the apps of `allow`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub isolated: bool,
    /// Ids of apps that an isolated app speaks to, and that speak to it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub allow: BTreeSet<String>,
}

impl AppPolicy {
    /// The label of apps that are isolated: `true`.
    pub const ISOLATED: &str = "flynn-network-isolated";
    /// The label with the ids of the apps that an isolated app speaks to, with commas between them.
    pub const ALLOW: &str = "flynn-network-allow";

    /// By an app's labels.
    pub fn of(labels: &Meta) -> Self {
        let allow = labels.get(Self::ALLOW).map_or("", String::as_str);
        Self {
            isolated: labels.get(Self::ISOLATED).is_some_and(|value| value == "true"),
            allow: allow
                .split(',')
                .map(str::trim)
                .filter(|id| !id.is_empty())
                .map(str::to_owned)
                .collect(),
        }
    }

    /// Puts isolation and allow-list into an app's labels.
    pub fn write(&self, labels: &mut Meta) {
        let mut set = |name: &str, value: Option<String>| match value {
            Some(value) => drop(labels.insert(name.to_owned(), value)),
            None => drop(labels.remove(name)),
        };
        set(Self::ISOLATED, self.isolated.then(|| "true".to_owned()));
        let allow: Vec<&str> = self.allow.iter().map(String::as_str).collect();
        set(Self::ALLOW, (!allow.is_empty()).then(|| allow.join(",")));
    }
}

/// The endpoints of one host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostEndpoints {
    /// The form of this document.
    pub version: u32,
    /// The host's id.
    pub host: String,
    /// The identity of each container by its address.
    pub identities: BTreeMap<Ipv4Addr, u32>,
    /// How others encrypt what they send to the host; absent where it wants or can do no such thing. It stands here and
    /// not with the leases, which every host writes: one of an older version would leave it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wireguard: Option<WireguardPeer>,
}

/// A host as WireGuard knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardPeer {
    /// Its public key, in base64.
    pub key: String,
    /// Its UDP port.
    pub port: u16,
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn no_two_apps_share_an_identity(apps in vec("[a-e]", 1..40)) {
            let mut identities = NetworkIdentities::default();
            for app in &apps {
                let given = identities.assign(app, false).unwrap();
                prop_assert!(given >= FIRST_APP);
                prop_assert_eq!(identities.assign(app, true).unwrap(), given);
            }
            let distinct: BTreeSet<_> = identities.apps.values().collect();
            prop_assert_eq!(distinct.len(), identities.apps.len());
        }

        #[test]
        fn policy_survives_the_labels(isolated: bool, allow in vec("[a-f0-9-]{1,36}", 0..5)) {
            let policy = AppPolicy { isolated, allow: allow.into_iter().collect() };
            let mut labels = Meta::from([("other".to_owned(), "kept".to_owned())]);
            policy.write(&mut labels);
            prop_assert_eq!(AppPolicy::of(&labels), policy);
            AppPolicy::default().write(&mut labels);
            prop_assert_eq!(labels.len(), 1);
        }
    }

    #[test]
    fn a_removed_identity_is_not_given_again() {
        let mut identities = NetworkIdentities::default();
        let first = identities.assign("a", false).unwrap();
        identities.apps.clear();
        assert_ne!(identities.assign("b", false).unwrap(), first);
        identities.next = LAST_APP + 1;
        assert!(identities.assign("c", false).is_err());
    }

    #[test]
    fn both_sides_have_a_say() {
        let isolated = |allow: &[&str]| AppPolicy {
            isolated: true,
            allow: allow.iter().map(|id| (*id).to_owned()).collect(),
        };
        let apps = [
            ("web", isolated(&["db"])),
            ("db", AppPolicy::default()),
            ("safe", isolated(&[])),
            ("pal", isolated(&["safe", "web"])),
        ];
        let policy = NetworkPolicy {
            apps: apps.map(|(id, policy)| (id.to_owned(), policy)).into(),
            ..NetworkPolicy::default()
        };
        assert!(policy.allows("web", "db") && policy.allows("db", "web") && policy.allows("safe", "safe"));
        assert!(policy.allows("db", "any") && !policy.allows("web", "any"));
        assert!(
            !policy.allows("pal", "safe") && !policy.allows("safe", "pal") && !policy.allows("pal", "web")
        );
    }

    #[test]
    fn endpoints_of_hosts_without_encryption_are_read() {
        let older = r#"{"version":1,"host":"a","identities":{"100.100.1.2":16}}"#;
        let endpoints: HostEndpoints = serde_json::from_str(older).unwrap();
        assert_eq!(endpoints.wireguard, None);
        assert_eq!(serde_json::to_string(&endpoints).unwrap(), older);
    }

    #[test]
    fn names_of_endpoint_services_are_names() {
        assert_eq!(
            endpoints_service("100.100.12.0/24"),
            "flynn-endpoints-100-100-12-0-24"
        );
    }
}
