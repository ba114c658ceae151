//! TCP routes, carried in user space.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead as _};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use flynn_dataplane::steer::Steer;
use flynn_dataplane::{Port, Protocol};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::backend::Service;
use crate::balance;
use crate::listen;
use crate::ports::{Plan, listening};
use crate::router::Router;
use crate::tunnel;
use crate::upstream;

/// Between looks at the routes, and at who else listens.
const LOOK: Duration = Duration::from_secs(1);
/// The same until a router that begins knows enough.
const WAIT: Duration = Duration::from_millis(20);
/// How long it waits for the instances of a service that nobody may know.
const INSTANCES: Duration = Duration::from_secs(2);
/// Handshakes that have begun with a listener end with it, whoever has taken over: they are waited for.
const HANDSHAKES: Duration = Duration::from_secs(1);

/// How connections come from routed ports.
pub enum Doors {
    /// The kernel gives them to one listener.
    Steered(Box<Steer>, TcpListener),
    /// Each port has a listener of its own.
    Bound,
}

impl Doors {
    /// The best that can be had: steering where programs may be pinned and the kernel knows how.
    pub fn open(pins: Option<&Path>) -> Self {
        let Some(pins) = pins else {
            tracing::info!("BPF_PINS is not set: the router listens on each routed port");
            return Self::Bound;
        };
        match steering(pins) {
            Ok((steer, listener)) => {
                tracing::info!("the kernel steers routed ports to one listener");
                Self::Steered(Box::new(steer), listener)
            }
            Err(why) => {
                tracing::warn!("the router listens on each routed port, as it cannot steer them: {why:#}");
                Self::Bound
            }
        }
    }
}

fn steering(pins: &Path) -> anyhow::Result<(Steer, TcpListener)> {
    let listener = listen::everywhere(0)?;
    Ok((Steer::open(pins)?, listener))
}

/// Where the connections of each served port go.
type Targets = Arc<RwLock<BTreeMap<u16, (Arc<Service>, bool)>>>;

/// Serves TCP routes until `shutdown`. Connections that are there when a route goes are carried on.
pub async fn follow(router: Arc<Router>, doors: Doors, shutdown: CancellationToken) {
    let targets = Targets::default();
    match doors {
        Doors::Steered(steer, listener) => steered(&router, *steer, listener, &targets, shutdown).await,
        Doors::Bound => bound(&router, &targets, shutdown).await,
    }
}

/// What is to be served now; the targets are those from here on.
fn plan(router: &Router, targets: &Targets, taken: &BTreeSet<u16>) -> Plan {
    let plan = Plan::new(&router.routes(), taken);
    let services: BTreeMap<_, _> = router
        .services()
        .into_iter()
        .map(|service| (service.name.clone(), service))
        .collect();
    let target = |(port, (name, leader)): (&u16, &(String, bool))| {
        Some((*port, (Arc::clone(services.get(name)?), *leader)))
    };
    *targets.write().unwrap_or_else(PoisonError::into_inner) =
        plan.served.iter().filter_map(target).collect();
    plan
}

/// One listener for all.
async fn steered(
    router: &Arc<Router>,
    mut steer: Steer,
    listener: TcpListener,
    targets: &Targets,
    shutdown: CancellationToken,
) {
    // The router waits for its tasks at its end: so also for this.
    let _draining = router.tasks.token();
    let mut takeover = Takeover::Waiting(None);
    let accepting = accept(router, &listener, targets);
    tokio::pin!(accepting);
    let mut taken = BTreeSet::new();
    loop {
        // Whoever listens on a port itself keeps it: the program would take its connections.
        keep_known(&mut taken, listeners());
        let plan = plan(router, targets, &taken);
        if takeover.is_due(router, &plan) {
            let ports = plan.served.keys().map(|number| Port {
                protocol: Protocol::Tcp,
                number: *number,
            });
            // From here on an earlier router gets nothing new.
            let outcome = steer
                .set_ports(&ports.collect())
                .and_then(|()| takeover.once(|| steer.serve(Protocol::Tcp, &listener)));
            if let Err(error) = outcome {
                tracing::error!(%error, "routed ports cannot be steered");
            }
            if let Ok(counts) = steer.counts() {
                router.metrics.steered(counts);
            }
        }
        router.refuse(Protocol::Tcp, plan.refused);
        let look = if takeover == Takeover::Done { LOOK } else { WAIT };
        tokio::select! {
            () = shutdown.cancelled() => break,
            () = tokio::time::sleep(look) => {}
            () = &mut accepting => {}
        }
    }
    // The ports are the next router's; connections are accepted until it is there, or until we are sure to be the last.
    let _ = tokio::time::timeout(HANDSHAKES, accepting).await;
}

