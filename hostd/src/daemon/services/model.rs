//! Who serves what, as discoverd's events add up. Pure.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use flynn_api::discovery::{Event, EventKind};
use flynn_dataplane::service::{Flow, Instance};

/// How long connections to an instance that has said goodbye may go on. One that is asked to stop says goodbye first
/// and then finishes what it has begun; what ends in an orderly way closes its connections itself.
pub(super) const FAREWELL: Duration = Duration::from_mins(5);

/// The services by name.
#[derive(Debug, Default)]
pub(super) struct Model {
    services: HashMap<String, Service>,
    names: HashMap<u32, String>,
}

#[derive(Debug, Default)]
struct Service {
    number: u32,
    /// By id: the registration's index, and where it is.
    instances: BTreeMap<String, (u64, SocketAddr)>,
    leader: Option<(u64, SocketAddr)>,
    /// Registrations that have ended with a goodbye: until when connections to them are spared.
    leaving: HashMap<u64, Instant>,
}

/// What follows from an event.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// Services whose entries in the maps are not right any more.
    pub(super) numbers: Vec<u32>,
    /// An address where nobody is any more.
    pub(super) dead: Option<SocketAddr>,
    /// Whether there may be connections now that lead nowhere.
    pub(super) severs: bool,
}

impl Model {
    /// Takes an event over. Events of services that were not begun with are nothing to us.
    pub(super) fn take(&mut self, event: &Event, now: Instant) -> Change {
        match event.kind {
            EventKind::Service => return self.number(event),
            EventKind::ServiceGone => {
                let gone = self.services.remove(&event.service).map(|of| of.number);
                if let Some(number) = gone {
                    self.names.remove(&number);
                }
                return Change {
                    numbers: gone.into_iter().collect(),
                    severs: true,
                    ..Change::default()
                };
            }
            _ => {}
        }
        let Some(of) = self.services.get_mut(&event.service) else {
            return Change::default();
        };
        let mut change = Change {
            numbers: vec![of.number],
            ..Change::default()
        };
        let instance = event.instance.as_ref();
        let place = instance.and_then(|instance| Some((instance.index, instance.addr.parse().ok()?)));
        match (event.kind, instance) {
            (EventKind::Up | EventKind::Update, Some(instance)) => {
                if let Some(place) = place {
                    of.instances.insert(instance.id.clone(), place);
                }
            }
            (EventKind::Down, Some(instance)) => {
                of.instances.remove(&instance.id);
                if event.expired {
                    change.dead = place.map(|(_, addr)| addr);
                    change.severs = true;
                } else if let Some((index, _)) = place {
                    of.leaving.retain(|_, until| *until > now);
                    of.leaving.insert(index, now + FAREWELL);
                }
            }
            (EventKind::Leader, _) => {
                of.leader = place;
                change.severs = true;
            }
            _ => return Change::default(),
        }
        change
    }

    fn number(&mut self, event: &Event) -> Change {
        let Some(number) = event.addresses.map(|addresses| addresses.number) else {
            return Change::default();
        };
        let of = self.services.entry(event.service.clone()).or_default();
        let before = std::mem::replace(&mut of.number, number);
        let mut numbers = vec![number];
        if before != 0 && before != number {
            // Another service may have it already.
            if self.names.get(&before) == Some(&event.service) {
                self.names.remove(&before);
            }
            numbers.push(before);
        }
        self.names.insert(number, event.service.clone());
        Change {
            numbers,
            ..Change::default()
        }
    }

    /// Keeps to the goodbyes that were heard before the stream of events began anew. What was `known` by service and has
    /// gone unseen is given the benefit of the doubt (but for leaders): it may have said goodbye.
    pub(super) fn inherit(&mut self, before: &Self, known: impl Iterator<Item = (u32, u64)>, now: Instant) {
        for (name, old) in &before.services {
            if let Some(of) = self.services.get_mut(name) {
                of.leaving.clone_from(&old.leaving);
            }
        }
        for (number, instance) in known {
            let name = self.names.get(&number);
            if let Some(of) = name.and_then(|name| self.services.get_mut(name)) {
                of.leaving.entry(instance).or_insert(now + FAREWELL);
            }
        }
        for of in self.services.values_mut() {
            of.leaving
                .retain(|gone, _| of.instances.values().all(|(index, _)| index != gone));
        }
    }

