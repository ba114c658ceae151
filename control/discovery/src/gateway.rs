//! What this host's containers see: DNS and the plain API on the gateway address.
//!
//! The gateway address is the first of this host's subnet, which the host takes by a lease in the metadata of
//! [`HOST_SERVICE`]. discoverd finds it in its own store, also after a restart before any other member is heard, and
//! binds there (never all addresses) as soon as the address exists.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use flynn_api::discovery::{HOST_SERVICE, NetworkLeases};
use flynn_api::server::{CancellationToken, Listener, serve};
use serde::Deserialize as _;

use crate::dns::{self, Upstreams};
use crate::http::{auth::Door, router};
use crate::node::Node;

/// Connections to the API from one container at a time: it holds up no other.
const EACH: usize = 256;
/// Between attempts to bind.
const RETRY: Duration = Duration::from_millis(200);
/// Failed attempts between two lines in the log.
const LOG_EVERY: u32 = 50;

/// An IPv4 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    network: u32,
    prefix: u8,
}

impl Subnet {
    /// Its first address, where the host is.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(self.network + 1)
    }

    /// Whether `addr` is in it.
    pub fn contains(self, addr: Ipv4Addr) -> bool {
        u32::from(addr) & mask(self.prefix) == self.network
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.network), self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a subnet such as 100.100.1.0/24");
        let (network, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let network: Ipv4Addr = network.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
        // A gateway and at least one container must fit in.
        if !(1..=30).contains(&prefix) || u32::from(network) & !mask(prefix) != 0 {
            return Err(wrong());
        }
        Ok(Self {
            network: network.into(),
            prefix,
        })
    }
}

/// What to serve at the gateway address.
#[derive(Clone, Debug)]
pub struct Gateway {
    /// This host.
    pub host_id: String,
    /// Its address.
    pub host_ip: Ipv4Addr,
    /// The port of the API.
    pub api_port: u16,
    /// The port of DNS.
    pub dns_port: u16,
    /// Who answers what is not ours.
    pub upstreams: Upstreams,
}

/// The subnet that `host_id` holds a lease of.
fn subnet(node: &Node, host_id: &str) -> Option<Subnet> {
    let leases = node.view.read(|state| {
        let meta = state.service(HOST_SERVICE)?.meta.as_ref()?;
        NetworkLeases::deserialize(&meta.data).ok()
    })?;
    let lease = leases.leases.get(host_id)?;
    lease
        .subnet
        .parse()
        .inspect_err(|why| tracing::error!(why, "this host's lease cannot be used"))
        .ok()
}

/// Serves at whatever address the lease says, until `shutdown`.
pub async fn run(node: Node, gateway: Gateway, shutdown: CancellationToken) {
    let mut serving: Option<(Subnet, CancellationToken)> = None;
    while !shutdown.is_cancelled() {
        let watch = node.view.watch(HOST_SERVICE, None);
        let present = subnet(&node, &gateway.host_id);
        if serving.as_ref().map(|(subnet, _)| *subnet) != present {
            if let Some((_, stop)) = serving.take() {
                stop.cancel();
            }
            serving = present.map(|subnet| {
                let stop = shutdown.child_token();
                start(&node, &gateway, subnet, &stop);
                (subnet, stop)
            });
        }
        let changed = async {
            match watch {
                Ok(mut watch) => drop(watch.changes.recv().await),
                Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        };
        tokio::select! {
            () = changed => {}
            () = shutdown.cancelled() => {}
        }
    }
}

fn start(node: &Node, gateway: &Gateway, subnet: Subnet, stop: &CancellationToken) {
    let at = |port| SocketAddr::from((subnet.gateway(), port));
    let door = Door::Gateway {
        subnet,
        host: gateway.host_ip,
    };
    let (api, routes, stopped) = (at(gateway.api_port), router(node.clone(), door), stop.clone());
    tokio::spawn(async move {
        let Some(listener) = bound("the API", api, &stopped, || Listener::tcp(api)).await else {
            return;
        };
        let listener = listener.each(EACH);
        if let Err(error) = serve(listener, routes, stopped.cancelled()).await {
            tracing::error!(%error, "the API at the gateway address has ended");
        }
    });
    let dns = dns::Server::new(
        Arc::clone(&node.view),
        gateway.upstreams.without(subnet.gateway()),
    )
    .count(Arc::clone(&node.metrics.dns));
    let (addr, stopped, server) = (at(gateway.dns_port), stop.clone(), dns.clone());
    tokio::spawn(async move {
        // A socket that fails is replaced by another.
        while let Some(socket) = bound("DNS", addr, &stopped, || async {
            std::net::UdpSocket::bind(addr)
        })
        .await
        {
            let serving = server.clone().serve_udp(socket);
            stopped.run_until_cancelled(serving).await;
            stopped.run_until_cancelled(tokio::time::sleep(RETRY)).await;
        }
    });
    let stopped = stop.clone();
    tokio::spawn(async move {
        if let Some(listener) = bound("DNS over TCP", addr, &stopped, || {
            tokio::net::TcpListener::bind(addr)
        })
        .await
        {
            stopped.run_until_cancelled(dns.serve_tcp(listener)).await;
        }
    });
}

/// Binds, again and again until it works or is to stop: the address appears when the host's network is up.
async fn bound<T, F: Future<Output = std::io::Result<T>>>(
    what: &str,
    addr: SocketAddr,
    stop: &CancellationToken,
    bind: impl Fn() -> F,
) -> Option<T> {
    let attempts = async {
        for attempt in 0_u32.. {
            match bind().await {
                Ok(bound) => {
                    tracing::info!(%addr, "{what} is open on the gateway address");
                    return bound;
                }
                Err(error) if attempt.is_multiple_of(LOG_EVERY) => {
                    tracing::warn!(%addr, %error, "{what} waits for the gateway address");
                }
                Err(_) => {}
            }
            tokio::time::sleep(RETRY).await;
        }
        unreachable!("attempts never end")
    };
    stop.run_until_cancelled(attempts).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets() {
        let subnet: Subnet = "100.100.1.0/24".parse().unwrap();
        assert_eq!(subnet.gateway(), Ipv4Addr::new(100, 100, 1, 1));
        assert!(subnet.contains(Ipv4Addr::new(100, 100, 1, 255)));
        assert!(!subnet.contains(Ipv4Addr::new(100, 100, 2, 0)));
        assert_eq!(subnet.to_string(), "100.100.1.0/24");
        for wrong in [
            "",
            "100.100.1.0",
            "100.100.1.1/24",
            "100.100.1.0/31",
            "100.100.1.0/0",
            "::/64",
        ] {
            assert!(wrong.parse::<Subnet>().is_err(), "{wrong}");
        }
    }
}
