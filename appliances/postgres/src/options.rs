//! What the environment says.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use flynn_api::Meta;
use flynn_api::discovery::{Instance, PORT as DISCOVERD_PORT};

use crate::Error;

/// The service that the peers register as.
pub const SERVICE: &str = "postgres";

/// The label that carries a peer's identity.
pub const IDENTITY_LABEL: &str = "POSTGRES_ID";

/// Labels that are taken over from the environment.
const LABELS: [&str; 6] = [
    "FLYNN_APP_ID",
    "FLYNN_APP_NAME",
    "FLYNN_RELEASE_ID",
    "FLYNN_PROCESS_TYPE",
    "FLYNN_JOB_ID",
    "FLYNN_HOST_ID",
];

/// How to run.
#[derive(Clone)]
pub struct Options {
    /// The data volume.
    pub data: PathBuf,
    /// Where PostgreSQL's programs are.
    pub programs: PathBuf,
    /// The address that peers and clients reach this one at.
    pub address: IpAddr,
    /// The server's port; status is one above it.
    pub port: u16,
    /// The administrator's password.
    pub password: String,
    /// Discoverd for this host's containers: plain, for the registration.
    pub discoverd: String,
    /// Discoverd's cluster port: mutual TLS, for the cluster's state.
    pub cluster: String,
    /// Where the identity for mutual TLS is; `None` where the cluster port is plain.
    pub identity: Option<PathBuf>,
    /// Labels of the registration.
    pub labels: Meta,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("data", &self.data)
            .field("address", &self.address)
            .field("port", &self.port)
            .field("discoverd", &self.discoverd)
            .field("cluster", &self.cluster)
            .field("labels", &self.labels)
            .finish_non_exhaustive()
    }
}

impl Options {
    /// Reads the process's environment; the error names every variable that is wrong.
    pub fn from_env() -> Result<Self, Error> {
        Self::read(|name| std::env::var(name).ok())
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let mut wrong = Vec::new();
        let mut required = |name: &str| {
            let value = variable(name).filter(|value| !value.is_empty());
            if value.is_none() {
                wrong.push(format!("{name} is not set"));
            }
            value.unwrap_or_default()
        };
        let password = required("POSTGRES_PASSWORD");
        let discoverd = required("DISCOVERD");
        let host = required("HOST_IP");
        let address = required("EXTERNAL_IP");
        let address: Option<IpAddr> = address.parse().ok();
        let port = variable("PORT").map_or(Some(5432), |port| port.parse().ok());
        if variable("SINGLETON").is_none_or(|value| value != "true") {
            wrong.push("SINGLETON is not `true`, and this release runs singletons only".into());
        }
        match (address, port) {
            (Some(address), Some(port)) if wrong.is_empty() && (1..u16::MAX).contains(&port) => Ok(Self {
                data: "/data".into(),
                programs: "/usr/lib/postgresql/15/bin".into(),
                address,
                port,
                password,
                discoverd,
                cluster: format!("https://{host}:{DISCOVERD_PORT}"),
                identity: Some("/etc/flynn/tls".into()),
                labels: LABELS
                    .iter()
                    .filter_map(|name| Some(((*name).to_owned(), variable(name)?)))
                    .collect(),
            }),
            _ => {
                if address.is_none() && !wrong.iter().any(|why| why.starts_with("EXTERNAL_IP")) {
                    wrong.push("EXTERNAL_IP is not an address".into());
                }
                if port.is_none_or(|port| !(1..u16::MAX).contains(&port)) {
                    wrong.push("PORT is not a port with one above it for status".into());
                }
                Err(Error::Options(wrong))
            }
        }
    }

    /// This peer as discoverd shall know it.
    pub(crate) fn instance(&self, id: &str) -> Instance {
        let mut labels = self.labels.clone();
        labels.insert(IDENTITY_LABEL.to_owned(), id.to_owned());
        Instance::new("tcp", self.server().to_string(), labels)
    }

    /// Where the server listens.
    pub(crate) fn server(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Options, Error> {
        let variables: BTreeMap<_, _> = variables.iter().copied().collect();
        Options::read(|name| variables.get(name).map(|value| (*value).to_owned()))
    }

    const GOOD: [(&str, &str); 6] = [
        ("POSTGRES_PASSWORD", "hush"),
        ("DISCOVERD", "http://100.100.1.1:1111"),
        ("HOST_IP", "192.0.2.1"),
        ("EXTERNAL_IP", "100.100.1.9"),
        ("SINGLETON", "true"),
        ("FLYNN_APP_NAME", "postgres"),
    ];

    #[test]
    fn a_whole_environment_is_taken_and_its_password_never_shown() {
        let options = read(&GOOD).unwrap();
        assert_eq!(options.cluster, "https://192.0.2.1:1111");
        let instance = options.instance("me");
        assert_eq!(instance.addr, "100.100.1.9:5432");
        assert_eq!(instance.meta[IDENTITY_LABEL], "me");
        assert_eq!(instance.meta["FLYNN_APP_NAME"], "postgres");
        assert!(!format!("{options:?}").contains("hush"));
    }

    #[test]
    fn every_fault_of_the_environment_is_named_at_once() {
        let error = read(&[("PORT", "65535"), ("EXTERNAL_IP", "here")])
            .unwrap_err()
            .to_string();
        for name in [
            "POSTGRES_PASSWORD",
            "DISCOVERD",
            "HOST_IP",
            "EXTERNAL_IP",
            "PORT",
            "SINGLETON",
        ] {
            assert!(error.contains(name), "{name} is missing in: {error}");
        }
    }
}
