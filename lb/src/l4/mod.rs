//! TCP and UDP routes in the kernel: tells the load balancer of the dataplane which ports of this host's addresses lead
//! to which containers ([`plan`]), and goes on to tell it as routes, instances and addresses change.
//!
//! Packets that come by the uplink are balanced before the network stack sees them. What does not come by it (the
//! host's own processes and containers), and routes to services that are no containers, are left to [`crate::tcp`].
//!
//! Probes connect to the container itself, from this host through the overlay: the same uplinks, tunnel, policy and
//! port as the traffic, but not its translation, which a VIP would need a client outside for. What takes datagrams need
//! not take the connection: that it is refused says that the container is there.
//!
//! Datagrams are carried by nobody else: a UDP route that cannot be served here is refused, with the reason.

pub mod plan;
mod uplink;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use flynn_dataplane::Protocol;
use flynn_dataplane::lb::{Balancer, Limits, Mode, Service};
use futures::StreamExt as _;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::router::Router;
use plan::{Instances, Wanted};
use uplink::Found;

/// Between looks at routes, instances and the host's own addresses.
const LOOK: Duration = Duration::from_millis(500);
/// Between rounds of probes.
const PROBE: Duration = Duration::from_secs(2);
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// Probes at a time.
const PROBES: usize = 64;
/// Between attempts at a load balancer that cannot be had.
const AGAIN: Duration = Duration::from_secs(30);

/// How routes by port are served.
#[derive(Clone, Debug)]
pub struct Options {
    /// The host's address.
    pub host: Ipv4Addr,
    /// Where the programs run.
    pub mode: Mode,
    /// Answers leave through the host that the question came by.
    pub first_host: bool,
}

impl Options {
    /// From the job's environment: `HOST_IP`, `ROUTER_XDP` (`auto`, `native`, `generic` or `off`),
    /// `ROUTER_ANSWERS` (`direct` or `first-host`).
    pub fn from_env() -> anyhow::Result<Self> {
        let get = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let mode = match get("ROUTER_XDP").as_deref() {
            None | Some("auto") => Mode::Auto,
            Some("native") => Mode::Native,
            Some("generic") => Mode::Generic,
            Some("off") => Mode::Tc,
            Some(other) => anyhow::bail!("ROUTER_XDP is {other:?}: auto, native, generic and off are known"),
        };
        let first_host = match get("ROUTER_ANSWERS").as_deref() {
            None | Some("direct") => false,
            Some("first-host") => true,
            Some(other) => anyhow::bail!("ROUTER_ANSWERS is {other:?}: direct and first-host are known"),
        };
        Ok(Self {
            host: get("HOST_IP")
                .map_or(Ok(Ipv4Addr::LOCALHOST), |ip| ip.parse())
                .context("HOST_IP is no IPv4 address")?,
            mode,
            first_host,
        })
    }
}

/// The load balancer as metrics see it.
#[derive(Debug, Default)]
pub struct L4 {
    text: Mutex<String>,
}

