//! What discoverd is told at its start.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use flynn_api::discovery::PORT;

use crate::dns::Upstreams;
use crate::raft::Timing;

/// The port of DNS.
const DNS_PORT: u16 = 53;

/// discoverd's settings.
#[derive(Clone, Debug)]
pub struct Options {
    /// The data directory (`DISCOVERD_DATA`; `/data`).
    pub data: PathBuf,
    /// This host (`HOST_ID`).
    pub host_id: String,
    /// Its address (`HOST_IP`): the cluster listener is there.
    pub host_ip: Ipv4Addr,
    /// Where certificate and CA are (`/etc/flynn/tls`).
    pub tls: PathBuf,
    /// Make a new cluster if the store is empty (`DISCOVERD_INIT=true`).
    pub init: bool,
    /// Join the cluster of these members if the store is empty (`DISCOVERD_JOIN=address:1111,…`).
    pub join: Vec<String>,
    /// Who answers the names that are not ours (`DNS_UPSTREAMS=address,…`; those of `/etc/resolv.conf`).
    pub upstreams: Upstreams,
    /// The port of the API, on the host's and on the gateway's address.
    pub api_port: u16,
    /// The port of DNS.
    pub dns_port: u16,
    /// Times and sizes that members keep to (`DISCOVERD_REPLACE_AFTER=seconds`: until a silent voter is replaced; 60).
    pub timing: Timing,
}

impl Options {
    /// From the environment.
    pub fn from_env() -> anyhow::Result<Self> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// From what `lookup` gives for a variable's name; the empty value stands for none.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> anyhow::Result<Self> {
        let find = |name: &str| lookup(name).filter(|value| !value.trim().is_empty());
        let need = |name: &str| {
            find(name).with_context(|| format!("{name} is not set: the host sets it for each job"))
        };
        let init = match find("DISCOVERD_INIT").as_deref() {
            None | Some("false" | "0") => false,
            Some("true" | "1") => true,
            Some(other) => bail!("DISCOVERD_INIT is {other:?}: it must be true or false"),
        };
        let join = find("DISCOVERD_JOIN").unwrap_or_default();
        let join = list(&join).map(|addr| {
            with_port(addr, PORT)
                .map(|addr| addr.to_string())
                .context("DISCOVERD_JOIN")
        });
        let upstreams = match find("DNS_UPSTREAMS") {
            Some(given) => {
                let given = list(&given).map(|addr| with_port(addr, DNS_PORT).context("DNS_UPSTREAMS"));
                Upstreams::new(given.collect::<anyhow::Result<_>>()?)
            }
            None => {
                Upstreams::of_resolv_conf(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
            }
        };
        let mut timing = Timing::default();
        if let Some(seconds) = find("DISCOVERD_REPLACE_AFTER") {
            let seconds = seconds
                .parse()
                .ok()
                .filter(|seconds| (15..=86_400).contains(seconds));
            timing.replace = Duration::from_secs(
                seconds.context("DISCOVERD_REPLACE_AFTER must be a number of seconds from 15 to 86400")?,
            );
        }
        let host_ip = need("HOST_IP")?;
        let host_ip = host_ip
            .parse()
            .with_context(|| format!("HOST_IP is {host_ip:?}: it must be an IPv4 address"))?;
        Ok(Self {
            data: find("DISCOVERD_DATA")
                .unwrap_or_else(|| "/data".to_owned())
                .into(),
            host_id: need("HOST_ID")?,
            host_ip,
            tls: "/etc/flynn/tls".into(),
            init,
            join: join.collect::<anyhow::Result<_>>()?,
            upstreams,
            api_port: PORT,
            dns_port: DNS_PORT,
            timing,
        })
    }
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

fn with_port(text: &str, port: u16) -> anyhow::Result<SocketAddr> {
    let addr = text
        .parse()
        .or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, port)));
    addr.with_context(|| format!("{text:?} is not an address with or without a port"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(pairs: &[(&str, &str)]) -> anyhow::Result<Options> {
        Options::from_lookup(|name| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_environment_is_read() {
        let base = [("HOST_ID", "h1"), ("HOST_IP", "192.0.2.1")];
        let read = options(&base).unwrap();
        assert!(!read.init && read.join.is_empty() && read.data.ends_with("data"));
        let join = [
            &base[..],
            &[
                ("DISCOVERD_JOIN", "192.0.2.2, 192.0.2.3:7"),
                ("DISCOVERD_INIT", "true"),
            ],
        ]
        .concat();
        let read = options(&join).unwrap();
        assert_eq!(read.join, ["192.0.2.2:1111", "192.0.2.3:7"]);
        assert!(read.init);
    }

    #[test]
    fn mistakes_are_named() {
        let base = [("HOST_ID", "h1"), ("HOST_IP", "192.0.2.1")];
        for (name, value) in [
            ("HOST_IP", "x"),
            ("DISCOVERD_INIT", "maybe"),
            ("DNS_UPSTREAMS", "dns.example"),
            ("DISCOVERD_REPLACE_AFTER", "1"),
        ] {
            let wrong = [&[(name, value)], &base[..]].concat();
            let error = format!("{:#}", options(&wrong).unwrap_err());
            assert!(error.contains(name), "{error}");
        }
        assert!(options(&[]).unwrap_err().to_string().contains("HOST_IP"));
    }
}
