//! Our own network: what `flynn-host` has on a host, without `flynn-host`.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use flynn_lab::netns;
use flynn_overlay::{Network, NetworkConfig};
use ipnet::Ipv4Net;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::load::Pair;

/// A host's network namespace and its BPF file system. The network itself is in the kernel.
pub(super) struct Host {
    pins: tempfile::TempDir,
    _namespace: OwnedFd,
}

impl Drop for Host {
    fn drop(&mut self) {
        // Where this fails, it goes with the process's mount namespace.
        let _ = unmount(self.pins.path(), UnmountFlags::DETACH);
    }
}

/// Two containers on one host.
pub(super) fn one_host() -> Result<(Pair, Host)> {
    let host = netns::make()?;
    let (client, server) = (netns::make()?, netns::make()?);
    let host = Host::up(host, 1, &[(&client, 2), (&server, 3)])?;
    let pair = Pair {
        name: "ours",
        client,
        server,
        address: address(1, 3),
    };
    Ok((pair, host))
}

impl Host {
    /// Brings the network up in a namespace, with these containers.
    fn up(namespace: OwnedFd, number: u8, containers: &[(&OwnedFd, u8)]) -> Result<Self> {
        let pins = tempfile::tempdir()?;
        mount("bpf", pins.path(), "bpf", MountFlags::empty(), None).context("mounting a BPF file system")?;
        let config = NetworkConfig {
            cluster: Ipv4Net::new(Ipv4Addr::new(100, 100, 0, 0), 16)?,
            cluster6: Some(NetworkConfig::DEFAULT_CLUSTER6),
            subnet: Ipv4Net::new(address(number, 0), 24)?,
            pins: pins.path().join("flynn"),
            uplink: None,
        };
        netns::inside(namespace.as_fd(), || {
            netns::ip("link set lo up\n")?;
            crate::inside::runtime()?.block_on(async {
                let network = Network::up(config).await?;
                for (container, last) in containers {
                    network.attach(container.as_fd(), address(number, *last)).await?;
                }
                Ok(())
            })
        })?;
        Ok(Self {
            pins,
            _namespace: namespace,
        })
    }
}

/// An address in a host's subnet.
fn address(host: u8, last: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 100, host, last)
}
