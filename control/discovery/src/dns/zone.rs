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
//! | below `in-addr.arpa`, `ip6.arpa` | PTR: the instances at that address; others' addresses are forwarded |
//!
//! Answers are shuffled and live zero seconds, but for virtual addresses, which stay as long as the service; over UDP
//! there are no more than three. A name that is there but has no
//! such records answers with none, one that is not there with NXDOMAIN, both with the SOA.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr as _;

use flynn_api::discovery::{Instance, VirtualAddresses};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use rand::Rng;
use rand::seq::SliceRandom as _;

use crate::state::{Service, State};

/// The top of our names.
const ZONE: &str = "discoverd";
/// How long a virtual address may be remembered, in seconds: a service may be removed and made anew.
const VIRTUAL_TTL: u32 = 30;
/// Answers over UDP.
pub const MAX_UDP_ANSWERS: usize = 3;
/// The longest answer over UDP that needs no fragments anywhere.
pub const MAX_UDP_PAYLOAD: u16 = 1232;
/// Bytes of a message's header.
const HEADER: usize = 12;

/// What a query came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// The name is asked for that has this address ([`reverse`]).
    Reverse(IpAddr),
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
    let labels = labels_of(question.name());
    let Some(ours) = ours(&labels) else {
        return match address_of(&labels) {
            Some(address) if question.query_type() == RecordType::PTR => Reaction::Reverse(address),
            _ => Reaction::Forward,
        };
    };
    let (mut answer, limit) = begin(&query, question, transport);
    if query.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        answer.metadata.response_code = ResponseCode::BADVERS;
        return finish(bytes, &answer, limit);
    }
    if question.query_class() != DNSClass::IN && question.query_class() != DNSClass::ANY {
        answer.metadata.response_code = ResponseCode::Refused;
        return finish(bytes, &answer, limit);
    }
    match look_up(ours, question.name(), question.query_type(), state, index) {
        None => answer.metadata.response_code = ResponseCode::NXDomain,
        Some(mut records) => {
            records.shuffle(rng);
            records.truncate(most(transport));
            for (record, additional) in records {
                answer.answers.push(record);
                answer.additionals.extend(additional);
            }
        }
    }
    if answer.answers.is_empty() {
        answer.authorities.extend(soa(index));
    }
    finish(bytes, &answer, limit)
}

/// An answer without records yet, and how long it may get.
fn begin(query: &Message, question: &Query, transport: Transport) -> (Message, u16) {
    let mut answer = Message::response(query.metadata.id, OpCode::Query);
    answer.metadata.recursion_desired = query.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.metadata.authoritative = true;
    answer.add_query(question.clone());
    if query.edns.is_some() {
        let mut ours = Edns::new();
        ours.set_max_payload(MAX_UDP_PAYLOAD);
        answer.set_edns(ours);
    }
    let limit = match transport {
        Transport::Udp => query.max_payload().min(MAX_UDP_PAYLOAD),
        Transport::Tcp => u16::MAX,
    };
    (answer, limit)
}

/// Answers the question for an address's names with these.
pub fn reverse(bytes: &[u8], transport: Transport, names: &[Name]) -> Vec<u8> {
    let Ok(query) = Message::from_vec(bytes) else {
        return bare(bytes, ResponseCode::FormErr);
    };
    let Some(question) = query.queries.first() else {
        return bare(bytes, ResponseCode::FormErr);
    };
    let (mut answer, limit) = begin(&query, question, transport);
    for name in names.iter().take(most(transport)) {
        let pointer = RData::PTR(PTR(name.clone()));
        answer
            .answers
            .push(Record::from_rdata(question.name().clone(), 0, pointer));
    }
    match finish(bytes, &answer, limit) {
        Reaction::Answer(answer) => answer,
        _ => bare(bytes, ResponseCode::ServFail),
    }
}

/// The address that a name below `in-addr.arpa` or `ip6.arpa` stands for.
fn address_of(labels: &[String]) -> Option<IpAddr> {
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    match labels.as_slice() {
        [d, c, b, a, "in-addr", "arpa"] => format!("{a}.{b}.{c}.{d}").parse().map(IpAddr::V4).ok(),
        [digits @ .., "ip6", "arpa"] if digits.len() == 32 => {
            let mut digits = digits.iter().rev().map(|digit| match digit.as_bytes() {
                [digit] => char::from(*digit).to_digit(16),
                _ => None,
            });
            let bits = digits.try_fold(0_u128, |bits, digit| Some(bits << 4 | u128::from(digit?)));
            bits.map(|bits| IpAddr::V6(bits.into()))
        }
        _ => None,
    }
}

/// The labels of a name, in small letters.
pub fn labels_of(name: &Name) -> Vec<String> {
    name.iter()
        .map(|label| String::from_utf8_lossy(label).to_ascii_lowercase())
        .collect()
}

/// The labels below our zone, if it is one of our names.
pub fn ours(labels: &[String]) -> Option<&[String]> {
    match labels.split_last() {
        Some((last, ours)) if last == ZONE => Some(ours),
        _ => None,
    }
}

/// Records that an answer may have.
fn most(transport: Transport) -> usize {
    match transport {
        Transport::Udp => MAX_UDP_ANSWERS,
        Transport::Tcp => usize::MAX,
    }
}

/// All records of a name, each with the one that goes along with it; `None` when there is no such name. `ours` are its
/// labels below the zone, in small letters.
pub fn look_up(
    ours: &[String],
    name: &Name,
    wanted: RecordType,
    state: &State,
    index: u64,
) -> Option<Vec<(Record, Option<Record>)>> {
    let mut records = find(ours, state)?.records(name, index);
    records.retain(|(record, _)| wanted == RecordType::ANY || record.record_type() == wanted);
    Some(records)
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
    fn records(self, name: &Name, index: u64) -> Vec<(Record, Option<Record>)> {
        let alone = |record| (record, None);
        match self {
            Self::Top => soa(index).map(alone).into_iter().collect(),
            Self::Branch => Vec::new(),
            Self::Addresses(instances) => {
                let mut records: Vec<_> = instances
                    .into_iter()
                    .filter_map(|instance| address(name, instance))
                    .collect();
                // Instances of one address and several ports are one address.
                records.sort_by_key(|record| record.data.ip_addr());
                records.dedup();
                records.into_iter().map(alone).collect()
            }
            Self::Virtual(addresses) => addresses
                .map(|address| alone(Record::from_rdata(name.clone(), VIRTUAL_TTL, rdata(address))))
                .into(),
            Self::Places(service, instances) => instances
                .into_iter()
                .filter_map(|instance| place(name, service, instance))
                .collect(),
        }
    }
}

/// Where an instance is, and its address.
fn place(name: &Name, service: &str, instance: &Instance) -> Option<(Record, Option<Record>)> {
    let target = instance_name(service, &instance.id)?;
    let at: SocketAddr = instance.addr.parse().ok()?;
    let additional = address(&target, instance);
    let place = RData::SRV(SRV::new(1, 1, at.port(), target));
    Some((Record::from_rdata(name.clone(), 0, place), additional))
}

/// The name of an instance.
pub fn instance_name(service: &str, id: &str) -> Option<Name> {
    Name::from_labels([id.as_bytes(), service.as_bytes(), b"_i", ZONE.as_bytes()]).ok()
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
pub fn soa(index: u64) -> Option<Record> {
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
