//! The registry: what the Raft log adds up to.
//!
//! Pure and deterministic: no clock, no I/O, no randomness, so that every member comes to the same state. A command is
//! applied at its Raft index and either changes the state and says with which events, or is refused and changes nothing.
//!
//! Invariants:
//! - An instance's index is that of its first registration; no two instances of a service share one.
//! - The leader of an `oldest` service is its instance with the lowest index; that of a `manual` service is the one set,
//!   as long as it is registered.
//! - Metadata's index is that of the write which made it.
//! - A token lets one request join, before it expires.

use std::collections::BTreeMap;

use flynn_api::discovery::{Event, EventKind, Instance, LeaderType, ServiceMeta};
use flynn_api::{Error, ErrorCode};
use serde::{Deserialize, Serialize};

use crate::command::{Command, Outcome, Registration};

/// The version of [`State`]'s stored form that is written.
pub const VERSION: u32 = 1;

/// Services that there may be.
pub const MAX_SERVICES: usize = 20_000;
/// Instances that a service may have.
pub const MAX_INSTANCES: usize = 20_000;
/// Tokens that may wait at a time.
pub const MAX_TOKENS: usize = 1_000;

/// The whole registry.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    services: BTreeMap<String, Service>,
    tokens: BTreeMap<String, Token>,
}

/// A service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// How it finds its leader.
    pub leader_type: LeaderType,
    /// By id.
    pub instances: BTreeMap<String, Instance>,
    /// Metadata, once it was set.
    #[serde(default)]
    pub meta: Option<ServiceMeta>,
    /// The leader that was set, for `manual`. May have left.
    #[serde(default)]
    manual: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Token {
    expires: u64,
    #[serde(default)]
    used_by: Option<String>,
}

impl Service {
    /// The leading instance.
    pub fn leader(&self) -> Option<&Instance> {
        match self.leader_type {
            LeaderType::Oldest => self.instances.values().min_by_key(|instance| instance.index),
            LeaderType::Manual => self.instances.get(self.manual.as_deref()?),
        }
    }

    fn leader_id(&self) -> Option<String> {
        self.leader().map(|leader| leader.id.clone())
    }
}

impl State {
    /// A service by name.
    pub fn service(&self, name: &str) -> Option<&Service> {
        self.services.get(name)
    }

    /// All services.
    pub fn services(&self) -> impl Iterator<Item = (&String, &Service)> {
        self.services.iter()
    }

    /// All registrations.
    pub fn registrations(&self) -> impl Iterator<Item = Registration> {
        self.services.iter().flat_map(|(service, of)| {
            of.instances.values().map(|instance| Registration {
                service: service.clone(),
                id: instance.id.clone(),
                index: instance.index,
            })
        })
    }

    /// The events that tell a newcomer of a service's present state, without the final `current`.
    pub fn present(&self, service: &str) -> Vec<Event> {
        let Some(of) = self.services.get(service) else {
            return Vec::new();
        };
        let mut events: Vec<_> = of
            .instances
            .values()
            .map(|instance| instance_event(service, EventKind::Up, instance, instance.index))
            .collect();
        if let Some(leader) = of.leader() {
            events.push(instance_event(service, EventKind::Leader, leader, leader.index));
        }
        if let Some(meta) = &of.meta {
            events.push(meta_event(service, meta));
        }
        events
    }

    /// Applies the command at `index` of the log.
    pub fn apply(&mut self, index: u64, command: &Command) -> (Outcome, Vec<Event>) {
        match self.try_apply(index, command) {
            Ok(events) => (Outcome::Done { index }, events),
            Err(error) => (Outcome::Refused(error), Vec::new()),
        }
    }

    fn try_apply(&mut self, index: u64, command: &Command) -> Result<Vec<Event>, Error> {
        match command {
            Command::CreateService { service, leader_type } => self.create_service(service, *leader_type),
            Command::DeleteService { service } => self.delete_service(index, service),
            Command::PutInstance { service, instance } => self.put_instance(index, service, instance),
            Command::DeleteInstance { service, id } => {
                let of = self.find_mut(service)?;
                if !of.instances.contains_key(id) {
                    return Err(Error::not_found("instance", id));
                }
                Ok(of.change(index, service, |of| remove(of, index, service, id)))
            }
            Command::Expire { instances } => Ok(self.expire(index, instances)),
            Command::SetMeta { service, meta } => self.set_meta(index, service, meta),
            Command::SetLeader { service, id } => {
                let of = self.find_mut(service)?;
                of.may_lead(service, id)?;
                Ok(of.change(index, service, |of| {
                    of.manual = Some(id.clone());
                    Vec::new()
                }))
            }
            Command::AddToken { digest, now, expires } => self.add_token(digest, *now, *expires),
            Command::UseToken { digest, request, now } => self.use_token(digest, request, *now),
        }
    }

    fn find_mut(&mut self, service: &str) -> Result<&mut Service, Error> {
        self.services.get_mut(service).ok_or_else(|| no_service(service))
    }

    fn create_service(&mut self, service: &str, leader_type: LeaderType) -> Result<Vec<Event>, Error> {
        if self.services.contains_key(service) {
            let message = format!("the service {service} is there already");
            return Err(Error::new(ErrorCode::ObjectExists, message));
        }
        full(self.services.len(), MAX_SERVICES, "services")?;
        self.services.insert(
            service.to_owned(),
            Service {
                leader_type,
                ..Service::default()
            },
        );
        Ok(Vec::new())
    }

    fn delete_service(&mut self, index: u64, service: &str) -> Result<Vec<Event>, Error> {
        let mut of = self.services.remove(service).ok_or_else(|| no_service(service))?;
        let ids: Vec<_> = of.instances.keys().cloned().collect();
        Ok(of.change(index, service, |of| {
            ids.iter().flat_map(|id| remove(of, index, service, id)).collect()
        }))
    }

