//! The zone `discoverd.`, answered from the registry.
//!
//! | name | answer |
//! | --- | --- |
//! | `svc.discoverd` | A, AAAA: the service's instances |
//! | `leader.svc.discoverd` | A, AAAA: its leader |
//! | `vip.svc.discoverd`, `vip.leader.svc.discoverd` | A, AAAA: its virtual addresses, whoever serves it |
//! | `_svc._proto.discoverd` | SRV: its instances of that protocol, with their addresses |
//! | `<id>.svc._i.discoverd` | A, AAAA: that instance |
//! | `discoverd` | SOA |
//!
//! Answers are shuffled and live zero seconds, but for virtual addresses, which stay as long as the service; over UDP
//! there are no more than three. A name that is there but has no
//! such records answers with none, one that is not there with NXDOMAIN, both with the SOA.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr as _;

use flynn_api::discovery::{Instance, VirtualAddresses};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use rand::Rng;
use rand::seq::SliceRandom as _;

use crate::state::{Service, State};

/// The top of our names.
const ZONE: &str = "discoverd";
/// How long a virtual address may be remembered, in seconds: a service may be removed and made anew.
const VIRTUAL_TTL: u32 = 30;
/// Answers over UDP.
const MAX_UDP_ANSWERS: usize = 3;
/// The longest answer over UDP that needs no fragments anywhere.
pub const MAX_UDP_PAYLOAD: u16 = 1232;
/// Bytes of a message's header.
const HEADER: usize = 12;

/// What a query came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// In one datagram.
    Udp,
    /// On a connection.
    Tcp,
}

/// What to do about a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// Nothing: it is no query.
    Drop,
    /// Answer this.
    Answer(Vec<u8>),
    /// Ask an upstream: the name is not ours.
    Forward,
}

/// Decides about the bytes of a query, by `state`, which reflects the log up to `index`.
pub fn react(bytes: &[u8], transport: Transport, state: &State, index: u64, rng: &mut impl Rng) -> Reaction {
    if bytes.len() < HEADER || bytes[2] & 0x80 != 0 {
        return Reaction::Drop;
    }
    let Ok(query) = Message::from_vec(bytes) else {
        return Reaction::Answer(bare(bytes, ResponseCode::FormErr));
    };
    if query.metadata.op_code != OpCode::Query {
        return Reaction::Answer(bare(bytes, ResponseCode::NotImp));
    }
    let [question] = query.queries.as_slice() else {
        return Reaction::Answer(bare(bytes, ResponseCode::FormErr));
    };
    let labels: Vec<String> = question
        .name()
        .iter()
        .map(|label| String::from_utf8_lossy(label).to_ascii_lowercase())
        .collect();
    let Some((ZONE, ours)) = labels.split_last().map(|(last, ours)| (last.as_str(), ours)) else {
        return Reaction::Forward;
    };
    let mut answer = Message::response(query.metadata.id, OpCode::Query);
    answer.metadata.recursion_desired = query.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.metadata.authoritative = true;
    answer.add_query(question.clone());
    let limit = match transport {
        Transport::Udp => query.max_payload().min(MAX_UDP_PAYLOAD),
        Transport::Tcp => u16::MAX,
    };
    if let Some(edns) = &query.edns {
        let mut ours = Edns::new();
        ours.set_max_payload(MAX_UDP_PAYLOAD);
        answer.set_edns(ours);
        if edns.version() > 0 {
            answer.metadata.response_code = ResponseCode::BADVERS;
            return finish(bytes, &answer, limit);
        }
    }
    if question.query_class() != DNSClass::IN && question.query_class() != DNSClass::ANY {
        answer.metadata.response_code = ResponseCode::Refused;
        return finish(bytes, &answer, limit);
    }
    match find(ours, state) {
        None => answer.metadata.response_code = ResponseCode::NXDomain,
        Some(found) => found.fill(&mut answer, question, transport, index, rng),
    }
    if answer.answers.is_empty() && question.query_type() != RecordType::SOA {
        answer.authorities.extend(soa(index));
    }
    finish(bytes, &answer, limit)
}

/// What a name stands for.
enum Found<'a> {
    /// The top of the zone.
    Top,
    /// A name that only has names below it.
    Branch,
    /// Addresses of these instances.
    Addresses(Vec<&'a Instance>),
    /// A service's or its leader's virtual addresses.
    Virtual([IpAddr; 2]),
    /// Places of these instances of a service.
    Places(&'a str, Vec<&'a Instance>),
}

fn find<'a>(labels: &'a [String], state: &'a State) -> Option<Found<'a>> {
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    let instances = |of: &'a Service| of.instances.values().collect();
    match labels.as_slice() {
        [] => Some(Found::Top),
        ["_i" | "_tcp" | "_udp"] => Some(Found::Branch),
        [service] => state.service(service).map(|of| Found::Addresses(instances(of))),
        ["leader", service] => state
            .service(service)
            .map(|of| Found::Addresses(of.leader().into_iter().collect())),
        ["vip", service] => found_virtual(state, service, |all| [all.ipv4.into(), all.ipv6.into()]),
        ["vip", "leader", service] => found_virtual(state, service, |all| {
            [all.leader_ipv4.into(), all.leader_ipv6.into()]
        }),
        [service, "_i"] => state.service(service).map(|_| Found::Branch),
        [service, proto] => {
            let (service, proto) = (service.strip_prefix('_')?, proto.strip_prefix('_')?);
            let of = state.service(service)?;
            let speaks = |instance: &&Instance| match proto {
                // What is neither is carried by TCP: http, https and the like.
                "tcp" => instance.proto != "udp",
                proto => instance.proto == proto,
            };
            Some(Found::Places(
                service,
                of.instances.values().filter(speaks).collect(),
            ))
        }
        [id, service, "_i"] => {
            let of = state.service(service)?;
            let of_this_id = |instance: &&Instance| instance.id.eq_ignore_ascii_case(id);
            of.instances
                .values()
                .find(of_this_id)
                .map(|instance| Found::Addresses(vec![instance]))
        }
        _ => None,
    }
}

