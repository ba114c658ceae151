//! A container's way into the network and out of it.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::BorrowedFd,
    time::Duration,
};

use flynn_dataplane::{Attachment, Container, Program};
use tokio::runtime::{Handle, RuntimeFlavor};

use crate::{
    address::{host_interface, mac},
    error::{Error, Result},
    netlink::{Netlink, Route},
    network::{Endpoint, Network},
    sysctl,
};

/// How long an interface may take to start.
const PATIENCE: Duration = Duration::from_secs(5);

/// The container's only interface beside its loopback.
const CONTAINER_INTERFACE: &str = "eth0";

/// Does what may take the kernel some milliseconds, for it waits until all CPUs have done something else: others get this
/// thread's tasks meanwhile, where there are other threads.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

impl Network {
    /// Gives the network namespace of a container an interface with an address of this host's subnet.
    ///
    /// The container can send and receive when this returns. What an earlier attempt left under the same address is
    /// removed first; what this one made when it fails is removed again.
    pub async fn attach(
        &self,
        namespace: BorrowedFd<'_>,
        address: Ipv4Addr,
        attachment: &Attachment,
    ) -> Result<Endpoint> {
        self.config.check_container(address)?;
        self.detach(address).await?;
        match self.try_attach(namespace, address, attachment).await {
            Ok(endpoint) => Ok(endpoint),
            Err(error) => {
                // The first error tells more than what follows from it.
                if let Err(after) = self.detach(address).await {
                    tracing::warn!(%address, %after, "could not undo half an attachment");
                }
                Err(error)
            }
        }
    }

    /// Changes what a container that is attached may do.
    pub async fn change(&self, address: Ipv4Addr, attachment: &Attachment) -> Result<()> {
        let interface = host_interface(address);
        let failed = || Error::kernel(format!("looking for {interface}"));
        let link = self.netlink.link(&interface).await.map_err(failed())?;
        let index = link
            .ok_or_else(|| failed()(io::ErrorKind::NotFound.into()))?
            .index;
        self.program(address, index, attachment, false)
    }

    /// Takes a container's interface away. It is no error when it has none.
    pub async fn detach(&self, address: Ipv4Addr) -> Result<()> {
        let interface = host_interface(address);
        blocking(|| {
            let mut dataplane = self.dataplane();
            dataplane.remove(address, self.config.ipv6(address))?;
            dataplane.detach(Program::FromContainer, &interface)
        })?;
        let removed = self.netlink.remove_link(&interface).await;
        removed
            .map(drop)
            .map_err(Error::kernel(format!("removing {interface}")))
    }

    /// Has the host's end of a container's veth run the program and the program know the container.
    pub(crate) fn program(
        &self,
        address: Ipv4Addr,
        ifindex: u32,
        attachment: &Attachment,
        is_new: bool,
    ) -> Result<()> {
        let container = Container {
            ipv4: address,
            ipv6: self.config.ipv6(address),
            mac: mac(address),
            ifindex,
        };
        if is_new {
            blocking(|| {
                self.dataplane()
                    .attach(Program::FromContainer, &host_interface(address))
            })?;
        }
        Ok(self.dataplane().add(&container, attachment)?)
    }

    async fn try_attach(
        &self,
        namespace: BorrowedFd<'_>,
        address: Ipv4Addr,
        attachment: &Attachment,
    ) -> Result<Endpoint> {
        let interface = host_interface(address);
        let host_end = (interface.as_str(), mac(self.gateway()));
        let container_end = (CONTAINER_INTERFACE, mac(address), namespace);
        self.netlink
            .add_veth(host_end, container_end, self.mtu)
            .await
            .map_err(Error::kernel(format!(
                "making the interface of the container {address}"
            )))?;
        let failed = || Error::kernel(format!("looking for {interface}"));
        let link = self.netlink.link(&interface).await.map_err(failed())?;
        let index = link
            .ok_or_else(|| failed()(io::ErrorKind::NotFound.into()))?
            .index;
        self.program(address, index, attachment, true)?;
        self.open_host_end(&interface, index).await?;
        self.configure_container(namespace, address)
            .await
            .map_err(Error::kernel(format!(
                "configuring the network of the container {address}"
            )))?;
        self.wait_until_running(&interface).await?;
        Ok(Endpoint {
            address,
            address6: self.config.ipv6(address),
            gateway: self.gateway(),
            mac: mac(address),
            interface,
            mtu: self.mtu,
        })
    }

