//! What a lab consists of, and the names and addresses that follow from it.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

/// The most hosts that a lab has.
pub const MOST_HOSTS: u8 = 5;

/// A lab that is to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LabConfig {
    /// Its name: 1 to 40 of `a-z`, `0-9` and `-`. Two labs of one name cannot be at once.
    pub name: String,
    /// Its state directory; must not exist yet and is removed in the end.
    pub dir: PathBuf,
    /// How many hosts, 1 to [`MOST_HOSTS`].
    pub hosts: u8,
    /// What each host starts when it boots, in this order.
    #[serde(default)]
    pub services: Vec<Service>,
    /// What each host sees elsewhere than the machine has it, read-only.
    #[serde(default)]
    pub binds: Vec<Bind>,
    /// Ports of the machine's loopback that lead to the hosts.
    #[serde(default)]
    pub forwards: Vec<Forward>,
    /// The size of each host's disk in bytes; sparse, so it costs what is written.
    #[serde(default = "default_disk")]
    pub disk: u64,
}

fn default_disk() -> u64 {
    16 << 30
}

/// A process that a host starts when it boots.
///
/// In its arguments and the values of its environment, `{host}`, `{address}` and `{address6}` stand for the host's
/// name and addresses.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Service {
    /// What the lab calls it.
    pub name: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Environment beside that of the lab.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// A file or directory of the machine, shown to hosts read-only.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bind {
    /// Where the machine has it.
    pub from: PathBuf,
    /// Where hosts have it; absolute, not below `/dev`, `/proc`, `/sys`.
    pub to: PathBuf,
}

/// A port of the machine that leads to the first host which takes the connection.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Forward {
    /// Where to listen; loopback only, port 0 for any.
    pub listen: SocketAddr,
    /// The hosts' port.
    pub port: u16,
}

impl LabConfig {
    /// A lab of this many hosts with nothing in it.
    pub fn new(name: impl Into<String>, dir: impl Into<PathBuf>, hosts: u8) -> Self {
        Self {
            name: name.into(),
            dir: dir.into(),
            hosts,
            services: Vec::new(),
            binds: Vec::new(),
            forwards: Vec::new(),
            disk: default_disk(),
        }
    }

    /// Says what is wrong with it.
    pub fn check(&self) -> Result<()> {
        check_name(&self.name)?;
        if self.hosts == 0 || self.hosts > MOST_HOSTS {
            bail!("a lab has 1 to {MOST_HOSTS} hosts, not {}", self.hosts);
        }
        if !self.dir.is_absolute() {
            bail!("the state directory {} is not absolute", self.dir.display());
        }
        if self.disk < 64 << 20 {
            bail!("a disk of {} bytes is too small; 64 MiB is the least", self.disk);
        }
        for (index, service) in self.services.iter().enumerate() {
            check_name(&service.name).context("a service's name")?;
            if service.command.is_empty() {
                bail!("the service {} has no command", service.name);
            }
            if self.services[..index]
                .iter()
                .any(|other| other.name == service.name)
            {
                bail!("two services are called {}", service.name);
            }
        }
        for bind in &self.binds {
            let special = ["/dev", "/proc", "/sys"]
                .iter()
                .any(|dir| bind.to.starts_with(dir));
            let climbs = bind
                .to
                .components()
                .any(|part| part == std::path::Component::ParentDir);
            if !bind.to.is_absolute() || special || climbs {
                bail!("nothing can be shown to hosts at {}", bind.to.display());
            }
        }
        if let Some(forward) = self
            .forwards
            .iter()
            .find(|forward| !forward.listen.ip().is_loopback())
        {
            bail!(
                "{} is not on the loopback; a lab listens nowhere else",
                forward.listen
            );
        }
        Ok(())
    }
}

/// Whether this can be a name, of which file, cgroup and interface names are made.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let letters = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name.is_empty() || name.len() > 40 || !name.bytes().all(letters) || name.starts_with('-') {
        bail!("{name:?} is not a name: 1 to 40 of a-z, 0-9 and -, not beginning with -");
    }
    Ok(())
}

/// The name of a host, by number from 1.
pub fn host_name(number: u8) -> String {
    format!("host{number}")
}

/// The address of a host (TEST-NET-1).
pub fn host_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, 10 + number)
}

/// The IPv6 address of a host (the documentation prefix).
pub fn host_address6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10 + u16::from(number))
}

/// The switch's own address, which is the hosts' way to nowhere.
pub(crate) const SWITCH_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_labs_are_refused() {
        let good = LabConfig::new("good-1", "/nowhere", 2);
        good.check().unwrap();
        let refused = |change: fn(&mut LabConfig)| {
            let mut lab = good.clone();
            change(&mut lab);
            lab.check().unwrap_err().to_string()
        };
        assert!(refused(|lab| lab.name = "../up".into()).contains("not a name"));
        assert!(refused(|lab| lab.hosts = 6).contains("1 to 5"));
        assert!(refused(|lab| lab.dir = "here".into()).contains("absolute"));
        assert!(refused(|lab| lab.disk = 1).contains("too small"));
        assert!(
            refused(|lab| lab.binds = vec![Bind {
                from: "/a".into(),
                to: "/etc/../proc".into()
            }])
            .contains("shown")
        );
        assert!(
            refused(|lab| lab.forwards = vec![Forward {
                listen: ([0, 0, 0, 0], 80).into(),
                port: 80
            }])
            .contains("loopback")
        );
    }
}