/// Without a number, a service is there but has no virtual address yet.
fn found_virtual<'a>(
    state: &State,
    service: &str,
    which: impl Fn(VirtualAddresses) -> [IpAddr; 2],
) -> Option<Found<'a>> {
    let addresses = state.addresses(state.service(service)?);
    Some(addresses.map_or(Found::Branch, |all| Found::Virtual(which(all))))
}

impl Found<'_> {
    fn fill(
        self,
        answer: &mut Message,
        question: &Query,
        transport: Transport,
        index: u64,
        rng: &mut impl Rng,
    ) {
        let wanted = question.query_type();
        let limit = if transport == Transport::Udp {
            MAX_UDP_ANSWERS
        } else {
            usize::MAX
        };
        match self {
            Self::Top if matches!(wanted, RecordType::SOA | RecordType::ANY) => {
                answer.answers.extend(soa(index));
            }
            Self::Top | Self::Branch => {}
            Self::Addresses(instances) => {
                let mut records: Vec<_> = instances
                    .into_iter()
                    .filter_map(|instance| address(question.name(), instance))
                    .collect();
                records.retain(|record| wanted == RecordType::ANY || record.record_type() == wanted);
                // Instances of one address and several ports are one address.
                records.sort_by_key(|record| record.data.ip_addr());
                records.dedup();
                records.shuffle(rng);
                records.truncate(limit);
                answer.answers = records;
            }
            Self::Virtual(addresses) => {
                let records = addresses
                    .map(|address| Record::from_rdata(question.name().clone(), VIRTUAL_TTL, rdata(address)));
                answer.answers = records.into();
                answer
                    .answers
                    .retain(|record| wanted == RecordType::ANY || record.record_type() == wanted);
            }
            Self::Places(service, mut instances) => {
                if !matches!(wanted, RecordType::SRV | RecordType::ANY) {
                    return;
                }
                instances.shuffle(rng);
                for instance in instances.into_iter().take(limit) {
                    let target = Name::from_labels([
                        instance.id.as_bytes(),
                        service.as_bytes(),
                        b"_i",
                        ZONE.as_bytes(),
                    ]);
                    let (Ok(target), Ok(at)) = (target, instance.addr.parse::<SocketAddr>()) else {
                        continue;
                    };
                    answer.additionals.extend(address(&target, instance));
                    let place = RData::SRV(SRV::new(1, 1, at.port(), target));
                    answer
                        .answers
                        .push(Record::from_rdata(question.name().clone(), 0, place));
                }
            }
        }
    }
}

fn address(name: &Name, instance: &Instance) -> Option<Record> {
    let addr: SocketAddr = instance.addr.parse().ok()?;
    Some(Record::from_rdata(
        name.clone(),
        0,
        rdata(addr.ip().to_canonical()),
    ))
}

fn rdata(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    }
}

/// The SOA; its last field says that what is not there may be there the next moment.
fn soa(index: u64) -> Option<Record> {
    let name = |text| Name::from_str(text).ok();
    let serial = u32::try_from(index & u64::from(u32::MAX)).unwrap_or(0);
    let data = SOA::new(
        name("ns.discoverd.")?,
        name("hostmaster.discoverd.")?,
        serial,
        60,
        10,
        600,
        0,
    );
    Some(Record::from_rdata(name("discoverd.")?, 0, RData::SOA(data)))
}

fn finish(query: &[u8], answer: &Message, limit: u16) -> Reaction {
    let bytes = match answer.to_vec() {
        Ok(bytes) if bytes.len() <= limit.into() => Some(bytes),
        Ok(_) => answer.truncate().to_vec().ok(),
        Err(_) => None,
    };
    Reaction::Answer(bytes.unwrap_or_else(|| bare(query, ResponseCode::ServFail)))
}

/// That nobody could answer.
pub fn failure(query: &[u8]) -> Vec<u8> {
    bare(query, ResponseCode::ServFail)
}

/// An answer that only repeats the question, if that can be read, and carries a code.
fn bare(query: &[u8], code: ResponseCode) -> Vec<u8> {
    let parsed = Message::from_vec(query).ok();
    let id = u16::from_be_bytes([query[0], query[1]]);
    let mut answer = Message::new(id, MessageType::Response, OpCode::from_u8((query[2] >> 3) & 15));
    answer.metadata.response_code = code;
    answer.metadata.recursion_desired = query[2] & 1 != 0;
    answer.metadata.recursion_available = true;
    answer.add_queries(parsed.into_iter().flat_map(|parsed| parsed.queries));
    answer.to_vec().unwrap_or_default()
}
