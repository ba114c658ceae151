//! TCP routes: a listener per port, carried in user space.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use flynn_api::route::RouteKind;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::backend::Service;
use crate::balance;
use crate::listen;
use crate::router::Router;
use crate::tunnel;
use crate::upstream::CONNECT_TIMEOUT;

/// Ports of the platform and of ssh: a route must never take them.
const RESERVED: [u16; 7] = [22, 53, 80, 443, 1111, 1113, 5000];
/// Between looks at the routes.
const LOOK: Duration = Duration::from_secs(1);
/// Between attempts at a port that something else listens on.
const AGAIN: u32 = 10;

/// Listens where TCP routes say, until `shutdown`. Connections that are there when a route goes are carried on.
pub async fn follow(router: Arc<Router>, shutdown: CancellationToken) {
    let mut listeners: BTreeMap<u16, (Arc<Service>, bool, CancellationToken)> = BTreeMap::new();
    let mut refused: BTreeMap<u16, u32> = BTreeMap::new();
    loop {
        let services: BTreeMap<_, _> = router
            .services()
            .into_iter()
            .map(|s| (s.name.clone(), s))
            .collect();
        let wanted: BTreeMap<u16, (Arc<Service>, bool)> = router
            .routes()
            .iter()
            .filter(|route| route.kind == RouteKind::Tcp && route.port != 0)
            .filter_map(|route| {
                Some((
                    route.port,
                    (Arc::clone(services.get(&route.service)?), route.leader),
                ))
            })
            .collect();
        listeners.retain(|port, (service, leader, stop)| {
            let same = wanted
                .get(port)
                .is_some_and(|(s, l)| Arc::ptr_eq(s, service) && l == leader);
            if !same {
                stop.cancel();
            }
            same
        });
        refused.retain(|port, _| wanted.contains_key(port));
        for (port, (service, leader)) in wanted {
            if listeners.contains_key(&port) {
                continue;
            }
            let looks = refused.entry(port).or_insert(0);
            *looks += 1;
            if *looks % AGAIN != 1 {
                continue;
            }
            match bind(port) {
                Ok(listener) => {
                    let stop = shutdown.child_token();
                    tokio::spawn(accept(
                        Arc::clone(&router),
                        listener,
                        Arc::clone(&service),
                        leader,
                        stop.clone(),
                    ));
                    listeners.insert(port, (service, leader, stop));
                    refused.remove(&port);
                }
                Err(why) => tracing::warn!(
                    port,
                    service = service.name,
                    "a TCP route cannot be served: {why}"
                ),
            }
        }
        router.metrics.refused_routes(refused.len());
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

fn bind(port: u16) -> io::Result<TcpListener> {
    if RESERVED.contains(&port) {
        return Err(io::Error::other(
            "the port belongs to the system: choose another for the route",
        ));
    }
    listen::everywhere(port)
}

async fn accept(
    router: Arc<Router>,
    listener: TcpListener,
    service: Arc<Service>,
    leader: bool,
    stop: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        let Ok((client, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (service, end) = (Arc::clone(&service), router.stop.clone());
        let busy = router.metrics.tunnel();
        router.tasks.spawn(async move {
            let _counted = busy;
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
    let members = service.members();
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
        match connect(backends[index].addr).await {
            Ok(backend) => {
                let _counted = in_flight;
                return tunnel::carry(client, backend).await;
            }
            Err(_) => backends[index].failed(),
        }
    }
}

async fn connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(addr)).await;
    let stream = stream.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
