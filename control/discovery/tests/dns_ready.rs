//! The short way to DNS answers against the long one.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::str::FromStr as _;

use flynn_api::Meta;
use flynn_api::discovery::{Instance, LeaderType};
use flynn_discovery::command::Command;
use flynn_discovery::dns::plain::Query;
use flynn_discovery::dns::ready::Ready;
use flynn_discovery::dns::zone::{Reaction, Transport, react};
use flynn_discovery::state::State;
use hickory_proto::op::{Edns, Message, MessageType, OpCode};
use hickory_proto::rr::{Name, RecordType};
use proptest::prelude::*;

fn asked(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    let question = hickory_proto::op::Query::query(Name::from_str(name).unwrap(), kind);
    message.add_query(question);
    message
}

/// A registry with these instances of `web`.
fn registry(addrs: &[String]) -> State {
    let mut state = State::default();
    let create = Command::CreateService {
        service: "web".into(),
        leader_type: LeaderType::Oldest,
    };
    state.apply(1, &create);
    for (index, addr) in (2..).zip(addrs) {
        let put = Command::PutInstance {
            service: "web".into(),
            instance: Instance::new("tcp", addr.clone(), Meta::new()).into(),
            member: 1,
        };
        state.apply(index, &put);
    }
    state
}

proptest! {
    /// Whoever comes by the short way is told the same as by the long one.
    #[test]
    fn ready_answers_are_the_same(
        hosts in proptest::collection::vec((0_u8..6, 1_u16..3, proptest::bool::ANY), 0..7),
        name in 0_usize..14,
        kind in proptest::sample::select(vec![1_u16, 28, 33, 255, 6, 16, 12]),
        capitals: u64,
        edns in proptest::option::of(0_u16..5000),
        recursion: bool,
    ) {
        let addrs: Vec<String> = hosts
            .iter()
            .map(|(host, port, v6)| if *v6 { format!("[fd00::{host}]:{port}") } else { format!("10.0.0.{host}:{port}") })
            .collect();
        let state = registry(&addrs);
        let id = Instance::new("tcp", addrs.first().cloned().unwrap_or_default(), Meta::new()).id;
        let names = [
            "web.discoverd.", "leader.web.discoverd.", "vip.web.discoverd.", "vip.leader.web.discoverd.", "discoverd.",
            "_i.discoverd.", "web._i.discoverd.", "_web._tcp.discoverd.", "nobody.discoverd.", "a.b.c.d.discoverd.",
            "leader.nobody.discoverd.", "discoverd.example.", ".",
        ];
        let name = names.get(name).map_or_else(|| format!("{id}.web._i.discoverd."), |name| (*name).to_owned());
        let name: String = name
            .chars()
            .enumerate()
            .map(|(at, letter)| if capitals >> (at % 64) & 1 == 1 { letter.to_ascii_uppercase() } else { letter })
            .collect();
        let mut query = asked(&name, RecordType::from(kind));
        query.metadata.recursion_desired = recursion;
        if let Some(payload) = edns {
            let mut edns = Edns::new();
            edns.set_max_payload(payload);
            query.set_edns(edns);
        }
        let bytes = query.to_vec().unwrap();
        let read = Query::read(&bytes);
        prop_assert!(read.is_some(), "it is as plain as they come");
        let read = read.unwrap();
        let (key, mut ready, mut answer) = (read.key(), Ready::default(), Vec::new());
        ready.keep_to(9);
        prop_assert!(!ready.answer(&read, &key, &mut answer, &mut rand::rng()), "nothing is kept yet");
        let made = ready.make(&read, &key, &state);
        let long = react(&bytes, Transport::Udp, &state, 9, &mut rand::rng());
        let Reaction::Answer(long) = long else {
            prop_assert!(!made && !read.may_be_ours());
            return Ok(());
        };
        prop_assert!(read.may_be_ours());
        let long = Message::from_vec(&long).unwrap();
        if !made {
            prop_assert!(!long.additionals.is_empty(), "{name} {kind}: not ready, though {long:?}");
            return Ok(());
        }
        prop_assert!(ready.answer(&read, &key, &mut answer, &mut rand::rng()));
        let short = Message::from_vec(&answer).unwrap();
        let Reaction::Answer(all) = react(&bytes, Transport::Tcp, &state, 9, &mut rand::rng()) else {
            return Err(TestCaseError::fail("no answer over TCP"));
        };
        let all = Message::from_vec(&all).unwrap();
        prop_assert_eq!(&short.metadata, &long.metadata);
        prop_assert_eq!(&short.queries, &long.queries);
        prop_assert_eq!(short.answers.len(), long.answers.len());
        prop_assert_eq!(&short.authorities, &long.authorities);
        prop_assert_eq!(&short.edns, &long.edns);
        for (at, record) in short.answers.iter().enumerate() {
            prop_assert!(all.answers.contains(record) && !short.answers[..at].contains(record), "{:?}", short.answers);
        }
    }

    #[test]
    fn any_bytes_are_plain_or_not(bytes: Vec<u8>, tail: Vec<u8>, at in 0_usize..60, byte: u8) {
        let mut damaged = asked("leader.web.discoverd.", RecordType::A).to_vec().unwrap();
        damaged.extend_from_slice(&tail);
        let at = at % damaged.len();
        damaged[at] = byte;
        for bytes in [bytes, damaged] {
            if let Some(read) = Query::read(&bytes) {
                // What is plain is a query for everybody else as well.
                let parsed = Message::from_vec(&bytes);
                prop_assert!(parsed.is_ok() || !read.may_be_ours(), "{parsed:?}");
                let (key, mut ready, mut answer) = (read.key(), Ready::default(), Vec::new());
                if ready.make(&read, &key, &registry(&[])) {
                    prop_assert!(ready.answer(&read, &key, &mut answer, &mut rand::rng()));
                    prop_assert!(Message::from_vec(&answer).is_ok());
                }
            }
        }
    }
}
