//! The few changes to the kernel's network configuration that we make, by rtnetlink.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
};

use futures::{Stream, StreamExt, TryStreamExt};
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan, LinkWireguard, MulticastGroup,
    RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags},
        link::{
            AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoVeth, LinkAttribute, LinkMessage, State,
        },
        route::{RouteAddress, RouteAttribute, RouteMetric, RouteScope, RouteType},
    },
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::{
    runtime,
    sync::{Mutex, oneshot},
};

/// A socket to the kernel, in one network namespace.
#[derive(Clone, Debug)]
pub(crate) struct Netlink {
    handle: Handle,
    /// The kernel lists one thing at a time to a socket, and refuses a second question meanwhile.
    listing: Arc<Mutex<()>>,
}

/// What we want to know of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) mtu: u32,
    /// It is up, and what it is connected to is, too.
    pub(crate) is_running: bool,
}

/// A route to be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Route {
    /// Where to: an address and how many of its bits count.
    pub(crate) to: (IpAddr, u8),
    /// By which interface.
    pub(crate) link: u32,
    /// By which neighbour; without one, everybody there is a neighbour.
    pub(crate) via: Option<IpAddr>,
    /// Which address the host takes for itself.
    pub(crate) from: Option<IpAddr>,
    /// The largest packet, where it is not the interface's.
    pub(crate) mtu: Option<u32>,
}

/// The way to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WayTo {
    /// By which interface.
    pub(crate) link: u32,
    /// By which router.
    pub(crate) via: Option<Ipv4Addr>,
    /// From which address.
    pub(crate) source: Ipv4Addr,
}

/// Something for each change of an interface, an address or a route.
pub(crate) fn changes() -> io::Result<impl Stream<Item = ()> + Unpin + use<>> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Ifaddr,
    ];
    let (connection, _, messages) = rtnetlink::new_multicast_connection(&groups)?;
    tokio::spawn(connection);
    Ok(messages.map(drop))
}

