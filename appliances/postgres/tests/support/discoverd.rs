//! A discoverd of one service in memory, over the same two listeners as the real one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::extract::{Path, State};
use axum::response::Response;
use axum::routing::{get, put};
use axum::{Extension, Router};
use flynn_api::discovery::{Event, EventKind, Instance, ServiceConfig, ServiceMeta};
use flynn_api::server::{self, CancellationToken, Json, Listener, Peer};
use flynn_api::tls::{Ca, ClientAuth, PeerIdentity};
use flynn_api::{Error, ErrorCode};
use futures::StreamExt as _;
use tokio::sync::watch;

/// The one service, when it is there.
#[derive(Clone, Default)]
pub(crate) struct Service {
    pub(crate) made: bool,
    pub(crate) index: u64,
    pub(crate) instances: BTreeMap<String, Instance>,
    pub(crate) leader: Option<String>,
    pub(crate) meta: Option<ServiceMeta>,
}

#[derive(Clone)]
pub(crate) struct Discoverd {
    service: Arc<watch::Sender<Service>>,
    /// Where it listens, once it has listened.
    addresses: Arc<Mutex<Option<(SocketAddr, SocketAddr)>>>,
    ca: Arc<Ca>,
}

impl Discoverd {
    pub(crate) fn new() -> Self {
        Self {
            service: Arc::new(watch::channel(Service::default()).0),
            addresses: Arc::default(),
            ca: Arc::new(Ca::create("test").unwrap()),
        }
    }

    /// Makes the identity of the database's job.
    pub(crate) fn issue(&self, dir: &std::path::Path) {
        let identity = self.ca.issue(&PeerIdentity::Job("postgres".into()), &[]).unwrap();
        identity.save(dir).unwrap();
    }

    /// The service now.
    pub(crate) fn service(&self) -> Service {
        self.service.borrow().clone()
    }

    /// Forgets an instance, as when it runs out.
    pub(crate) fn expire(&self, id: &str) {
        self.service.send_modify(|service| {
            service.instances.remove(id);
            service.leader.take_if(|leader| leader == id);
        });
    }

    /// Listens, on the same ports each time: plain, and mutual TLS. Dropping the token's guard ends it.
    pub(crate) async fn listen(&self) -> (SocketAddr, SocketAddr, tokio_util::sync::DropGuard) {
        let before = *self.addresses.lock().unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (plain, tls) = before.unwrap_or((any, any));
        let identity = self
            .ca
            .issue(&PeerIdentity::Host("h".into()), &["127.0.0.1".into()])
            .unwrap();
        let config = identity.server_config(ClientAuth::Required).unwrap();
        let plain = Listener::tcp(plain).await.unwrap();
        let tls = Listener::tls(tls, config).await.unwrap();
        let addresses = (plain.local_addr().unwrap(), tls.local_addr().unwrap());
        *self.addresses.lock().unwrap() = Some(addresses);
        let stop = CancellationToken::new();
        for listener in [plain, tls] {
            tokio::spawn(server::serve(
                listener,
                self.router(),
                stop.clone().cancelled_owned(),
            ));
        }
        (addresses.0, addresses.1, stop.drop_guard())
    }

    fn router(&self) -> Router {
        Router::new()
            .route("/services/postgres", get(changes).put(make))
            .route("/services/postgres/meta", put(set_meta))
            .route(
                "/services/postgres/instances/{id}",
                put(register).delete(deregister),
            )
            .with_state(self.clone())
    }
}

/// The cluster's state is changed over mutual TLS only.
fn over_tls(peer: &Peer) -> Result<(), Error> {
    let fits = peer
        .identity
        .as_ref()
        .is_some_and(|identity| identity.is_job("postgres"));
    fits.then_some(())
        .ok_or_else(|| Error::new(ErrorCode::Forbidden, "not over the plain port"))
}

async fn make(
    State(discoverd): State<Discoverd>,
    Extension(peer): Extension<Peer>,
    Json(_): Json<ServiceConfig>,
) -> Result<(), Error> {
    over_tls(&peer)?;
    discoverd.service.send_modify(|service| service.made = true);
    Ok(())
}

async fn set_meta(
    State(discoverd): State<Discoverd>,
    Extension(peer): Extension<Peer>,
    Json(meta): Json<ServiceMeta>,
) -> Result<Json<ServiceMeta>, Error> {
    over_tls(&peer)?;
    let mut result = Err(Error::conflict("the index is not the present one"));
    discoverd.service.send_if_modified(|service| {
        let fits = meta.index == service.meta.as_ref().map_or(0, |meta| meta.index);
        if fits {
            service.index += 1;
            service.leader = meta.leader_id.filter(|id| service.instances.contains_key(id));
            let meta = ServiceMeta {
                data: meta.data,
                index: service.index,
                leader_id: None,
            };
            service.meta = Some(meta.clone());
            result = Ok(Json(meta));
        }
        fits
    });
    result
}

async fn register(
    State(discoverd): State<Discoverd>,
    Path(id): Path<String>,
    Json(instance): Json<Instance>,
) -> Result<(), Error> {
    let mut made = true;
    discoverd.service.send_if_modified(|service| {
        made = service.made;
        let new = made && !service.instances.contains_key(&id);
        if new {
            service.index += 1;
            service.instances.insert(
                id,
                Instance {
                    index: service.index,
                    ..instance
                },
            );
        }
        new
    });
    made.then_some(())
        .ok_or_else(|| Error::not_found("service", "postgres"))
}

async fn deregister(State(discoverd): State<Discoverd>, Path(id): Path<String>) {
    discoverd.expire(&id);
}

/// Tells all there is at each change: a client takes what it knows already as well.
async fn changes(State(discoverd): State<Discoverd>) -> Result<Response, Error> {
    if !discoverd.service.borrow().made {
        return Err(Error::not_found("service", "postgres"));
    }
    let mut known = BTreeMap::new();
    let all = tokio_stream(discoverd.service.subscribe()).flat_map(move |service| {
        let event = |kind, instance, service_meta| Event {
            instance,
            service_meta,
            ..Event::new("postgres", kind, service.index)
        };
        let gone = known
            .values()
            .filter(|was: &&Instance| !service.instances.contains_key(&was.id));
        let mut events: Vec<_> = gone
            .map(|was| event(EventKind::Down, Some(was.clone()), None))
            .collect();
        events.extend(
            service
                .instances
                .values()
                .map(|it| event(EventKind::Up, Some(it.clone()), None)),
        );
        let leader = service
            .leader
            .as_ref()
            .and_then(|id| service.instances.get(id))
            .cloned();
        events.push(event(EventKind::Leader, leader, None));
        events.extend(
            service
                .meta
                .clone()
                .map(|meta| event(EventKind::ServiceMeta, None, Some(meta))),
        );
        events.push(event(EventKind::Current, None, None));
        known.clone_from(&service.instances);
        futures::stream::iter(events.into_iter().map(|event| (None, event)))
    });
    Ok(server::events(all))
}

/// What a channel holds now and after each change.
fn tokio_stream(receiver: watch::Receiver<Service>) -> impl futures::Stream<Item = Service> + Send + 'static {
    futures::stream::unfold((receiver, true), |(mut receiver, first)| async move {
        if !first {
            receiver.changed().await.ok()?;
        }
        let service = receiver.borrow_and_update().clone();
        Some((service, (receiver, false)))
    })
}
