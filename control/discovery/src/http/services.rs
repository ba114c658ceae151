//! Services, instances, leaders and metadata.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Extension;
use axum::extract::{Path, State};
use axum::response::{IntoResponse as _, Response};
use flynn_api::discovery::{
    Event, EventKind, HOST_SERVICE, Instance, ServiceConfig, ServiceInfo, ServiceMeta, VirtualNetworks,
};
use flynn_api::server::{Json, Peer, StrictJson, events, wants_events};
use flynn_api::{Error, ErrorCode};
use futures::StreamExt as _;
use http::HeaderMap;
use serde::{Serialize, Serializer};
use tokio_stream::wrappers::ReceiverStream;

use super::auth::{Action, Door};
use super::input;
use crate::command::Command;
use crate::node::Node;
use crate::state::{self, Service};

type App = State<(Node, Door)>;
type From = Extension<Peer>;

pub(super) async fn names(
    State((node, door)): App,
    Extension(peer): From,
    headers: HeaderMap,
) -> Result<Response, Error> {
    door.check(&peer, &Action::Read(""))?;
    if wants_events(&headers) {
        return stream_all(&node);
    }
    let names: Vec<String> = node
        .view
        .read(|state| state.services().map(|(name, _)| name.clone()).collect());
    Ok(Json(names).into_response())
}

pub(super) async fn virtual_networks(
    State((node, door)): App,
    Extension(peer): From,
) -> Result<Json<VirtualNetworks>, Error> {
    door.check(&peer, &Action::Read(""))?;
    node.barrier().await?;
    Ok(Json(node.view.read(state::State::networks)))
}

pub(super) async fn set_virtual_networks(
    State((node, door)): App,
    Extension(peer): From,
    StrictJson(networks): StrictJson<VirtualNetworks>,
) -> Result<(), Error> {
    door.check(&peer, &Action::Govern(HOST_SERVICE))?;
    networks.check().map_err(Error::validation)?;
    node.write(Command::SetVirtualNetworks { networks })
        .await
        .map(drop)
}

pub(super) async fn create(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    StrictJson(config): StrictJson<ServiceConfig>,
) -> Result<Json<ServiceConfig>, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::CreateService(&service))?;
    node.write(Command::CreateService {
        service,
        leader_type: config.leader_type,
    })
    .await?;
    Ok(Json(config))
}

pub(super) async fn remove(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
) -> Result<(), Error> {
    input::service(&service)?;
    door.check(&peer, &Action::DeleteService(&service))?;
    node.write(Command::DeleteService { service }).await.map(drop)
}

pub(super) async fn show(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::Read(&service))?;
    if wants_events(&headers) {
        return stream(&node, &service, |_| true);
    }
    let info = node.view.read(|state| {
        let of = state.service(&service)?;
        Some(ServiceInfo {
            config: ServiceConfig {
                leader_type: of.leader_type,
            },
            addresses: state.addresses(of),
        })
    });
    Ok(Json(info.ok_or_else(|| state::no_service(&service))?).into_response())
}

pub(super) async fn meta(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
) -> Result<Json<ServiceMeta>, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::Read(&service))?;
    node.barrier().await?;
    let meta = look(&node, &service, |of| of.meta.clone())?;
    meta.map(Json)
        .ok_or_else(|| Error::not_found("metadata of", service))
}

pub(super) async fn set_meta(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    StrictJson(meta): StrictJson<ServiceMeta>,
) -> Result<Json<ServiceMeta>, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::Govern(&service))?;
    input::meta(&meta)?;
    let data = meta.data.clone();
    let index = node.write(Command::SetMeta { service, meta }).await?;
    Ok(Json(ServiceMeta {
        data,
        index,
        leader_id: None,
    }))
}

pub(super) async fn instances(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::Read(&service))?;
    if wants_events(&headers) {
        let wanted = |kind| {
            matches!(
                kind,
                EventKind::Up | EventKind::Update | EventKind::Down | EventKind::Current
            )
        };
        return stream(&node, &service, wanted);
    }
    let mut instances: Vec<Instance> = look(&node, &service, |of| of.instances.values().cloned().collect())?;
    instances.sort_by_key(|instance| instance.index);
    Ok(Json(instances).into_response())
}