    fn put_instance(&mut self, index: u64, service: &str, instance: &Instance) -> Result<Vec<Event>, Error> {
        let of = self.find_mut(service)?;
        let known = of.instances.get(&instance.id).map(|known| known.index);
        if known.is_none() {
            full(of.instances.len(), MAX_INSTANCES, "instances of this service")?;
        }
        let instance = Instance {
            index: known.unwrap_or(index),
            ..instance.clone()
        };
        let kind = if known.is_some() {
            EventKind::Update
        } else {
            EventKind::Up
        };
        Ok(of.change(index, service, |of| {
            let before = of.instances.insert(instance.id.clone(), instance.clone());
            if before.as_ref() == Some(&instance) {
                return Vec::new();
            }
            vec![instance_event(service, kind, &instance, index)]
        }))
    }

    fn expire(&mut self, index: u64, instances: &[Registration]) -> Vec<Event> {
        let mut events = Vec::new();
        for gone in instances {
            let Some(of) = self.services.get_mut(&gone.service) else {
                continue;
            };
            if of
                .instances
                .get(&gone.id)
                .is_some_and(|known| known.index == gone.index)
            {
                events.extend(of.change(index, &gone.service, |of| {
                    remove(of, index, &gone.service, &gone.id)
                }));
            }
        }
        events
    }

    fn set_meta(&mut self, index: u64, service: &str, meta: &ServiceMeta) -> Result<Vec<Event>, Error> {
        let of = self.find_mut(service)?;
        let present = of.meta.as_ref().map_or(0, |meta| meta.index);
        if meta.index != present {
            if meta.index == 0 {
                let message = format!("the metadata of {service} is there already, at index {present}");
                return Err(with_index(Error::new(ErrorCode::ObjectExists, message), present));
            }
            let message = format!(
                "the metadata of {service} is at index {present}, not {}: read it again and repeat the change",
                meta.index
            );
            return Err(with_index(
                Error::new(ErrorCode::PreconditionFailed, message),
                present,
            ));
        }
        if let Some(id) = &meta.leader_id {
            of.may_lead(service, id)?;
        }
        let new = ServiceMeta {
            data: meta.data.clone(),
            index,
            leader_id: None,
        };
        Ok(of.change(index, service, |of| {
            if let Some(id) = &meta.leader_id {
                of.manual = Some(id.clone());
            }
            let event = meta_event(service, &new);
            of.meta = Some(new);
            vec![event]
        }))
    }

    fn add_token(&mut self, digest: &str, now: u64, expires: u64) -> Result<Vec<Event>, Error> {
        self.tokens.retain(|_, token| token.expires > now);
        full(self.tokens.len(), MAX_TOKENS, "join tokens")?;
        self.tokens.insert(
            digest.to_owned(),
            Token {
                expires,
                used_by: None,
            },
        );
        Ok(Vec::new())
    }

    fn use_token(&mut self, digest: &str, request: &str, now: u64) -> Result<Vec<Event>, Error> {
        self.tokens.retain(|_, token| token.expires > now);
        let refused = |why: &str| {
            let message = format!("the join token {why}: make a new one on a host of the cluster");
            Err(Error::new(ErrorCode::Unauthorized, message))
        };
        let Some(token) = self.tokens.get_mut(digest) else {
            return refused("is not known or has expired");
        };
        match &token.used_by {
            Some(by) if by != request => refused("has been used"),
            _ => {
                token.used_by = Some(request.to_owned());
                Ok(Vec::new())
            }
        }
    }
}

impl Service {
    /// Does `change` and adds a leader event when the leader is another one afterwards.
    fn change(
        &mut self,
        index: u64,
        service: &str,
        change: impl FnOnce(&mut Self) -> Vec<Event>,
    ) -> Vec<Event> {
        let before = self.leader_id();
        let mut events = change(self);
        if self.leader_id() != before {
            events.push(Event {
                service: service.to_owned(),
                kind: EventKind::Leader,
                instance: self.leader().cloned(),
                service_meta: None,
                index,
            });
        }
        events
    }

    fn may_lead(&self, service: &str, id: &str) -> Result<(), Error> {
        if self.leader_type != LeaderType::Manual {
            return Err(Error::validation(format!(
                "{service} is led by its oldest instance: make it with leader_type manual to set the leader"
            )));
        }
        if !self.instances.contains_key(id) {
            return Err(Error::not_found("instance", id));
        }
        Ok(())
    }
}

fn remove(of: &mut Service, index: u64, service: &str, id: &str) -> Vec<Event> {
    let gone = of.instances.remove(id);
    gone.iter()
        .map(|gone| instance_event(service, EventKind::Down, gone, index))
        .collect()
}

fn instance_event(service: &str, kind: EventKind, instance: &Instance, index: u64) -> Event {
    Event {
        service: service.to_owned(),
        kind,
        instance: Some(instance.clone()),
        service_meta: None,
        index,
    }
}

fn meta_event(service: &str, meta: &ServiceMeta) -> Event {
    Event {
        service: service.to_owned(),
        kind: EventKind::ServiceMeta,
        instance: None,
        service_meta: Some(meta.clone()),
        index: meta.index,
    }
}

/// There is no such service.
pub fn no_service(service: &str) -> Error {
    Error::not_found("service", service)
}

fn with_index(mut error: Error, index: u64) -> Error {
    error.detail = Some(serde_json::json!({ "index": index }));
    error
}

fn full(present: usize, limit: usize, what: &str) -> Result<(), Error> {
    if present < limit {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::LimitExceeded,
        format!("there may be no more than {limit} {what}"),
    ))
}
