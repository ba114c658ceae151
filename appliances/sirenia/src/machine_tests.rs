use std::collections::BTreeMap;

use super::*;

const LABEL: &str = "PEER_ID";

fn peer(id: &str, addr: &str, index: u64) -> Instance {
    let meta = BTreeMap::from([(LABEL.to_owned(), id.to_owned())]);
    Instance {
        index,
        ..Instance::new("tcp", addr, meta)
    }
}

fn machine(me: &Instance, initialised: bool) -> Machine {
    Machine::new(Config {
        label: LABEL,
        me: me.clone(),
        zero: "0/0".into(),
        initialised,
    })
}

fn state(primary: &Instance) -> State {
    State {
        version: STATE_VERSION,
        generation: 1,
        freeze: None,
        singleton: true,
        init_wal: "0/0".into(),
        primary: primary.clone(),
        sync: None,
        asyncs: Vec::new(),
        deposed: Vec::new(),
    }
}

fn service(peers: &[&Instance], state: Option<(State, u64)>) -> Event {
    Event::Service(Service {
        peers: peers.iter().map(|peer| (*peer).clone()).collect(),
        leader: None,
        state: state.map(|(state, index)| Stored { state, index }),
    })
}

fn handle(machine: &mut Machine, event: Event) -> Vec<Action> {
    machine.handle(Timestamp::UNIX_EPOCH, event)
}

#[test]
fn the_first_peer_writes_a_frozen_generation_before_it_makes_a_database() {
    let me = peer("a", "10.0.0.1:5432", 3);
    let mut machine = machine(&me, false);
    assert_eq!(machine.problem(), Some(Problem::Unknown));
    let actions = handle(&mut machine, service(&[&me], None));
    let [
        Action::Write {
            state,
            replaces: 0,
            leader,
        },
    ] = actions.as_slice()
    else {
        panic!("{actions:?}")
    };
    assert!(state.singleton && state.freeze.is_some() && state.generation == 1);
    assert_eq!(leader, &me.id);
    assert_eq!(machine.role(), Role::None);
    let actions = handle(&mut machine, Event::Written(WriteOutcome::Accepted(9)));
    assert_eq!(actions, [Action::Reconfigure(Role::Primary)]);
    assert_eq!(machine.problem(), None);
}

#[test]
fn a_peer_that_is_not_registered_or_not_the_oldest_begins_nothing() {
    let (me, elder) = (peer("b", "10.0.0.2:5432", 5), peer("a", "10.0.0.1:5432", 3));
    let mut machine = machine(&me, false);
    assert_eq!(handle(&mut machine, service(&[], None)), []);
    assert_eq!(handle(&mut machine, service(&[&me, &elder], None)), []);
    assert_eq!(machine.problem(), Some(Problem::NotOldest));
}

#[test]
fn a_database_without_a_state_is_never_taken_for_a_new_cluster() {
    let me = peer("a", "10.0.0.1:5432", 3);
    let mut machine = machine(&me, true);
    assert_eq!(handle(&mut machine, service(&[&me], None)), []);
    assert_eq!(machine.problem(), Some(Problem::StateLost));
}

#[test]
fn a_primary_at_a_new_address_starts_and_moves_the_lead() {
    let (before, me) = (peer("a", "10.0.0.1:5432", 3), peer("a", "10.0.0.7:5432", 8));
    let mut machine = machine(&me, true);
    let actions = handle(&mut machine, service(&[&before, &me], Some((state(&before), 4))));
    let moved = Action::Write {
        state: state(&me),
        replaces: 4,
        leader: me.id.clone(),
    };
    assert_eq!(actions, [moved, Action::Reconfigure(Role::Primary)]);
}

#[test]
fn a_lost_lead_is_taken_back_once() {
    let me = peer("a", "10.0.0.1:5432", 3);
    let mut machine = machine(&me, true);
    let actions = handle(&mut machine, service(&[&me], Some((state(&me), 4))));
    assert!(
        matches!(actions[0], Action::Write { replaces: 4, .. }),
        "{actions:?}"
    );
    assert_eq!(
        handle(&mut machine, Event::Written(WriteOutcome::Accepted(5))),
        []
    );
    // What was true before the write says nothing of the lead now.
    assert_eq!(handle(&mut machine, service(&[&me], Some((state(&me), 4)))), []);
}

#[test]
fn a_conflict_waits_for_a_tick_or_a_newer_state() {
    let me = peer("a", "10.0.0.1:5432", 3);
    let other = peer("b", "10.0.0.2:5432", 2);
    let mut machine = machine(&me, false);
    assert_eq!(handle(&mut machine, service(&[&me], None)).len(), 1);
    assert_eq!(handle(&mut machine, Event::Written(WriteOutcome::Conflict)), []);
    assert!(matches!(
        handle(&mut machine, Event::Tick)[..],
        [Action::Write { replaces: 0, .. }]
    ));
    assert_eq!(handle(&mut machine, Event::Written(WriteOutcome::Conflict)), []);
    let actions = handle(&mut machine, service(&[&me, &other], Some((state(&other), 7))));
    assert_eq!(actions, [Action::Reconfigure(Role::Unassigned)]);
    assert_eq!(machine.problem(), Some(Problem::Singleton));
}

#[test]
fn a_deposed_peer_stops_and_what_is_newer_is_left_alone() {
    let (me, other) = (peer("a", "10.0.0.1:5432", 3), peer("b", "10.0.0.2:5432", 2));
    let mut machine = machine(&me, true);
    handle(&mut machine, service(&[&me], Some((state(&me), 4))));
    handle(&mut machine, Event::Reconfigured(true));
    handle(&mut machine, Event::Written(WriteOutcome::Failed));
    let newer = State {
        version: STATE_VERSION + 1,
        ..state(&other)
    };
    assert_eq!(
        handle(&mut machine, service(&[&me, &other], Some((newer, 5)))),
        []
    );
    assert_eq!(machine.role(), Role::Primary);
    assert_eq!(machine.problem(), Some(Problem::Version(STATE_VERSION + 1)));
    let deposed = State {
        generation: 2,
        deposed: vec![me.clone()],
        ..state(&other)
    };
    let actions = handle(&mut machine, service(&[&me, &other], Some((deposed, 6))));
    assert_eq!(actions, [Action::Reconfigure(Role::Deposed)]);
    assert_eq!(machine.problem(), Some(Problem::Deposed));
}

#[test]
fn a_database_that_fails_is_tried_again_each_second() {
    let me = peer("a", "10.0.0.1:5432", 3);
    let mut machine = machine(&me, true);
    let led = Service {
        leader: Some(me.id.clone()),
        peers: vec![me.clone()],
        ..Service::default()
    };
    let led = Service {
        state: Some(Stored {
            state: state(&me),
            index: 4,
        }),
        ..led
    };
    assert_eq!(
        handle(&mut machine, Event::Service(led)),
        [Action::Reconfigure(Role::Primary)]
    );
    for failure in [
        Event::Reconfigured(false),
        Event::Reconfigured(true),
        Event::DatabaseDown,
    ] {
        let again = matches!(failure, Event::Reconfigured(true));
        assert_eq!(handle(&mut machine, failure), []);
        if !again {
            assert_eq!(
                handle(&mut machine, Event::Tick),
                [Action::Reconfigure(Role::Primary)]
            );
        }
    }
}