    async fn configure_container(&self, namespace: BorrowedFd<'_>, address: Ipv4Addr) -> io::Result<()> {
        let inside = Netlink::open_in(namespace).await?;
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let loopback = inside.link("lo").await?.ok_or_else(missing)?;
        let link = inside.link(CONTAINER_INTERFACE).await?.ok_or_else(missing)?.index;
        inside.up(loopback.index).await?;
        if self.config.cluster6.is_some() {
            inside.without_link_local(link).await?;
        }
        inside.up(link).await?;
        let addresses = [
            Some(IpAddr::V4(address)),
            self.config.ipv6(address).map(IpAddr::V6),
        ];
        for address in addresses.into_iter().flatten() {
            inside.add_address(link, address).await?;
        }
        for gateway in self.gateways() {
            inside.add_neighbour(link, gateway, mac(self.gateway())).await?;
            for route in self.container_routes(link, gateway) {
                inside.add_route(route).await?;
            }
        }
        Ok(())
    }

    /// What goes to other hosts may have to go through the tunnel; what stays on this one or leaves the cluster does not.
    fn container_routes(&self, link: u32, gateway: IpAddr) -> Vec<Route> {
        let to = |to, mtu| Route {
            to,
            link,
            via: Some(gateway),
            from: None,
            mtu,
        };
        let config = &self.config;
        let (anywhere, subnet, cluster) = match gateway {
            IpAddr::V4(_) => {
                let (cluster, subnet) = (config.cluster, config.subnet);
                let subnet = (subnet.network().into(), subnet.prefix_len());
                let cluster = (cluster.network().into(), cluster.prefix_len());
                (Ipv4Addr::UNSPECIFIED.into(), Some(subnet), Some(cluster))
            }
            IpAddr::V6(_) => {
                let cluster = config
                    .cluster6
                    .map(|net| (net.network().into(), net.prefix_len()));
                (Ipv6Addr::UNSPECIFIED.into(), config.subnet6(), cluster)
            }
        };
        let mut routes = vec![to((anywhere, 0), None)];
        let is_smaller = subnet != cluster;
        routes.extend(cluster.map(|cluster| to(cluster, Some(self.tunnel_mtu()))));
        routes.extend(subnet.filter(|_| is_smaller).map(|subnet| to(subnet, None)));
        routes
    }

    async fn open_host_end(&self, interface: &str, index: u32) -> Result<()> {
        let failed = || Error::kernel(format!("taking up {interface}"));
        // Packets come in here and answers go out by the overlay's device. The kernel lets that pass, whatever its
        // default is, where the check of return paths is loose and the interface has an address.
        sysctl::set(&format!("ipv4/conf/{interface}/rp_filter"), "2")?;
        self.netlink
            .add_address(index, self.gateway().into())
            .await
            .map_err(failed())?;
        if self.config.cluster6.is_some() {
            self.netlink.without_link_local(index).await.map_err(failed())?;
        }
        self.netlink.up(index).await.map_err(failed())
    }

    /// The kernel starts an interface some moments after its other end has come up, and until then drops what is sent.
    async fn wait_until_running(&self, interface: &str) -> Result<()> {
        let failed = || Error::kernel(format!("waiting for {interface}"));
        let running = async {
            loop {
                match self.netlink.link(interface).await? {
                    Some(link) if link.is_running => return Ok(()),
                    Some(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                    None => return Err(io::ErrorKind::NotFound.into()),
                }
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, running).await;
        in_time
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(failed())
    }
}