/// A router that begins leaves the ports as they are, with an earlier router as it is, until it can do better.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takeover {
    /// For routes and instances; since when there are routes.
    Waiting(Option<Instant>),
    /// What is known is to be served.
    Due,
    /// Ours are the ports.
    Done,
}

impl Takeover {
    fn is_due(&mut self, router: &Router, plan: &Plan) -> bool {
        if let Self::Waiting(since) = self {
            if !router.knows_routes() {
                return false;
            }
            let since = *since.get_or_insert_with(Instant::now);
            let services = router.services();
            let mut wanted = services
                .iter()
                .filter(|service| plan.served.values().any(|(name, _)| *name == service.name));
            if wanted.all(|service| service.members().known) || since.elapsed() > INSTANCES {
                *self = Self::Due;
            }
        }
        !matches!(self, Self::Waiting(_))
    }

    fn once<E>(&mut self, act: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        if *self == Self::Due {
            act()?;
            *self = Self::Done;
        }
        Ok(())
    }
}

/// Those that listen are still taken to when they cannot be listed: a route would take their connections.
fn keep_known(taken: &mut BTreeSet<u16>, listed: io::Result<BTreeSet<u16>>) {
    match listed {
        Ok(listed) => *taken = listed,
        Err(error) => tracing::warn!(%error, "who else listens on this host cannot be seen"),
    }
}

/// The ports of this network namespace that somebody listens on.
fn listeners() -> io::Result<BTreeSet<u16>> {
    let mut ports = BTreeSet::new();
    for table in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        let file = match std::fs::File::open(table) {
            Ok(file) => io::BufReader::new(file),
            // No IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        ports.extend(listening(file.lines().map_while(Result::ok)));
    }
    Ok(ports)
}