    /// The numbers of all services.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u32> {
        self.names.keys().copied()
    }

    /// The name of the service with this number.
    pub(super) fn name(&self, number: u32) -> Option<&str> {
        self.names.get(&number).map(String::as_str)
    }

    /// What the maps should say of a service.
    pub(super) fn entries(
        &self,
        number: u32,
        ipv6: impl Fn(Ipv4Addr) -> Option<Ipv6Addr>,
    ) -> (Vec<Instance>, Option<Instance>) {
        let Some(of) = self.named(number) else {
            return (Vec::new(), None);
        };
        let instance = |(index, addr): (u64, SocketAddr)| Instance {
            id: index,
            address: addr.ip().to_canonical(),
            address6: match addr.ip().to_canonical() {
                IpAddr::V4(address) => ipv6(address),
                IpAddr::V6(_) => None,
            },
        };
        (
            of.instances.values().copied().map(instance).collect(),
            of.leader.map(instance),
        )
    }

    /// Whether a connection leads nowhere: its leader leads no more, or its instance is gone without a goodbye.
    pub(super) fn is_gone(&self, flow: &Flow, now: Instant) -> bool {
        let Some(of) = self.named(flow.service) else {
            return true;
        };
        if flow.leader {
            return of.leader.is_none_or(|(index, _)| index != flow.instance);
        }
        // One that has registered anew at the same place is the same to whoever is connected to it.
        let is_there = of
            .instances
            .values()
            .any(|(_, addr)| canonical(*addr) == flow.backend);
        !is_there && of.leaving.get(&flow.instance).is_none_or(|until| *until <= now)
    }

    /// When a goodbye is over next.
    pub(super) fn next_farewell(&self, now: Instant) -> Option<Instant> {
        let all = self.services.values().flat_map(|of| of.leaving.values());
        all.filter(|until| **until > now).min().copied()
    }

    fn named(&self, number: u32) -> Option<&Service> {
        self.services.get(self.names.get(&number)?)
    }
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
mod tests {
    use flynn_api::Meta;
    use flynn_api::discovery::{Instance as Registered, VirtualNetworks};

    use super::*;

    const NUMBER: u32 = 7;

    fn registered(addr: &str, index: u64) -> Registered {
        Registered {
            index,
            ..Registered::new("tcp", addr, Meta::new())
        }
    }

    fn event(kind: EventKind, instance: Option<Registered>) -> Event {
        Event {
            instance,
            addresses: (kind == EventKind::Service).then(|| VirtualNetworks::default().addresses(NUMBER)),
            ..Event::new("db", kind, 0)
        }
    }

    fn flow(leader: bool, instance: u64, backend: &str) -> Flow {
        Flow {
            service: NUMBER,
            leader,
            instance,
            backend: backend.parse().unwrap(),
        }
    }

    /// Two instances, the first of which leads.
    fn model(now: Instant) -> Model {
        let mut model = Model::default();
        let (a, b) = (registered("10.0.0.1:5432", 1), registered("10.0.0.2:5432", 2));
        for (kind, instance) in [
            (EventKind::Service, None),
            (EventKind::Up, Some(a.clone())),
            (EventKind::Up, Some(b)),
            (EventKind::Leader, Some(a)),
        ] {
            model.take(&event(kind, instance), now);
        }
        model
    }

    const A: &str = "10.0.0.1:5432";
    const B: &str = "10.0.0.2:5432";

