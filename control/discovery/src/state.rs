//! The registry: what the Raft log adds up to.
//!
//! Pure and deterministic: no clock, no I/O, no randomness, so that every member comes to the same state. A command is
//! applied at its Raft index and either changes the state and says with which events, or is refused and changes nothing.
//!
//! Invariants:
//! - An instance's index is that of its first registration; no two instances of a service share one.
//! - The leader of an `oldest` service is its instance with the lowest index; that of a `manual` service is the one set,
//!   as long as it is registered.
//! - Metadata's index is that of the write which made it. A write that is repeated under the same name is done once.
//! - A token lets one request join, before it expires.
//! - A service has a number from its beginning to its end, and no other has it at the same time; one that was given back
//!   is the last to be given again. Virtual addresses follow from it.

mod numbers;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use flynn_api::discovery::{
    Event, EventKind, Instance, LeaderType, ServiceMeta, VirtualAddresses, VirtualNetworks,
};
use flynn_api::{Error, ErrorCode};
use serde::{Deserialize, Serialize};

use crate::command::{Command, Outcome, Registration};
use crate::liveness::Registered;

/// The version of [`State`]'s stored form that is written. Version 1 had no numbers.
pub const VERSION: u32 = 2;

/// Services that there may be.
pub const MAX_SERVICES: usize = 20_000;
/// Instances that a service may have.
pub const MAX_INSTANCES: usize = 20_000;
/// Writes of a service's metadata that are known when they are repeated.
const MAX_WRITES: usize = 8;
/// Tokens that may wait at a time.
pub const MAX_TOKENS: usize = 1_000;

/// The whole registry.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Shared, for a state is copied whole for each snapshot and each watch of everything.
    #[serde(with = "shared")]
    services: BTreeMap<String, Arc<Service>>,
    tokens: BTreeMap<String, Token>,
    #[serde(default)]
    networks: Option<VirtualNetworks>,
    /// The number that was given last.
    #[serde(default)]
    last_number: u32,
}

/// A service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// How it finds its leader.
    pub leader_type: LeaderType,
    /// Its number; 0 until it has got one.
    #[serde(default)]
    pub number: u32,
    /// By id.
    pub instances: BTreeMap<String, Instance>,
    /// By the instance's id, the Raft id of the member that it registered at last.
    #[serde(default)]
    members: BTreeMap<String, u64>,
    /// Metadata, once it was set.
    #[serde(default)]
    pub meta: Option<ServiceMeta>,
    /// The leader that was set, for `manual`. May have left.
    #[serde(default)]
    manual: Option<String>,
    /// The last writes of the metadata, the latest at the end.
    #[serde(default)]
    writes: VecDeque<Write>,
}

/// A write of metadata, by which it is known when it is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Write {
    /// The index that it replaced.
    replaced: u64,
    index: u64,
    /// Its name; 0 without one.
    request: u64,
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

    /// The events that tell a newcomer of its instances and its leader.
    fn present(&self, service: &str) -> Vec<Event> {
        let up = |instance: &Instance| instance_event(service, EventKind::Up, instance, instance.index);
        let leader = self.leader();
        let leads = leader.map(|leader| instance_event(service, EventKind::Leader, leader, leader.index));
        self.instances.values().map(up).chain(leads).collect()
    }

    /// The Raft id of the member that an instance registered at last; 0 if nobody knows.
    pub fn member_of(&self, id: &str) -> u64 {
        self.members.get(id).copied().unwrap_or(0)
    }

    fn write_that_replaced(&self, index: u64) -> Option<&Write> {
        self.writes.iter().find(|write| write.replaced == index)
    }

    fn leader_id(&self) -> Option<String> {
        self.leader().map(|leader| leader.id.clone())
    }
}

impl State {
    /// A service by name.
    pub fn service(&self, name: &str) -> Option<&Service> {
        self.services.get(name).map(Arc::as_ref)
    }

    /// All services.
    pub fn services(&self) -> impl Iterator<Item = (&String, &Service)> {
        self.services.iter().map(|(name, of)| (name, of.as_ref()))
    }

    /// The networks that virtual addresses are from.
    pub fn networks(&self) -> VirtualNetworks {
        self.networks.unwrap_or_default()
    }

    /// A service's virtual addresses, once it has a number.
    pub fn addresses(&self, of: &Service) -> Option<VirtualAddresses> {
        (of.number != 0).then(|| self.networks().addresses(of.number))
    }

