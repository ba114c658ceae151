//! The network of this host.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Mutex, MutexGuard, PoisonError},
};

use flynn_dataplane::{
    Attachment, Container, Dataplane, DropReason, Drops, Prefix, Program, Traffic, VXLAN_PORT,
};
use tracing::info;

use crate::{
    address::{self, mac},
    config::NetworkConfig,
    error::{Error, Result},
    hosts::Host,
    masquerade,
    netlink::{Link, Netlink, Route},
    sysctl,
    wireguard::{self, Handshakes},
};

/// The device that carries the gateway address and the cluster's routes.
pub(crate) const DEVICE: &str = "flynn0";

/// What a tunnel adds to a packet: outer Ethernet, IPv4, UDP and VXLAN headers.
const TUNNEL_OVERHEAD: u32 = 50;

/// Where there is no uplink to ask.
const DEFAULT_MTU: u32 = 1500;

/// A container that has been attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address.
    pub address: Ipv4Addr,
    /// Its IPv6 address.
    pub address6: Option<Ipv6Addr>,
    /// Where it sends what is not for itself, and where DNS is.
    pub gateway: Ipv4Addr,
    /// The Ethernet address of its interface.
    pub mac: [u8; 6],
    /// The host's end of its veth.
    pub interface: String,
    /// The largest packet that it can send.
    pub mtu: u32,
}

/// What [`Network::reconcile`] has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Nobody's, and gone now.
    pub removed: Vec<Ipv4Addr>,
    /// Somebody's, but without an interface: attach them again.
    pub missing: Vec<Ipv4Addr>,
}

/// A hand on the cluster network of this host.
pub struct Network {
    pub(crate) config: NetworkConfig,
    pub(crate) mtu: u32,
    pub(crate) netlink: Netlink,
    /// The interface to the outside.
    pub(crate) uplink: Option<u32>,
    /// The other hosts, as they were last given. Until then, the maps have what an earlier process was given.
    pub(crate) hosts: tokio::sync::Mutex<Option<Vec<Host>>>,
    pub(crate) wireguard: wireguard::State,
    pub(crate) handshakes: Mutex<Handshakes>,
    /// Some host is yet to answer.
    pub(crate) unsettled: tokio::sync::Notify,
    /// The addresses that float between hosts, in the same way.
    pub(crate) floating: Mutex<Option<BTreeSet<IpAddr>>>,
    dataplane: Mutex<Dataplane>,
}

impl Network {
    /// Sets the network up, or takes hold of it where it is: what runs goes on undisturbed, with this build's programs.
    pub async fn up(mut config: NetworkConfig) -> Result<Self> {
        config.check()?;
        if config.cluster6.is_some() && !sysctl::has_ipv6() {
            info!("this machine has no IPv6, and so its containers will have none");
            config.cluster6 = None;
        }
        let dataplane = Dataplane::open(&config.pins)?;
        let netlink = Netlink::open().map_err(Error::kernel("opening a netlink socket"))?;
        let mut network = Self {
            config,
            mtu: DEFAULT_MTU,
            netlink,
            uplink: None,
            hosts: tokio::sync::Mutex::default(),
            wireguard: wireguard::State::Off,
            handshakes: Mutex::default(),
            unsettled: tokio::sync::Notify::new(),
            floating: Mutex::default(),
            dataplane: Mutex::new(dataplane),
        };
        if let Some(uplink) = network.find_uplink().await? {
            network.mtu = uplink.mtu;
            network.uplink = Some(uplink.index);
            if network.config.address.is_none() {
                let addresses = network.netlink.addresses(uplink.index).await;
                let addresses = addresses.map_err(Error::kernel("looking at the uplink"))?;
                network.config.address = addresses.first().copied();
            }
            network.accept_router_advertisements(&uplink.name)?;
        }
        network.forward()?;
        network.encrypt().await;
        network.device_up().await?;
        masquerade::install(&network.config).await?;
        network.take_in().await?;
        info!(gateway = %network.gateway(), subnet = %network.config.subnet, "the cluster network is up");
        Ok(network)
    }