/// A listener for each.
async fn bound(router: &Arc<Router>, targets: &Targets, shutdown: CancellationToken) {
    let mut listeners: BTreeMap<u16, CancellationToken> = BTreeMap::new();
    loop {
        let mut plan = plan(router, targets, &BTreeSet::new());
        listeners.retain(|port, stop| {
            let stays = plan.served.contains_key(port);
            if !stays {
                stop.cancel();
            }
            stays
        });
        for port in plan.served.into_keys() {
            if listeners.contains_key(&port) {
                continue;
            }
            match listen::everywhere(port) {
                Ok(listener) => {
                    let stop = shutdown.child_token();
                    let (router, targets, stopped) = (Arc::clone(router), Arc::clone(targets), stop.clone());
                    tokio::spawn(async move {
                        tokio::select! {
                            () = accept(&router, &listener, &targets) => {}
                            () = stopped.cancelled() => {}
                        }
                    });
                    listeners.insert(port, stop);
                }
                Err(why) => {
                    plan.refused.insert(port, why.to_string());
                }
            }
        }
        router.refuse(Protocol::Tcp, plan.refused);
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Accepts for ever. The port that the client has dialled says where its connection goes.
async fn accept(router: &Arc<Router>, listener: &TcpListener, targets: &Targets) {
    loop {
        let Ok((client, _)) = listener.accept().await else {
            // Out of files, say.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let target = client.local_addr().ok().and_then(|address| {
            let targets = targets.read().unwrap_or_else(PoisonError::into_inner);
            targets.get(&address.port()).cloned()
        });
        let Some((service, leader)) = target else { continue };
        // It waits for its slot here, and the others in the listener's backlog: a slot that waited for a connection on
        // each of many ports would be nobody's.
        let Ok(slot) = router.slots.take().await else {
            continue;
        };
        let (end, busy) = (router.stop.clone(), router.metrics.tunnel());
        router.tasks.spawn(async move {
            let _counted = (busy, slot);
            tokio::select! {
                result = carry(client, &service, leader) => if let Err(error) = result {
                    tracing::debug!(%error, service = service.name, "a TCP connection broke off");
                },
                () = end.cancelled() => {}
            }
        });
    }
}

/// Carries one connection: to the first backend, in balanced order, that takes it.
async fn carry(client: TcpStream, service: &Service, leader: bool) -> io::Result<()> {
    client.set_nodelay(true)?;
    let members = service.told().await;
    let backends = members.backends(leader);
    let mut tried = Vec::new();
    loop {
        let loads: Vec<_> = backends.iter().map(|backend| backend.load()).collect();
        let (first, second) = (rand::random::<u32>() as usize, rand::random::<u32>() as usize);
        let Some(index) = balance::pick(&loads, &tried, first, second) else {
            return Err(io::Error::other("nothing runs that takes connections"));
        };
        tried.push(index);
        let in_flight = backends[index].begin();
        match upstream::connect(backends[index].addr).await {
            Ok(backend) => {
                let _counted = in_flight;
                return tunnel::carry(client, backend).await;
            }
            Err(error) if upstream::is_our_own(&error) => return Err(error),
            Err(_) => backends[index].failed(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slots::Slots;
    use crate::tls::{Certificates, default_certificate};
    use flynn_api::discovery::Instance;

    #[test]
    fn who_listens_keeps_its_port_though_nobody_can_look() {
        let mut taken = BTreeSet::new();
        keep_known(&mut taken, Ok(BTreeSet::from([3000])));
        keep_known(&mut taken, Err(io::ErrorKind::Other.into()));
        assert_eq!(taken, BTreeSet::from([3000]));
        keep_known(&mut taken, Ok(BTreeSet::new()));
        assert!(taken.is_empty());
    }

    #[tokio::test]
    async fn each_connection_has_a_slot() {
        let dir = tempfile::tempdir().unwrap();
        let certificates = Certificates::new(&default_certificate(dir.path(), None).unwrap()).unwrap();
        let mut router = Router::new(Arc::new(certificates), "key".into());
        router.slots = Slots::new(1);
        let router = Arc::new(router);
        let (door, backend) = (loopback().await, loopback().await);
        let service = Arc::new(Service::new("raw"));
        let instance = Instance::new(
            "tcp",
            backend.local_addr().unwrap().to_string(),
            flynn_api::Meta::new(),
        );
        service.set(vec![instance], None, BTreeSet::new(), "key");
        let addr = door.local_addr().unwrap();
        let targets = Targets::default();
        targets.write().unwrap().insert(addr.port(), (service, false));
        let accepting = Arc::clone(&router);
        tokio::spawn(async move { accept(&accepting, &door, &targets).await });

        let first = TcpStream::connect(addr).await.unwrap();
        let carried = backend.accept().await.unwrap();
        assert_eq!(router.slots.free(), 0);
        let _second = TcpStream::connect(addr).await.unwrap();
        // The second one's turn comes once the first has ended at both sides.
        drop((first, carried));
        let next = tokio::time::timeout(Duration::from_secs(20), backend.accept());
        next.await.expect("the slot is never free again").unwrap();
        assert_eq!(router.slots.free(), 0);
    }

    async fn loopback() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").await.unwrap()
    }
}