impl L4 {
    /// Its counters, as Prometheus reads them.
    pub fn text(&self) -> String {
        self.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Follows the routes until `shutdown`. What the kernel was told stays when this ends. Without a place for `pins` there
    /// is no load balancer.
    pub async fn follow(
        self: Arc<Self>,
        router: Arc<Router>,
        pins: Option<PathBuf>,
        options: Options,
        shutdown: CancellationToken,
    ) {
        let Some(pins) = pins else {
            let why = "BPF_PINS is not set for the router, and without the kernel's load balancer nothing carries \
                       datagrams";
            loop {
                refuse_udp(&router, |_| Some(why.into()));
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        };
        loop {
            // Routes by port are rare: without any, nothing is loaded.
            if router.routes().iter().any(|route| plan::key(route).is_some()) {
                let served = self.serve(&router, &options, pins.clone(), &shutdown).await;
                match served {
                    Ok(()) => return,
                    Err(why) => {
                        tracing::warn!("routes by port are not balanced in the kernel: {why:#}");
                        let why =
                            format!("the kernel's load balancer, which alone carries datagrams: {why:#}");
                        refuse_udp(&router, |_| Some(why.clone()));
                    }
                }
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(AGAIN) => {}
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    async fn serve(
        &self,
        router: &Router,
        options: &Options,
        pins: PathBuf,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<()> {
        let mut found = uplink::find(options.host).await?;
        let limits = Limits::of_memory(memory());
        let mut balancer = Balancer::open(&pins, found.uplink.clone(), options.mode, &limits)?;
        let mut instances = Instances::default();
        let mut told: Option<Vec<Service>> = None;
        let mut probed = Instant::now();
        let mut probing = JoinSet::new();
        loop {
            // Right after a start, what the kernel has is better than what is not known yet.
            if told.is_none() && !is_known(router) {
                tokio::select! {
                    () = shutdown.cancelled() => return Ok(()),
                    () = tokio::time::sleep(LOOK) => continue,
                }
            }
            let services = wanted(router, &balancer, &mut instances, &found, options.first_host)?;
            refuse_udp(router, |key| {
                let why =
                    "the instances of its service are no containers, and datagrams only go to containers";
                (!instances.serves(key)).then(|| why.into())
            });
            // A container that has come back has another interface.
            if told.as_ref() != Some(&services) || balancer.needs_interfaces()? {
                balancer.set(&services)?;
                tracing::info!(services = services.len(), mode = ?balancer.mode(), "routes by port are balanced");
                told = Some(services);
            }
            *self.text.lock().unwrap_or_else(PoisonError::into_inner) = text(&balancer)?;
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                // An instance that is told to end has been taken out of discoverd a moment before.
                () = router.changed.notified() => {}
                () = tokio::time::sleep(LOOK) => {}
                Some(Ok(answers)) = probing.join_next() => {
                    for ((address, protocol), well) in answers {
                        instances.answered(address, protocol, well);
                    }
                    probed = Instant::now();
                }
            }
            // Beside, for the silent take their time, and changes do not wait for them.
            if probing.is_empty() && probed.elapsed() >= PROBE {
                probing.spawn(probe(instances.probed()));
            }
            let now = uplink::find(options.host).await?;
            if now.uplink != found.uplink {
                balancer = Balancer::open(&pins, now.uplink.clone(), options.mode, &limits)?;
                told = None;
            }
            found = now;
        }
    }
}

/// Whether somebody has told of the instances of each route by port.
fn is_known(router: &Router) -> bool {
    let services = router.services();
    let of = |name: &str| services.iter().find(|service| service.name == name);
    let routes = router.routes();
    let mut by_port = routes.iter().filter(|route| plan::key(route).is_some());
    by_port.all(|route| of(&route.service).is_none_or(|service| service.members().known))
}

fn wanted(
    router: &Router,
    balancer: &Balancer,
    instances: &mut Instances,
    found: &Found,
    first_host: bool,
) -> anyhow::Result<Vec<Service>> {
    let routes = router.routes();
    let services = router.services();
    let with_members: Vec<_> = routes
        .iter()
        .filter(|route| plan::key(route).is_some())
        .filter_map(|route| {
            let service = services.iter().find(|service| service.name == route.service)?;
            Some((route, service.members()))
        })
        .collect();
    let wanted: Vec<_> = with_members
        .iter()
        .map(|(route, members)| Wanted {
            route,
            instances: &members.instances,
            leader: members.leader.as_deref(),
            lost: &members.lost,
        })
        .collect();
    let is_container = |address: &SocketAddrV4| balancer.is_container(*address.ip()).unwrap_or(false);
    instances.update(&wanted, is_container, Instant::now());
    let mut addresses: BTreeSet<IpAddr> = found.addresses.iter().copied().collect();
    addresses.extend(balancer.direct_hosts()?.into_iter().map(IpAddr::V4));
    // Before they are here: who takes one over goes on with what its flows have.
    addresses.extend(balancer.floating()?);
    let addresses: Vec<_> = addresses.into_iter().collect();
    Ok(instances.services(&routes, &addresses, first_host))
}

/// The UDP routes that cannot be served, of all those that there are.
fn refuse_udp(router: &Router, why: impl Fn(&plan::Key) -> Option<String>) {
    let routes = router.routes();
    let udp = routes
        .iter()
        .filter_map(plan::key)
        .filter(|key| key.protocol == Protocol::Udp);
    let refused = udp.filter_map(|key| Some((key.port, why(&key)?)));
    router.refuse(Protocol::Udp, refused.collect());
}

/// Who takes a connection, or, where datagrams are taken, refuses it.
async fn probe(addresses: BTreeSet<(SocketAddrV4, Protocol)>) -> Vec<((SocketAddrV4, Protocol), bool)> {
    let one = async |(address, protocol): (SocketAddrV4, Protocol)| {
        let connected = tokio::time::timeout(PROBE_TIMEOUT, tokio::net::TcpStream::connect(address)).await;
        let well = match connected {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => {
                protocol == Protocol::Udp && error.kind() == std::io::ErrorKind::ConnectionRefused
            }
            Err(_) => false,
        };
        ((address, protocol), well)
    };
    futures::stream::iter(addresses.into_iter().map(one))
        .buffer_unordered(PROBES)
        .collect()
        .await
}

fn memory() -> u64 {
    let info = rustix::system::sysinfo();
    u64::from(info.mem_unit) * info.totalram
}

fn text(balancer: &Balancer) -> anyhow::Result<String> {
    let mut text = String::new();
    let head = |text: &mut String, name: &str, help: &str| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
    };
    let traffic = balancer.traffic()?;
    let series = [
        ("flynn_router_l4_packets_total", "Packets to routes by port."),
        ("flynn_router_l4_bytes_total", "Bytes to routes by port."),
        ("flynn_router_l4_flows_total", "New flows to routes by port."),
        (
            "flynn_router_l4_unserved_packets_total",
            "Packets to routes by port that were dropped for want of a container.",
        ),
    ];
    for (nth, (name, help)) in series.into_iter().enumerate() {
        head(&mut text, name, help);
        for (vip, traffic) in &traffic {
            let value = [traffic.packets, traffic.bytes, traffic.flows, traffic.unserved][nth];
            let protocol = format!("{:?}", vip.protocol).to_lowercase();
            let _ = writeln!(
                text,
                "{name}{{address=\"{}\",port=\"{}\",protocol=\"{protocol}\"}} {value}",
                vip.address, vip.port
            );
        }
    }
    let name = "flynn_router_l4_events_total";
    head(&mut text, name, "What happened in the load balancer, by kind.");
    for (event, count) in balancer.events()? {
        let _ = writeln!(text, "{name}{{event=\"{}\"}} {count}", event.name());
    }
    Ok(text)
}
