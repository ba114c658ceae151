//! The registry against a simpler model, under random commands: 500 seeds.
//!
//! A failing seed is printed; `SEED=n` runs that one alone.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};

use flynn_api::Meta;
use flynn_api::discovery::{
    Event, EventKind, Instance, LeaderType, ServiceMeta, VirtualAddresses, VirtualNetworks,
};
use flynn_discovery::command::{Command, Outcome, Registration};
use flynn_discovery::liveness::Registered;
use flynn_discovery::state::State;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

const SEEDS: u64 = 500;
const STEPS: u64 = 200;

/// The model: what a client would believe from outcomes alone.
#[derive(Default)]
struct Model {
    services: BTreeMap<String, ModelService>,
    tokens: BTreeMap<String, (u64, Option<String>)>,
    networks: Option<VirtualNetworks>,
}

struct ModelService {
    manual: bool,
    /// In order of registration.
    instances: Vec<(String, u64)>,
    set_leader: Option<String>,
    meta: Option<(u64, serde_json::Value)>,
}

impl ModelService {
    fn leader(&self) -> Option<&str> {
        let registered = |id: &&String| self.instances.iter().any(|(known, _)| known == *id);
        if self.manual {
            self.set_leader.as_ref().filter(registered).map(String::as_str)
        } else {
            self.instances.first().map(|(id, _)| id.as_str())
        }
    }
}

impl Model {
    /// Whether the command must succeed, and the state after it if so.
    fn step(&mut self, index: u64, command: &Command) -> bool {
        match command {
            Command::CreateService { service, leader_type } => {
                let new = ModelService {
                    manual: *leader_type == LeaderType::Manual,
                    instances: Vec::new(),
                    set_leader: None,
                    meta: None,
                };
                !self.services.contains_key(service) && self.services.insert(service.clone(), new).is_none()
            }
            Command::DeleteService { service } => self.services.remove(service).is_some(),
            Command::PutInstance {
                service, instance, ..
            } => {
                let Some(of) = self.services.get_mut(service) else {
                    return false;
                };
                if of.instances.iter().all(|(id, _)| *id != instance.id) {
                    of.instances.push((instance.id.clone(), index));
                }
                true
            }
            Command::DeleteInstance { service, id } => {
                let Some(of) = self.services.get_mut(service) else {
                    return false;
                };
                let before = of.instances.len();
                of.instances.retain(|(known, _)| known != id);
                of.instances.len() < before
            }
            Command::Expire { instances } => {
                for gone in instances {
                    if let Some(of) = self.services.get_mut(&gone.service) {
                        of.instances
                            .retain(|known| *known != (gone.id.clone(), gone.index));
                    }
                }
                true
            }
            Command::SetMeta { service, meta, .. } => {
                let Some(of) = self.services.get_mut(service) else {
                    return false;
                };
                let leads = |id: &String| of.manual && of.instances.iter().any(|(known, _)| known == id);
                if meta.index != of.meta.as_ref().map_or(0, |(index, _)| *index)
                    || !meta.leader_id.as_ref().is_none_or(leads)
                {
                    return false;
                }
                of.meta = Some((index, meta.data.clone()));
                of.set_leader = meta.leader_id.clone().or(of.set_leader.take());
                true
            }
            Command::SetLeader { service, id } => {
                let Some(of) = self.services.get_mut(service) else {
                    return false;
                };
                let may = of.manual && of.instances.iter().any(|(known, _)| known == id);
                if may {
                    of.set_leader = Some(id.clone());
                }
                may
            }
            Command::SetVirtualNetworks { networks } => *self.networks.get_or_insert(*networks) == *networks,
            Command::NumberServices { .. } => true,
            Command::AddToken { digest, expires, now } => {
                self.tokens.retain(|_, (expires, _)| *expires > *now);
                self.tokens.insert(digest.clone(), (*expires, None));
                true
            }
            Command::UseToken { digest, request, now } => match self.tokens.get_mut(digest) {
                Some((expires, used)) if *expires > *now => {
                    let first = used.get_or_insert_with(|| request.clone());
                    first == request
                }
                _ => false,
            },
        }
    }
}