    /// Takes all of it away: every container's interface, the device, the rules, the programs and the maps.
    pub async fn down(self) -> Result<()> {
        self.reconcile(&BTreeMap::new()).await?;
        self.netlink
            .remove_link(DEVICE)
            .await
            .map_err(Error::kernel(format!("removing {DEVICE}")))?;
        self.stop_encrypting().await?;
        masquerade::remove().await?;
        let dataplane = self
            .dataplane
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        Ok(dataplane.unpin()?)
    }

    /// The host's own address in the cluster network.
    pub fn gateway(&self) -> Ipv4Addr {
        self.config.gateway()
    }

    /// The networks, as they are used: without IPv6 where the machine has none.
    pub fn config(&self) -> &NetworkConfig {
        &self.config
    }

    /// Removes what belongs to none of the live containers and leaves the others alone, except that what was lost of
    /// them beside their interface is put back, and that each is allowed what is said here. A container which is being attached at the same time, and is not among
    /// the live, counts as a stray.
    pub async fn reconcile(&self, live: &BTreeMap<Ipv4Addr, Attachment>) -> Result<Reconciled> {
        let links = self
            .netlink
            .links()
            .await
            .map_err(Error::kernel("listing interfaces"))?;
        let with_link: BTreeMap<_, _> = links
            .iter()
            .filter_map(|link| Some((address::of_host_interface(&link.name)?, link.index)))
            .collect();
        let with_program: BTreeSet<_> = self
            .dataplane()
            .attached()?
            .iter()
            .filter_map(|(_, interface)| address::of_host_interface(interface))
            .collect();
        let with_entry: BTreeSet<_> = self
            .dataplane()
            .containers()?
            .iter()
            .map(|(container, _)| container.ipv4)
            .collect();

        let known = with_link.keys().chain(&with_program).chain(&with_entry);
        let strays: BTreeSet<_> = known
            .filter(|address| !live.contains_key(address))
            .copied()
            .collect();
        let mut found = Reconciled::default();
        for stray in strays {
            self.detach(stray).await?;
            found.removed.push(stray);
        }
        for (&address, attachment) in live {
            let Some(&index) = with_link.get(&address) else {
                found.missing.push(address);
                continue;
            };
            self.program(address, index, attachment, !with_program.contains(&address))?;
        }
        Ok(found)
    }

    /// How many packets were dropped for each reason.
    pub fn drops(&self) -> Result<Vec<(DropReason, u64)>> {
        Ok(self.dataplane().drops()?)
    }

    /// How many packets of each container that is attached were dropped.
    pub fn container_drops(&self) -> Result<BTreeMap<Ipv4Addr, Drops>> {
        Ok(self.dataplane().container_drops()?)
    }

    /// The containers that are attached, with what went through them.
    pub fn endpoints(&self) -> Result<Vec<(Container, Traffic)>> {
        Ok(self.dataplane().containers()?)
    }

    /// The data plane, for as long as a few system calls take.
    pub(crate) fn dataplane(&self) -> MutexGuard<'_, Dataplane> {
        self.dataplane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The largest packet that goes to other hosts.
    pub(crate) fn tunnel_mtu(&self) -> u32 {
        let encrypted = match &self.wireguard {
            wireguard::State::On { .. } => wireguard::OVERHEAD,
            _ => 0,
        };
        self.mtu.saturating_sub(TUNNEL_OVERHEAD + encrypted)
    }

    async fn find_uplink(&self) -> Result<Option<Link>> {
        match &self.config.uplink {
            Some(name) => {
                let link = self
                    .netlink
                    .link(name)
                    .await
                    .map_err(Error::kernel("looking for the uplink"))?;
                let missing = || Error::Config(format!("there is no interface {name} for an uplink"));
                link.ok_or_else(missing).map(Some)
            }
            None => self
                .netlink
                .default_link()
                .await
                .map_err(Error::kernel("looking for the default route")),
        }
    }

    /// A host that forwards takes its own routes from routers only where it is told to.
    fn accept_router_advertisements(&self, uplink: &str) -> Result<()> {
        let key = format!("ipv6/conf/{uplink}/accept_ra");
        match sysctl::get(&key).as_deref() {
            Some("1") if self.config.cluster6.is_some() => sysctl::set(&key, "2"),
            _ => Ok(()),
        }
    }

