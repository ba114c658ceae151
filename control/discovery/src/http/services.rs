//! Services, instances, leaders and metadata.

use std::net::SocketAddr;

use axum::Extension;
use axum::extract::{Path, State};
use axum::response::{IntoResponse as _, Response};
use flynn_api::Error;
use flynn_api::discovery::Consistency::{Linearizable, Local};
use flynn_api::discovery::{
    EventKind, HOST_SERVICE, Instance, ServiceConfig, ServiceInfo, ServiceMeta, VirtualNetworks,
};
use flynn_api::server::{Json, Peer, StrictJson};
use http::HeaderMap;

use super::asked::{Asked, at, read};
use super::auth::{Action, Door};
use super::input;
use super::platform;
use super::stream::stream;
use crate::command::Command;
use crate::node::Node;
use crate::state::{self, Service, State as Registry};

type App = State<(Node, Door)>;
type From = Extension<Peer>;

pub(super) async fn names(
    State((node, door)): App,
    Extension(peer): From,
    asked: Asked,
) -> Result<Response, Error> {
    door.check(&peer, &Action::Read(""))?;
    if asked.events {
        return stream(&node, None, asked.since, |_| true).await;
    }
    read(&node, &asked, Local, |state| {
        Ok(state.services().map(|(name, _)| name.clone()).collect::<Vec<_>>())
    })
    .await
}

pub(super) async fn virtual_networks(
    State((node, door)): App,
    Extension(peer): From,
    asked: Asked,
) -> Result<Response, Error> {
    door.check(&peer, &Action::Read(""))?;
    read(&node, &asked, Linearizable, |state| Ok(state.networks())).await
}

pub(super) async fn set_virtual_networks(
    State((node, door)): App,
    Extension(peer): From,
    StrictJson(networks): StrictJson<VirtualNetworks>,
) -> Result<Response, Error> {
    door.check(&peer, &Action::Govern(HOST_SERVICE))?;
    networks.check().map_err(Error::validation)?;
    let index = node.write(Command::SetVirtualNetworks { networks }).await?;
    Ok(at(index, ().into_response()))
}

pub(super) async fn create(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    StrictJson(config): StrictJson<ServiceConfig>,
) -> Result<Response, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::CreateService(&service))?;
    platform::check(&node, &door, &peer, &service)?;
    let command = Command::CreateService {
        service,
        leader_type: config.leader_type,
    };
    let index = node.write(command).await?;
    Ok(at(index, Json(config).into_response()))
}

pub(super) async fn remove(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
) -> Result<Response, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::DeleteService(&service))?;
    let index = node.write(Command::DeleteService { service }).await?;
    Ok(at(index, ().into_response()))
}

pub(super) async fn show(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    asked: Asked,
) -> Result<Response, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::Read(&service))?;
    if asked.events {
        return stream(&node, Some(&service), asked.since, |_| true).await;
    }
    read(&node, &asked, Local, |state| {
        let of = find(state, &service)?;
        Ok(ServiceInfo {
            config: ServiceConfig {
                leader_type: of.leader_type,
            },
            addresses: state.addresses(of),
        })
    })
    .await
}

pub(super) async fn meta(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    asked: Asked,
) -> Result<Response, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::Read(&service))?;
    read(&node, &asked, Linearizable, |state| {
        let meta = find(state, &service)?.meta.clone();
        meta.ok_or_else(|| Error::not_found("metadata of", &service))
    })
    .await
}

pub(super) async fn set_meta(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    headers: HeaderMap,
    StrictJson(meta): StrictJson<ServiceMeta>,
) -> Result<Response, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::Govern(&service))?;
    input::meta(&meta)?;
    let data = meta.data.clone();
    let request = input::request(&headers)?;
    let command = Command::SetMeta {
        service,
        meta,
        request,
    };
    let index = node.write(command).await?;
    let meta = ServiceMeta {
        data,
        index,
        leader_id: None,
    };
    Ok(at(index, Json(meta).into_response()))
}

pub(super) async fn instances(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    asked: Asked,
) -> Result<Response, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::Read(&service))?;
    if asked.events {
        let wanted = |kind| matches!(kind, EventKind::Up | EventKind::Update | EventKind::Down);
        return stream(&node, Some(&service), asked.since, wanted).await;
    }
    read(&node, &asked, Local, |state| {
        let mut instances: Vec<Instance> = find(state, &service)?.instances.values().cloned().collect();
        instances.sort_by_key(|instance| instance.index);
        Ok(instances)
    })
    .await
}

pub(super) async fn register(
    State((node, door)): App,
    Extension(peer): From,
    Path((service, id)): Path<(String, String)>,
    StrictJson(instance): StrictJson<Instance>,
) -> Result<Response, Error> {
    input::service(&service)?;
    let addr = input::instance(&id, &instance)?;
    let present = node.view.read(|state| find_instance(state, &service, &id));
    let present = present.ok().and_then(|present| address(&present));
    let addrs: Vec<_> = present.into_iter().chain([addr]).collect();
    door.check(&peer, &Action::Register(&service, &addrs))?;
    platform::check(&node, &door, &peer, &service)?;
    node.register(&service, instance).await?;
    let (index, instance) = node.view.read_at(|state| find_instance(state, &service, &id));
    Ok(at(index, Json(instance?).into_response()))
}

pub(super) async fn deregister(
    State((node, door)): App,
    Extension(peer): From,
    Path((service, id)): Path<(String, String)>,
) -> Result<Response, Error> {
    input::service(&service)?;
    input::id(&id)?;
    let present = node.view.read(|state| find_instance(state, &service, &id));
    let addrs: Vec<_> = present.iter().filter_map(address).collect();
    door.check(&peer, &Action::Register(&service, &addrs))?;
    present?;
    let index = node.deregister(service, id).await?;
    Ok(at(index, ().into_response()))
}

pub(super) async fn leader(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    asked: Asked,
) -> Result<Response, Error> {
    input::service(&service)?;
    door.check(&peer, &Action::Read(&service))?;
    if asked.events {
        return stream(&node, Some(&service), asked.since, |kind| {
            kind == EventKind::Leader
        })
        .await;
    }
    read(&node, &asked, Linearizable, |state| {
        let leader = find(state, &service)?.leader().cloned();
        leader.ok_or_else(|| Error::not_found("leader of", &service))
    })
    .await
}

pub(super) async fn set_leader(
    State((node, door)): App,
    Extension(peer): From,
    Path(service): Path<String>,
    StrictJson(instance): StrictJson<Instance>,
) -> Result<Response, Error> {
    input::service(&service)?;
    input::id(&instance.id)?;
    door.check(&peer, &Action::Govern(&service))?;
    let command = Command::SetLeader {
        service,
        id: instance.id,
    };
    let index = node.write(command).await?;
    Ok(at(index, ().into_response()))
}

fn find<'s>(state: &'s Registry, service: &str) -> Result<&'s Service, Error> {
    state.service(service).ok_or_else(|| state::no_service(service))
}

fn find_instance(state: &Registry, service: &str, id: &str) -> Result<Instance, Error> {
    let instance = find(state, service)?.instances.get(id).cloned();
    instance.ok_or_else(|| Error::not_found("instance", id))
}

fn address(instance: &Instance) -> Option<std::net::IpAddr> {
    instance
        .addr
        .parse()
        .map(|addr: SocketAddr| addr.ip().to_canonical())
        .ok()
}