/// What a watcher of everything knows.
#[derive(Default, PartialEq, Debug)]
struct Watcher {
    instances: BTreeMap<(String, String), Instance>,
    leaders: BTreeMap<String, String>,
    metas: BTreeMap<String, ServiceMeta>,
    services: BTreeMap<String, VirtualAddresses>,
}

impl Watcher {
    fn take(&mut self, event: &Event) {
        let service = event.service.clone();
        match (event.kind, &event.instance) {
            (EventKind::Up, Some(up)) => {
                let before = self.instances.insert((service, up.id.clone()), up.clone());
                assert!(before.is_none(), "up twice: {event:?}");
            }
            (EventKind::Update, Some(new)) => {
                let before = self
                    .instances
                    .insert((service, new.id.clone()), new.clone())
                    .unwrap();
                assert_ne!(before, *new, "an update that changes nothing");
            }
            (EventKind::Down, Some(down)) => {
                assert!(
                    self.instances.remove(&(service, down.id.clone())).is_some(),
                    "down twice"
                );
            }
            (EventKind::Leader, Some(leader)) => {
                let before = self.leaders.insert(service, leader.id.clone());
                assert_ne!(before, Some(leader.id.clone()), "the same leader again");
            }
            (EventKind::Leader, None) => assert!(self.leaders.remove(&service).is_some()),
            (EventKind::ServiceMeta, _) => {
                self.metas.insert(service, event.service_meta.clone().unwrap());
            }
            (EventKind::Service, None) => {
                let addresses = event.addresses.unwrap();
                let before = self.services.insert(service, addresses);
                assert_ne!(before, Some(addresses), "the same addresses again");
            }
            (EventKind::ServiceGone, None) => assert!(self.services.remove(&service).is_some()),
            other => panic!("unexpected event {other:?}"),
        }
    }
}

fn random(rng: &mut StdRng, state: &State, now: &mut u64) -> Command {
    *now += rng.random_range(0..50);
    let service = format!("s{}", rng.random_range(0..4));
    let addr = format!("10.0.0.{}:80", rng.random_range(1..6));
    let mut instance = Instance::new("tcp", addr, Meta::new());
    if rng.random_bool(0.3) {
        instance
            .meta
            .insert("v".into(), rng.random_range(0..3).to_string());
    }
    let id = instance.id.clone();
    let present = state
        .service(&service)
        .and_then(|of| of.meta.as_ref())
        .map_or(0, |meta| meta.index);
    match rng.random_range(0..100) {
        0..8 => {
            let leader_type = if rng.random() {
                LeaderType::Oldest
            } else {
                LeaderType::Manual
            };
            Command::CreateService { service, leader_type }
        }
        8..10 => Command::DeleteService { service },
        10..45 => Command::PutInstance {
            service,
            instance: instance.into(),
            member: rng.random_range(0..4),
        },
        45..55 => Command::DeleteInstance { service, id },
        55..65 => {
            let all: Vec<Registration> = state
                .registrations()
                .map(
                    |Registered {
                         service, id, index, ..
                     }| Registration {
                        service: service.to_owned(),
                        id: id.to_owned(),
                        index,
                    },
                )
                .collect();
            let mut instances: Vec<_> = all.choose_multiple(rng, 2).cloned().collect();
            if rng.random_bool(0.3) {
                // Of a registration that is over.
                for gone in &mut instances {
                    gone.index -= 1;
                }
            }
            Command::Expire { instances }
        }
        65..80 => {
            let index = if rng.random_bool(0.7) {
                present
            } else {
                rng.random_range(0..50)
            };
            let leader_id = rng.random_bool(0.3).then_some(id);
            let data = serde_json::json!({ "n": rng.random_range(0..9) });
            Command::SetMeta {
                service,
                meta: ServiceMeta {
                    data,
                    index,
                    leader_id,
                },
                request: rng.random(),
            }
        }
        80..86 => Command::SetLeader { service, id },
        86..88 => {
            let ipv4 = if rng.random() {
                "100.101.0.0/16"
            } else {
                "10.9.0.0/20"
            };
            Command::SetVirtualNetworks {
                networks: VirtualNetworks {
                    ipv4: ipv4.parse().unwrap(),
                    ..VirtualNetworks::default()
                },
            }
        }
        88..92 => {
            let digest = format!("t{}", rng.random_range(0..5));
            Command::AddToken {
                digest,
                now: *now,
                expires: *now + rng.random_range(0..500),
            }
        }
        _ => {
            let digest = format!("t{}", rng.random_range(0..5));
            Command::UseToken {
                digest,
                request: format!("r{}", rng.random_range(0..3)),
                now: *now,
            }
        }
    }
}