impl Netlink {
    /// A socket in the process's own namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self {
            handle,
            listing: Arc::default(),
        })
    }

    /// A socket in another namespace. A socket stays where it was made, so only making it is done there: by a thread of
    /// its own, since none of the runtime's may ever be in a namespace that is not the process's.
    pub(crate) async fn open_in(namespace: BorrowedFd<'_>) -> io::Result<Self> {
        let namespace = namespace.try_clone_to_owned()?;
        let runtime = runtime::Handle::current();
        let (sender, receiver) = oneshot::channel();
        std::thread::Builder::new().name("netns".into()).spawn(move || {
            let open = || {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                let _runtime = runtime.enter();
                Self::open()
            };
            // Nobody waits any more when the caller was cancelled.
            let _ = sender.send(open());
        })?;
        receiver
            .await
            .map_err(|_| io::Error::other("the thread that enters the namespace died"))?
    }

    /// An interface by its name.
    pub(crate) async fn link(&self, name: &str) -> io::Result<Option<Link>> {
        let found = self
            .handle
            .link()
            .get()
            .match_name(name)
            .execute()
            .try_next()
            .await;
        match found.map_err(to_io) {
            Ok(message) => Ok(message.map(link_of)),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All interfaces.
    pub(crate) async fn links(&self) -> io::Result<Vec<Link>> {
        let _listing = self.listing.lock().await;
        self.handle
            .link()
            .get()
            .execute()
            .map_ok(link_of)
            .try_collect()
            .await
            .map_err(to_io)
    }

    /// The interface of the default route.
    pub(crate) async fn default_link(&self) -> io::Result<Option<Link>> {
        let listing = self.listing.lock().await;
        let mut routes = self
            .handle
            .route()
            .get(RouteMessageBuilder::<Ipv4Addr>::new().build())
            .execute();
        let mut found = None;
        while let Some(route) = routes.try_next().await.map_err(to_io)? {
            let is_default = route.header.destination_prefix_length == 0 && route.header.table == 254;
            let by = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            });
            if is_default && found.is_none() {
                found = by;
            }
        }
        drop(listing);
        let links = self.links().await?;
        Ok(links.into_iter().find(|link| Some(link.index) == found))
    }

    /// Makes a VXLAN device which leaves it to eBPF programs where packets go to, and tells them where they came from.
    pub(crate) async fn add_vxlan(&self, name: &str, port: u16, mac: [u8; 6]) -> io::Result<()> {
        let device = LinkVxlan::new(name, 0)
            .collect_metadata(true)
            .learning(false)
            .port(port)
            .address(mac.into())
            .build();
        self.handle.link().add(device).execute().await.map_err(to_io)
    }

    /// Makes a WireGuard device.
    pub(crate) async fn add_wireguard(&self, name: &str) -> io::Result<()> {
        let device = LinkWireguard::new(name).build();
        self.handle.link().add(device).execute().await.map_err(to_io)
    }

    /// Makes a veth whose peer begins its life in another namespace. Both ends are down.
    pub(crate) async fn add_veth(
        &self,
        (name, mac): (&str, [u8; 6]),
        (peer, peer_mac, namespace): (&str, [u8; 6], BorrowedFd<'_>),
        mtu: u32,
    ) -> io::Result<()> {
        let peer = LinkMessageBuilder::<LinkUnspec>::default()
            .name(peer)
            .address(peer_mac.into())
            .mtu(mtu)
            .setns_by_fd(namespace.as_raw_fd())
            .build();
        let veth = LinkMessageBuilder::<LinkVeth>::new(name, "")
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .address(mac.into())
            .mtu(mtu)
            .build();
        self.handle.link().add(veth).execute().await.map_err(to_io)
    }

    /// Removes an interface: whether there was one.
    pub(crate) async fn remove_link(&self, name: &str) -> io::Result<bool> {
        let Some(link) = self.link(name).await? else {
            return Ok(false);
        };
        match self.handle.link().del(link.index).execute().await.map_err(to_io) {
            Ok(()) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Keeps an interface from making itself an IPv6 address when it goes up.
    pub(crate) async fn without_link_local(&self, link: u32) -> io::Result<()> {
        let mode = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        self.set(
            LinkUnspec::new_with_index(link)
                .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![mode]))
                .build(),
        )
        .await
    }

    /// Takes an interface up, where it is not.
    pub(crate) async fn up(&self, link: u32) -> io::Result<()> {
        self.set(LinkUnspec::new_with_index(link).up().build()).await
    }

    /// Sets the largest packet of an interface and takes it up.
    pub(crate) async fn up_with_mtu(&self, link: u32, mtu: u32) -> io::Result<()> {
        self.set(LinkUnspec::new_with_index(link).mtu(mtu).up().build())
            .await
    }

    /// Sets the Ethernet address and the largest packet of an interface on which nobody asks for neighbours, and takes it up.
    pub(crate) async fn up_without_arp(&self, link: u32, mac: [u8; 6], mtu: u32) -> io::Result<()> {
        self.set(
            LinkUnspec::new_with_index(link)
                .address(mac.into())
                .mtu(mtu)
                .arp(false)
                .up()
                .build(),
        )
        .await
    }

    /// Gives an interface an address and nothing of the network around it.
    pub(crate) async fn add_address(&self, link: u32, address: IpAddr) -> io::Result<()> {
        let mut request = self
            .handle
            .address()
            .add(link, address, host_bits(address))
            .replace();
        if address.is_ipv6() {
            // Nobody else can have it.
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        request.execute().await.map_err(to_io)
    }

    /// The IPv4 addresses of an interface.
    pub(crate) async fn addresses(&self, link: u32) -> io::Result<Vec<Ipv4Addr>> {
        let _listing = self.listing.lock().await;
        let addresses = self.handle.address().get().set_link_index_filter(link).execute();
        let addresses: Vec<_> = addresses.try_collect().await.map_err(to_io)?;
        let of = |attribute| match attribute {
            AddressAttribute::Address(IpAddr::V4(address)) => Some(address),
            _ => None,
        };
        Ok(addresses
            .into_iter()
            .flat_map(|message| message.attributes)
            .filter_map(of)
            .collect())
    }

    /// All addresses that this host has.
    pub(crate) async fn all_addresses(&self) -> io::Result<Vec<IpAddr>> {
        let _listing = self.listing.lock().await;
        let addresses = self.handle.address().get().execute();
        let addresses: Vec<_> = addresses.try_collect().await.map_err(to_io)?;
        let of = |attribute| match attribute {
            AddressAttribute::Address(address) | AddressAttribute::Local(address) => Some(address),
            _ => None,
        };
        Ok(addresses
            .into_iter()
            .flat_map(|message| message.attributes)
            .filter_map(of)
            .collect())
    }

    /// The way that the kernel's routes have to an address, if they have one.
    pub(crate) async fn way_to(&self, address: Ipv4Addr) -> io::Result<Option<WayTo>> {
        let message = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .build();
        let found = self.handle.route().get(message).execute().try_next().await;
        let route = match found.map_err(to_io) {
            Ok(Some(route)) => route,
            Ok(None) => return Ok(None),
            Err(error) if is_unreachable(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        if route.header.kind != RouteType::Unicast {
            return Ok(None);
        }
        let (mut link, mut via, mut source) = (None, None, None);
        for attribute in route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => link = Some(index),
                RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => via = Some(gateway),
                RouteAttribute::PrefSource(RouteAddress::Inet(address)) => source = Some(address),
                _ => {}
            }
        }
        Ok(link.zip(source).map(|(link, source)| WayTo { link, via, source }))
    }

    /// Makes a neighbour known for good.
    pub(crate) async fn add_neighbour(&self, link: u32, address: IpAddr, mac: [u8; 6]) -> io::Result<()> {
        let request = self
            .handle
            .neighbours()
            .add(link, address)
            .link_layer_address(&mac)
            .replace();
        request.execute().await.map_err(to_io)
    }

    /// Makes a route, or puts it in the place of one to the same network.
    pub(crate) async fn add_route(&self, route: Route) -> io::Result<()> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, format!("{error:?}"));
        let mut builder = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(route.to.0, route.to.1)
            .map_err(invalid)?
            .output_interface(route.link);
        builder = match route.via {
            Some(via) => builder.gateway(via).map_err(invalid)?.onlink(),
            None => builder.scope(if route.to.0.is_ipv4() {
                RouteScope::Link
            } else {
                RouteScope::Universe
            }),
        };
        if let Some(from) = route.from {
            builder = builder.pref_source(from).map_err(invalid)?;
        }
        let mut message = builder.build();
        if route.to.1 == 0 {
            message
                .attributes
                .retain(|attribute| !matches!(attribute, RouteAttribute::Destination(_)));
        }
        if let Some(mtu) = route.mtu {
            message
                .attributes
                .push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
        }
        self.handle
            .route()
            .add(message)
            .replace()
            .execute()
            .await
            .map_err(to_io)
    }

    async fn set(&self, message: LinkMessage) -> io::Result<()> {
        self.handle.link().set(message).execute().await.map_err(to_io)
    }
}

fn link_of(message: LinkMessage) -> Link {
    let mut link = Link {
        is_running: false,
        index: message.header.index,
        name: String::new(),
        mtu: 0,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::OperState(state) => link.is_running = state == State::Up,
            _ => {}
        }
    }
    link
}

fn host_bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn to_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

/// No such device, by the words that the kernel has for it.
pub(crate) fn is_absent(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::NODEV, Errno::NXIO, Errno::NOENT]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// No way there, by the words that the kernel has for it.
fn is_unreachable(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let unreachable = [Errno::NETUNREACH, Errno::HOSTUNREACH, Errno::ACCESS, Errno::INVAL];
    unreachable
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}