    fn forward(&self) -> Result<()> {
        sysctl::set("ipv4/ip_forward", "1")?;
        if self.config.cluster6.is_some() {
            sysctl::set("ipv6/conf/all/forwarding", "1")?;
        }
        Ok(())
    }

    fn configure_programs(&self, device: u32) -> Result<()> {
        let config = &self.config;
        let network = flynn_dataplane::Network {
            cluster4: Prefix {
                address: config.cluster.network(),
                length: config.cluster.prefix_len(),
            },
            cluster6: config.cluster6.map(|net| Prefix {
                address: net.network(),
                length: net.prefix_len(),
            }),
            gateway4: config.gateway(),
            gateway6: config.gateway6(),
            subnet_length: config.subnet.prefix_len(),
            address: config.address,
            tunnel_mtu: self.tunnel_mtu(),
            device: Some(device),
            gateway_mac: mac(config.gateway()),
        };
        Ok(self.dataplane().configure(&network)?)
    }

    async fn device_up(&self) -> Result<()> {
        let failed = |what: &str| Error::kernel(format!("{what} {DEVICE}"));
        let gateway_mac = mac(self.gateway());
        if let Some(link) = self.netlink.link(DEVICE).await.map_err(failed("looking for"))? {
            let addresses = self
                .netlink
                .addresses(link.index)
                .await
                .map_err(failed("looking at"))?;
            if addresses.iter().any(|&address| address != self.gateway()) {
                // From a time when the host had another subnet: routes go with it.
                self.netlink
                    .remove_link(DEVICE)
                    .await
                    .map_err(failed("removing"))?;
            }
        }
        if self
            .netlink
            .link(DEVICE)
            .await
            .map_err(failed("looking for"))?
            .is_none()
        {
            let failed = failed(&format!("making, on UDP port {VXLAN_PORT}, the VXLAN device"));
            self.netlink
                .add_vxlan(DEVICE, VXLAN_PORT, gateway_mac)
                .await
                .map_err(failed)?;
        }
        let link = self.netlink.link(DEVICE).await.map_err(failed("looking for"))?;
        let link = link.ok_or_else(|| failed("looking for")(std::io::ErrorKind::NotFound.into()))?;
        self.configure_programs(link.index)?;
        for program in [Program::ToOverlay, Program::FromTunnel] {
            self.dataplane().attach(program, DEVICE)?;
        }
        if self.config.cluster6.is_some() {
            self.netlink
                .without_link_local(link.index)
                .await
                .map_err(failed("configuring"))?;
        }
        self.netlink
            .up_without_arp(link.index, gateway_mac, self.mtu)
            .await
            .map_err(failed("taking up"))?;
        for address in self.gateways() {
            self.netlink
                .add_address(link.index, address)
                .await
                .map_err(failed("addressing"))?;
        }
        for route in self.device_routes(link.index) {
            self.netlink
                .add_route(route)
                .await
                .map_err(failed("routing the cluster's network by"))?;
        }
        Ok(())
    }

    /// Packets to containers of this host need no tunnel and may be larger than those to others'.
    fn device_routes(&self, link: u32) -> Vec<Route> {
        let config = &self.config;
        let to = |to, from, mtu| Route {
            to,
            link,
            via: None,
            from: Some(from),
            mtu,
        };
        let gateway = IpAddr::V4(config.gateway());
        let mut routes = vec![to(
            (config.subnet.network().into(), config.subnet.prefix_len()),
            gateway,
            None,
        )];
        if config.subnet != config.cluster {
            let cluster = (config.cluster.network().into(), config.cluster.prefix_len());
            routes.push(to(cluster, gateway, Some(self.tunnel_mtu())));
        }
        if let (Some(cluster6), Some(gateway6)) = (config.cluster6, config.gateway6()) {
            let cluster = (cluster6.network().into(), cluster6.prefix_len());
            routes.push(to(cluster, gateway6.into(), Some(self.tunnel_mtu())));
            routes.extend(config.subnet6().map(|subnet6| to(subnet6, gateway6.into(), None)));
        }
        routes
    }

    pub(crate) fn gateways(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let gateways = [
            Some(self.gateway().into()),
            self.config.gateway6().map(IpAddr::V6),
        ];
        gateways.into_iter().flatten()
    }
}