fn check(state: &State, model: &Model, watcher: &Watcher) {
    let names: Vec<_> = state.services().map(|(name, _)| name).collect();
    assert_eq!(names, model.services.keys().collect::<Vec<_>>());
    for (name, of) in state.services() {
        let want = &model.services[name];
        let mut instances: Vec<_> = of
            .instances
            .values()
            .map(|instance| (instance.id.clone(), instance.index))
            .collect();
        instances.sort_by_key(|(_, index)| *index);
        assert_eq!(instances, want.instances);
        assert_eq!(of.leader().map(|leader| leader.id.as_str()), want.leader());
        let meta = of.meta.as_ref().map(|meta| (meta.index, meta.data.clone()));
        assert_eq!(meta, want.meta);
        let indices: BTreeSet<_> = of.instances.values().map(|instance| instance.index).collect();
        assert_eq!(indices.len(), of.instances.len(), "indices are unique");
    }
    // Whoever watched all along knows what a newcomer is told.
    let mut newcomer = Watcher::default();
    for name in state.services().map(|(name, _)| name) {
        for event in state.present(name) {
            newcomer.take(&event);
        }
    }
    // So does whoever watches everything from now on.
    let mut of_all = Watcher::default();
    for event in state.clone().everything() {
        of_all.take(&event);
    }
    assert_eq!(
        (&of_all.instances, &of_all.leaders),
        (&watcher.instances, &watcher.leaders)
    );
    assert_eq!(of_all.services, watcher.services);
    let numbers: BTreeSet<_> = watcher.services.values().map(|of| of.number).collect();
    assert_eq!(numbers.len(), model.services.len(), "numbers are unique");
    let networks = state.networks();
    assert!(
        watcher
            .services
            .values()
            .all(|of| *of == networks.addresses(of.number))
    );
    assert_eq!(watcher.instances, newcomer.instances);
    assert_eq!(watcher.leaders, newcomer.leaders);
    for (name, meta) in &newcomer.metas {
        assert_eq!(watcher.metas.get(name), Some(meta));
    }
}

fn simulate(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut state, mut model, mut watcher) = (State::default(), Model::default(), Watcher::default());
    let mut other = State::default();
    let mut now = 1;
    let mut refused = 0;
    for index in 1..=STEPS {
        let command = random(&mut rng, &state, &mut now);
        let before = state.clone();
        let (outcome, events) = state.apply(index, &command);
        let must = model.step(index, &command);
        match &outcome {
            Outcome::Done { index: at } => {
                assert!(must, "{command} was done");
                assert_eq!(*at, index);
            }
            Outcome::Refused(error) => {
                assert!(!must, "{command} was refused: {error}");
                assert!(events.is_empty());
                refused += 1;
                let expiry_alone = matches!(command, Command::UseToken { .. });
                assert!(
                    expiry_alone || state == before,
                    "a refused command changes nothing"
                );
            }
        }
        for event in &events {
            watcher.take(event);
        }
        check(&state, &model, &watcher);
        // Another member, whose commands came over the wire and whose state came through a snapshot, agrees.
        let wire = serde_json::to_vec(&command).unwrap();
        let (their_outcome, their_events) = other.apply(index, &serde_json::from_slice(&wire).unwrap());
        assert_eq!((their_outcome, their_events), (outcome, events));
        if rng.random_bool(0.05) {
            other = serde_json::from_slice(&serde_json::to_vec(&other).unwrap()).unwrap();
        }
        assert_eq!(other, state);
    }
    assert!(refused > 0 && refused < STEPS, "a run must see both outcomes");
}