    /// The events that tell a newcomer of everything but metadata, without the final `current`.
    pub fn everything(self) -> impl Iterator<Item = Event> + Send {
        let networks = self.networks();
        self.services.into_iter().flat_map(move |(service, of)| {
            let mut events = vec![service_event(&service, &of, networks, 0)];
            events.extend(of.present(&service));
            events
        })
    }

    /// All registrations.
    pub fn registrations(&self) -> impl Iterator<Item = Registered<'_>> {
        self.services.iter().flat_map(|(service, of)| {
            of.instances.values().map(|instance| Registered {
                service,
                id: &instance.id,
                index: instance.index,
                member: of.member_of(&instance.id),
            })
        })
    }

    /// The events that tell a newcomer of a service's present state, without the final `current`.
    pub fn present(&self, service: &str) -> Vec<Event> {
        let Some(of) = self.services.get(service) else {
            return Vec::new();
        };
        let mut events = of.present(service);
        if let Some(meta) = &of.meta {
            events.push(meta_event(service, meta));
        }
        events
    }

    /// As a cluster begins with it that was recovered or restored: join tokens are void, for nobody knows whether
    /// they have been used since.
    #[must_use]
    pub fn begun_anew(mut self) -> Self {
        self.tokens.clear();
        self
    }

    /// Has a service as it is in `other`, but for its number, if it is there.
    pub fn adopt(&mut self, service: &str, other: &Self) {
        if let Some(of) = other.service(service) {
            let number = self.service(service).map_or(0, |own| own.number);
            let of = Service { number, ..of.clone() };
            self.services.insert(service.to_owned(), Arc::new(of));
        }
    }

    /// Applies the command at `index` of the log.
    pub fn apply(&mut self, index: u64, command: &Command) -> (Outcome, Vec<Event>) {
        if let Some(index) = self.done_earlier(command) {
            return (Outcome::Done { index }, Vec::new());
        }
        match self.try_apply(index, command) {
            Ok(events) => (Outcome::Done { index }, events),
            Err(error) => (Outcome::Refused(error), Vec::new()),
        }
    }

    fn try_apply(&mut self, index: u64, command: &Command) -> Result<Vec<Event>, Error> {
        match command {
            Command::CreateService { service, leader_type } => {
                self.create_service(index, service, *leader_type)
            }
            Command::DeleteService { service } => self.delete_service(index, service),
            Command::PutInstance {
                service,
                instance,
                member,
            } => self.put_instance(index, service, instance, *member),
            Command::DeleteInstance { service, id } => {
                let of = self.find_mut(service)?;
                if !of.instances.contains_key(id) {
                    return Err(Error::not_found("instance", id));
                }
                Ok(of.change(index, service, |of| remove(of, index, service, id)))
            }
            Command::Expire { instances } => Ok(self.expire(index, instances)),
            Command::SetMeta {
                service,
                meta,
                request,
            } => self.set_meta(index, service, meta, *request),
            Command::SetLeader { service, id } => {
                let of = self.find_mut(service)?;
                of.may_lead(service, id)?;
                Ok(of.change(index, service, |of| {
                    of.manual = Some(id.clone());
                    Vec::new()
                }))
            }
            Command::SetVirtualNetworks { networks } => self.set_networks(index, *networks),
            Command::NumberServices { numbers, last } => Ok(self.number(index, numbers, *last)),
            Command::AddToken { digest, now, expires } => self.add_token(digest, *now, *expires),
            Command::UseToken { digest, request, now } => self.use_token(digest, request, *now),
        }
    }

    fn find_mut(&mut self, service: &str) -> Result<&mut Service, Error> {
        let of = self.services.get_mut(service).map(Arc::make_mut);
        of.ok_or_else(|| no_service(service))
    }

    fn create_service(
        &mut self,
        index: u64,
        service: &str,
        leader_type: LeaderType,
    ) -> Result<Vec<Event>, Error> {
        if self.services.contains_key(service) {
            let message = format!("the service {service} is there already");
            return Err(Error::new(ErrorCode::ObjectExists, message));
        }
        full(self.services.len(), MAX_SERVICES, "services")?;
        let number = self.free_number()?;
        self.last_number = number;
        let of = Service {
            leader_type,
            number,
            ..Service::default()
        };
        let event = service_event(service, &of, self.networks(), index);
        self.services.insert(service.to_owned(), Arc::new(of));
        Ok(vec![event])
    }

    fn delete_service(&mut self, index: u64, service: &str) -> Result<Vec<Event>, Error> {
        let of = self.services.remove(service).ok_or_else(|| no_service(service))?;
        let mut of = Arc::unwrap_or_clone(of);
        let ids: Vec<_> = of.instances.keys().cloned().collect();
        let mut events = of.change(index, service, |of| {
            ids.iter().flat_map(|id| remove(of, index, service, id)).collect()
        });
        events.push(Event::new(service, EventKind::ServiceGone, index));
        Ok(events)
    }

    fn put_instance(
        &mut self,
        index: u64,
        service: &str,
        instance: &Instance,
        member: u64,
    ) -> Result<Vec<Event>, Error> {
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
            of.members.insert(instance.id.clone(), member);
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
                events.extend(Arc::make_mut(of).change(index, &gone.service, |of| {
                    let mut events = remove(of, index, &gone.service, &gone.id);
                    for event in &mut events {
                        event.expired = true;
                    }
                    events
                }));
            }
        }
        events
    }

    /// Where a write of metadata was applied that is applied again.
    fn done_earlier(&self, command: &Command) -> Option<u64> {
        let Command::SetMeta {
            service,
            meta,
            request,
        } = command
        else {
            return None;
        };
        let write = self.service(service)?.write_that_replaced(meta.index)?;
        (*request != 0 && write.request == *request).then_some(write.index)
    }

    fn set_meta(
        &mut self,
        index: u64,
        service: &str,
        meta: &ServiceMeta,
        request: u64,
    ) -> Result<Vec<Event>, Error> {
        let of = self.find_mut(service)?;
        let present = of.meta.as_ref().map_or(0, |meta| meta.index);
        if meta.index != present {
            let error = if meta.index == 0 {
                let message = format!("the metadata of {service} is there already, at index {present}");
                Error::new(ErrorCode::ObjectExists, message)
            } else {
                let message = format!(
                    "the metadata of {service} is at index {present}, not {}: read it again and repeat the change",
                    meta.index
                );
                Error::new(ErrorCode::PreconditionFailed, message)
            };
            let error = with_index(error, present);
            // If it is known who replaced it, it was not this one, and it never will be.
            return Err(match of.write_that_replaced(meta.index) {
                Some(_) => error.and_undone(),
                None => error,
            });
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
            if of.writes.len() == MAX_WRITES {
                of.writes.pop_front();
            }
            of.writes.push_back(Write {
                replaced: meta.index,
                index,
                request,
            });
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

    /// Whether there is a token with this digest at this time.
    pub fn knows_token(&self, digest: &str, now: u64) -> Result<(), Error> {
        let token = self.tokens.get(digest).filter(|token| token.expires > now);
        token
            .map(drop)
            .ok_or_else(|| bad_token("is not known or has expired"))
    }

    fn use_token(&mut self, digest: &str, request: &str, now: u64) -> Result<Vec<Event>, Error> {
        self.tokens.retain(|_, token| token.expires > now);
        let Some(token) = self.tokens.get_mut(digest) else {
            return Err(bad_token("is not known or has expired"));
        };
        match &token.used_by {
            Some(by) if by != request => Err(bad_token("has been used")),
            _ => {
                token.used_by = Some(request.to_owned());
                Ok(Vec::new())
            }
        }
    }
}

fn bad_token(why: &str) -> Error {
    let message = format!("the join token {why}: make a new one on a host of the cluster");
    Error::new(ErrorCode::Unauthorized, message)
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
                instance: self.leader().cloned(),
                ..Event::new(service, EventKind::Leader, index)
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
    of.members.remove(id);
    gone.iter()
        .map(|gone| instance_event(service, EventKind::Down, gone, index))
        .collect()
}

fn instance_event(service: &str, kind: EventKind, instance: &Instance, index: u64) -> Event {
    Event {
        instance: Some(instance.clone()),
        ..Event::new(service, kind, index)
    }
}

fn service_event(service: &str, of: &Service, networks: VirtualNetworks, index: u64) -> Event {
    Event {
        addresses: (of.number != 0).then(|| networks.addresses(of.number)),
        ..Event::new(service, EventKind::Service, index)
    }
}

fn meta_event(service: &str, meta: &ServiceMeta) -> Event {
    Event {
        service_meta: Some(meta.clone()),
        ..Event::new(service, EventKind::ServiceMeta, meta.index)
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

/// A map of shared values is stored as one of plain values.
mod shared {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use serde::{Deserialize as _, Deserializer, Serializer};

    use super::Service;

    pub(super) fn serialize<S: Serializer>(
        services: &BTreeMap<String, Arc<Service>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(services.iter().map(|(name, of)| (name, of.as_ref())))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<String, Arc<Service>>, D::Error> {
        let services = BTreeMap::<String, Service>::deserialize(deserializer)?;
        Ok(services
            .into_iter()
            .map(|(name, of)| (name, Arc::new(of)))
            .collect())
    }
}