    #[test]
    fn a_deposed_leader_is_gone_for_whoever_asked_for_the_leader() {
        let now = Instant::now();
        let mut model = model(now);
        assert!(!model.is_gone(&flow(true, 1, A), now) && !model.is_gone(&flow(false, 1, A), now));
        let change = model.take(&event(EventKind::Leader, Some(registered(B, 2))), now);
        assert!(change.severs && change.numbers == [NUMBER] && change.dead.is_none());
        assert!(model.is_gone(&flow(true, 1, A), now));
        assert!(!model.is_gone(&flow(false, 1, A), now), "it still serves");
        let (instances, leader) = model.entries(NUMBER, |_| None);
        assert_eq!((instances.len(), leader.map(|leader| leader.id)), (2, Some(2)));
        // The same place, registered anew, is another generation of leader.
        model.take(&event(EventKind::Leader, Some(registered(B, 9))), now);
        assert!(model.is_gone(&flow(true, 2, B), now));
    }

    #[test]
    fn who_says_goodbye_may_finish_and_who_dies_is_dead() {
        let now = Instant::now();
        let mut model = model(now);
        let goodbye = event(EventKind::Down, Some(registered(B, 2)));
        let change = model.take(&goodbye, now);
        assert!(!change.severs && change.dead.is_none());
        assert!(!model.is_gone(&flow(false, 2, B), now));
        assert_eq!(model.next_farewell(now), Some(now + FAREWELL));
        assert!(model.is_gone(&flow(false, 2, B), now + FAREWELL));
        assert_eq!(
            model.entries(NUMBER, |_| None).0.len(),
            1,
            "new connections go elsewhere at once"
        );

        let death = Event {
            expired: true,
            ..event(EventKind::Down, Some(registered(A, 1)))
        };
        let change = model.take(&death, now);
        assert!(change.severs && change.dead == Some(A.parse().unwrap()));
        assert!(model.is_gone(&flow(false, 1, A), now));
        // It is back, at the same place.
        model.take(&event(EventKind::Up, Some(registered(A, 5))), now);
        assert!(!model.is_gone(&flow(false, 1, A), now));
    }

    #[test]
    fn a_stream_that_begins_anew_spares_what_has_gone_unseen() {
        let now = Instant::now();
        let before = model(now);
        let mut after = Model::default();
        for (kind, instance) in [
            (EventKind::Service, None),
            (EventKind::Up, Some(registered(B, 2))),
            (EventKind::Leader, Some(registered(B, 2))),
        ] {
            after.take(&event(kind, instance), now);
        }
        after.inherit(&before, [(NUMBER, 1), (NUMBER, 2)].into_iter(), now);
        assert!(!after.is_gone(&flow(false, 1, A), now) && after.is_gone(&flow(true, 1, A), now));
        assert!(after.is_gone(&flow(false, 1, A), now + FAREWELL));
        assert_eq!(after.next_farewell(now), Some(now + FAREWELL));
        assert!(
            !after.is_gone(&flow(false, 2, B), now + FAREWELL),
            "it is still there"
        );
    }

    #[test]
    fn a_service_that_is_gone_is_gone_with_its_number() {
        let now = Instant::now();
        let mut model = model(now);
        let change = model.take(&event(EventKind::ServiceGone, None), now);
        assert!(change.severs && change.numbers == [NUMBER]);
        assert!(model.is_gone(&flow(false, 2, B), now));
        assert_eq!(model.numbers().count(), 0);
        assert_eq!(
            model.take(&event(EventKind::Up, Some(registered(A, 1))), now),
            Change::default()
        );
    }

    #[test]
    fn a_service_that_gets_another_number_leaves_the_old_one_empty() {
        let now = Instant::now();
        let mut model = model(now);
        let renumbered = Event {
            addresses: Some(VirtualNetworks::default().addresses(8)),
            ..event(EventKind::Service, None)
        };
        assert_eq!(model.take(&renumbered, now).numbers, [8, NUMBER]);
        assert_eq!(model.entries(NUMBER, |_| None), (Vec::new(), None));
        let mapped = |address: Ipv4Addr| Some(address.to_ipv6_mapped());
        let (instances, _) = model.entries(8, mapped);
        assert_eq!(instances.len(), 2);
        assert!(instances.iter().all(|instance| instance.address6.is_some()));
    }
}