#[test]
fn five_hundred_seeds() {
    if let Some(seed) = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()) {
        return simulate(seed);
    }
    for seed in 0..SEEDS {
        let run = std::panic::catch_unwind(|| simulate(seed));
        assert!(run.is_ok(), "seed {seed} fails: run it alone with SEED={seed}");
    }
}

fn create(service: &str) -> Command {
    Command::CreateService {
        service: service.into(),
        leader_type: LeaderType::Oldest,
    }
}

fn number(state: &State, service: &str) -> u32 {
    state.service(service).unwrap().number
}

#[test]
fn a_number_that_was_given_back_is_the_last_to_be_given_again() {
    let mut state = State::default();
    let networks = VirtualNetworks {
        ipv4: "10.0.0.0/24".parse().unwrap(),
        ..VirtualNetworks::default()
    };
    state.apply(1, &Command::SetVirtualNetworks { networks });
    state.apply(2, &create("stays"));
    for round in 0..300 {
        state.apply(3, &create("comes-and-goes"));
        assert_eq!(number(&state, "comes-and-goes"), 2 + round % 126);
        let service = "comes-and-goes".into();
        state.apply(4, &Command::DeleteService { service });
    }
    for at in 1..127 {
        assert!(matches!(
            state.apply(5, &create(&format!("s{at}"))).0,
            Outcome::Done { .. }
        ));
    }
    let (Outcome::Refused(error), _) = state.apply(6, &create("one-more")) else {
        panic!("there are no more numbers");
    };
    assert!(error.message.contains("10.0.0.0/24"), "{error}");
    let elsewhere = VirtualNetworks::default();
    let moved = state.apply(7, &Command::SetVirtualNetworks { networks: elsewhere });
    assert!(matches!(moved.0, Outcome::Refused(_)), "addresses do not move");
}

/// Two members, one of which was restored from an earlier release's snapshot and the other had the log.
#[test]
fn services_of_an_earlier_release_get_the_same_numbers_everywhere() {
    let mut with_log = State::default();
    for (index, service) in (1..).zip(["c", "a", "b"]) {
        with_log.apply(index, &create(service));
    }
    let mut stored = serde_json::to_value(&with_log).unwrap();
    for of in stored["services"].as_object_mut().unwrap().values_mut() {
        of.as_object_mut().unwrap().remove("number");
    }
    stored.as_object_mut().unwrap().remove("last_number");
    stored.as_object_mut().unwrap().remove("networks");
    let mut restored: State = serde_json::from_value(stored).unwrap();
    assert!(restored.addresses(restored.service("a").unwrap()).is_none());
    assert!(
        with_log.numbering().is_none(),
        "whoever has numbers proposes none"
    );

    let command = restored.numbering().unwrap();
    // While it is proposed, another service is made.
    for state in [&mut with_log, &mut restored] {
        state.apply(4, &create("d"));
        state.apply(5, &command);
    }
    let numbers: BTreeSet<_> = with_log.services().map(|(_, of)| of.number).collect();
    assert_eq!(numbers.len(), 4, "{numbers:?}");
    assert!(!numbers.contains(&0));
    assert_eq!(with_log, restored);
}