pub(super) async fn register(
    State((node, door)): App,
    Extension(peer): From,
    Path((service, id)): Path<(String, String)>,
    StrictJson(instance): StrictJson<Instance>,
) -> Result<Json<Instance>, Error> {
    input::service(&service)?;
    let addr = input::instance(&id, &instance)?;
    let present = find(&node, &service, &id)
        .ok()
        .and_then(|present| address(&present));
    let addrs: Vec<_> = present.into_iter().chain([addr]).collect();
    door.check(&peer, &Action::Register(&service, &addrs))?;
    node.register(&service, instance).await?;
    find(&node, &service, &id).map(Json)
}

pub(super) async fn deregister(
    State((node, door)): App,
    Extension(peer): From,
    Path((service, id)): Path<(String, String)>,
) -> Result<(), Error> {
    input::service(&service)?;
    input::id(&id)?;
    let present = find(&node, &service, &id);
    let addrs: Vec<_> = present.iter().filter_map(address).collect();
    door.check(&peer, &Action::Register(&service, &addrs))?;
    present?;
    node.deregister(service, id).await
}

pub(super) async fn leader(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::Read(&service))?;
    if wants_events(&headers) {
        return stream(&node, &service, |kind| {
            matches!(kind, EventKind::Leader | EventKind::Current)
        });
    }
    node.barrier().await?;
    let leader = look(&node, &service, |of| of.leader().cloned())?;
    let leader = leader.ok_or_else(|| Error::not_found("leader of", service))?;
    Ok(Json(leader).into_response())
}

pub(super) async fn set_leader(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    StrictJson(instance): StrictJson<Instance>,
) -> Result<(), Error> {
    input::service(&service)?;
    input::id(&instance.id)?;
    door.check(&peer, &Action::Govern(&service))?;
    node.write(Command::SetLeader {
        service,
        id: instance.id,
    })
    .await
    .map(drop)
}

fn look<T>(node: &Node, service: &str, look: impl FnOnce(&Service) -> T) -> Result<T, Error> {
    node.view
        .read(|state| state.service(service).map(look))
        .ok_or_else(|| state::no_service(service))
}

fn find(node: &Node, service: &str, id: &str) -> Result<Instance, Error> {
    let instance = look(node, service, |of| of.instances.get(id).cloned())?;
    instance.ok_or_else(|| Error::not_found("instance", id))
}

fn address(instance: &Instance) -> Option<std::net::IpAddr> {
    instance
        .addr
        .parse()
        .map(|addr: SocketAddr| addr.ip().to_canonical())
        .ok()
}

/// An event that many watchers share.
struct Shared(Arc<Event>);

impl Serialize for Shared {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

fn too_many() -> Error {
    Error::new(
        ErrorCode::LimitExceeded,
        "there are too many watchers: close some",
    )
}

/// All services: what there is (told as the reader takes it), `current`, and what changes.
fn stream_all(node: &Node) -> Result<Response, Error> {
    let watch = node.view.watch_all().ok_or_else(too_many)?;
    let current = Event::new("", EventKind::Current, watch.index);
    let present = watch.present.everything().chain([current]).map(Arc::new);
    let all = futures::stream::iter(present).chain(ReceiverStream::new(watch.changes));
    Ok(events(
        all.map(|event| (Some(event.index.to_string()), Shared(event))),
    ))
}

fn stream(node: &Node, service: &str, wanted: fn(EventKind) -> bool) -> Result<Response, Error> {
    let watch = node.view.watch(service).ok_or_else(too_many)?;
    let present = futures::stream::iter(watch.present.into_iter().map(Arc::new));
    let all = present.chain(ReceiverStream::new(watch.changes));
    let chosen = all.filter_map(move |event| {
        std::future::ready(wanted(event.kind).then(|| (Some(event.index.to_string()), Shared(event))))
    });
    Ok(events(chosen))
}
