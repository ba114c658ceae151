//! What upstreams have answered, for as long as they said that it holds.
//!
//! Kept under the whole query but for its id, so that whoever asks alike gets an answer that was meant for such a query.
//! No clock of its own: the caller says what time it is.

use std::collections::HashMap;

/// Answers that are kept.
const MAX_KEPT: usize = 4096;
/// The longest answer that is kept, and the longest query that one is kept for.
const MAX_LENGTH: usize = 1232;
const MAX_QUERY: usize = 512;
/// The longest that one is kept, in seconds; and one that says that there is nothing.
const MAX_TTL: u32 = 3600;
const MAX_NEGATIVE_TTL: u32 = 60;

const HEADER: usize = 12;
const TRUNCATED: u8 = 0x02;
const TYPE_SOA: u16 = 6;
const TYPE_OPT: u16 = 41;
const NO_ERROR: u8 = 0;
const NAME_ERROR: u8 = 3;

/// The answers.
#[derive(Debug, Default)]
pub(super) struct Cache {
    entries: HashMap<Box<[u8]>, Entry>,
}

#[derive(Debug)]
struct Entry {
    answer: Box<[u8]>,
    /// Where in it the records' times to live are.
    ttls: Vec<usize>,
    /// In milliseconds.
    kept: u64,
    until: u64,
}

impl Cache {
    /// The answer to `query`, of which `end` bytes are header and question, with what is left of its times to live.
    pub(super) fn get(&self, query: &[u8], end: usize, now: u64) -> Option<Vec<u8>> {
        let entry = self
            .entries
            .get(&*key(query, end))
            .filter(|entry| now < entry.until)?;
        let mut answer = entry.answer.to_vec();
        readdress(&mut answer, query, end);
        let age = u32::try_from(now.saturating_sub(entry.kept) / 1000).unwrap_or(u32::MAX);
        for at in &entry.ttls {
            if let Some(field) = answer.get_mut(*at..).and_then(<[u8]>::first_chunk_mut::<4>) {
                *field = u32::from_be_bytes(*field).saturating_sub(age).to_be_bytes();
            }
        }
        Some(answer)
    }

    /// Keeps an answer, if it is one to be kept. The question of both ends at `end`.
    pub(super) fn put(&mut self, query: &[u8], end: usize, answer: &[u8], now: u64) {
        let Some((ttl, ttls)) = lifetime(answer, end).filter(|(ttl, _)| *ttl > 0) else {
            return;
        };
        if answer.len() > MAX_LENGTH || query.len() > MAX_QUERY {
            return;
        }
        if self.entries.len() >= MAX_KEPT {
            self.entries.retain(|_, entry| now < entry.until);
            if self.entries.len() >= MAX_KEPT {
                self.entries.clear();
            }
        }
        let entry = Entry {
            answer: answer.into(),
            ttls,
            kept: now,
            until: now + u64::from(ttl) * 1000,
        };
        self.entries.insert(key(query, end), entry);
    }
}

/// Makes an answer to the same question one to this query: its id, and the question as the client has written it.
pub(super) fn readdress(answer: &mut [u8], query: &[u8], end: usize) {
    answer[..2].copy_from_slice(&query[..2]);
    answer[HEADER..end].copy_from_slice(&query[HEADER..end]);
}

/// What queries that ask alike have in common: all but the id and how the name is written. Of the question's `end` the type and the
/// class are four bytes, which are no letters.
pub(super) fn key(query: &[u8], end: usize) -> Box<[u8]> {
    let mut key: Box<[u8]> = query[2..].into();
    // The lengths of labels are below the letters.
    key[HEADER - 2..end - 2 - 4].make_ascii_lowercase();
    key
}

/// For how many seconds an answer may be kept, and where its times to live are.
fn lifetime(answer: &[u8], end: usize) -> Option<(u32, Vec<usize>)> {
    let code = answer[3] & 0x0f;
    if answer.len() < end || answer[2] & TRUNCATED != 0 || ![NO_ERROR, NAME_ERROR].contains(&code) {
        return None;
    }
    let count = |at: usize| usize::from(u16::from_be_bytes([answer[at], answer[at + 1]]));
    let (answers, records) = (count(6), count(6) + count(8) + count(10));
    let mut at = end;
    let mut ttls = Vec::new();
    let mut least = u32::MAX;
    let mut negative = None;
    for number in 0..records {
        at = skip_name(answer, at)?;
        let fixed = answer.get(at..at + 10)?;
        let kind = u16::from_be_bytes([fixed[0], fixed[1]]);
        let ttl = u32::from_be_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]);
        let length = usize::from(u16::from_be_bytes([fixed[8], fixed[9]]));
        let data = answer.get(at + 10..at + 10 + length)?;
        if kind != TYPE_OPT {
            ttls.push(at + 4);
            least = least.min(ttl);
        }
        if kind == TYPE_SOA && number >= answers {
            let minimum = data.last_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes))?;
            negative = Some(minimum.min(ttl));
        }
        at += 10 + length;
    }
    if at != answer.len() {
        return None;
    }
    // That there is nothing, also behind an alias, holds for as long as the SOA says; without one it is not to be kept (RFC 2308).
    let there = answers > 0 && code == NO_ERROR && negative.is_none();
    let ttl = if there {
        least.min(MAX_TTL)
    } else {
        negative?.min(MAX_NEGATIVE_TTL).min(least)
    };
    Some((ttl, ttls))
}

/// Where the name at `at` ends.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + usize::from(length),
            0xc0.. => return (at + 2 <= message.len()).then_some(at + 2),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dns::forward::question_end;
    use hickory_proto::op::{Message, OpCode, Query, ResponseCode};
    use hickory_proto::rr::rdata::{A, SOA};
    use hickory_proto::rr::{Name, RData, Record, RecordType};
    use std::str::FromStr as _;

    fn query(name: &str, id: u16) -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.id = id;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message.to_vec().unwrap()
    }

    fn reply(query: &[u8], ttls: &[u32], code: ResponseCode, minimum: Option<u32>) -> Vec<u8> {
        let asked = Message::from_vec(query).unwrap();
        let mut answer = Message::response(asked.metadata.id, OpCode::Query);
        answer.metadata.response_code = code;
        let name = asked.queries[0].name().clone();
        answer.add_queries(asked.queries);
        for ttl in ttls {
            answer.add_answer(Record::from_rdata(
                name.clone(),
                *ttl,
                RData::A(A::new(192, 0, 2, 1)),
            ));
        }
        if let Some(minimum) = minimum {
            let ns = Name::from_str("ns.example.").unwrap();
            let soa = SOA::new(ns.clone(), ns, 1, 2, 3, 4, minimum);
            answer
                .authorities
                .push(Record::from_rdata(name, 600, RData::SOA(soa)));
        }
        answer.to_vec().unwrap()
    }

    fn kept(cache: &Cache, query: &[u8], now: u64) -> Option<Message> {
        let end = question_end(query).unwrap();
        cache
            .get(query, end, now)
            .map(|answer| Message::from_vec(&answer).unwrap())
    }

    fn put(cache: &mut Cache, query: &[u8], answer: &[u8]) {
        cache.put(query, question_end(query).unwrap(), answer, 0);
    }

    #[test]
    fn an_answer_is_kept_for_its_shortest_time() {
        let mut cache = Cache::default();
        let first = query("example.com.", 1);
        put(
            &mut cache,
            &first,
            &reply(&first, &[300, 20], ResponseCode::NoError, None),
        );
        let other = query("EXAMPLE.com.", 2);
        let answer = kept(&cache, &other, 5_999).unwrap();
        assert_eq!(answer.metadata.id, 2);
        assert_eq!(answer.queries[0].name().to_ascii(), "EXAMPLE.com.");
        let ttls: Vec<u32> = answer.answers.iter().map(|record| record.ttl).collect();
        assert_eq!(ttls, [295, 15]);
        assert!(kept(&cache, &other, 20_000).is_none());
        assert!(kept(&cache, &query("example.org.", 1), 0).is_none());
    }

    #[test]
    fn what_is_not_there_is_kept_as_long_as_the_soa_says() {
        let mut cache = Cache::default();
        let name = query("nobody.example.", 1);
        put(
            &mut cache,
            &name,
            &reply(&name, &[], ResponseCode::NXDomain, Some(5)),
        );
        assert!(kept(&cache, &name, 4_999).is_some() && kept(&cache, &name, 5_000).is_none());
        for (name, answer) in [
            ("no-soa.", (ResponseCode::NXDomain, None)),
            ("failed.", (ResponseCode::ServFail, Some(5))),
            ("at-once.", (ResponseCode::NoError, Some(0))),
        ] {
            let name = query(name, 1);
            put(&mut cache, &name, &reply(&name, &[], answer.0, answer.1));
            assert!(kept(&cache, &name, 0).is_none());
        }
    }

    #[test]
    fn nothing_behind_an_alias_is_kept_no_longer() {
        let mut cache = Cache::default();
        for (name, code) in [
            ("alias.", ResponseCode::NXDomain),
            ("bare.", ResponseCode::NoError),
        ] {
            let name = query(name, 1);
            put(&mut cache, &name, &reply(&name, &[3600], code, Some(5)));
            assert!(kept(&cache, &name, 4_999).is_some() && kept(&cache, &name, 5_000).is_none());
        }
        let name = query("no-soa.", 1);
        put(
            &mut cache,
            &name,
            &reply(&name, &[3600], ResponseCode::NXDomain, None),
        );
        assert!(kept(&cache, &name, 0).is_none());
    }

    #[test]
    fn types_are_no_letters() {
        let mut cache = Cache::default();
        let mut https = query("example.com.", 1);
        let end = question_end(&https).unwrap();
        https[end - 3] = 65;
        put(
            &mut cache,
            &https,
            &reply(&https, &[60], ResponseCode::NoError, None),
        );
        assert!(cache.get(&https, end, 0).is_some());
        let mut other = https.clone();
        other[end - 3] = 97;
        assert!(cache.get(&other, end, 0).is_none());
    }

    #[test]
    fn long_queries_fill_nothing() {
        let mut cache = Cache::default();
        let mut long = query("example.com.", 1);
        let answer = reply(&long, &[60], ResponseCode::NoError, None);
        long.resize(MAX_QUERY + 1, 0);
        put(&mut cache, &long, &answer);
        assert!(cache.entries.is_empty());
    }

    proptest::proptest! {
        #[test]
        fn any_answer_is_judged(at: proptest::sample::Index, byte: u8, cut: proptest::sample::Index, minimum: Option<u32>) {
            let mut cache = Cache::default();
            let name = query("a.example.", 1);
            let end = question_end(&name).unwrap();
            let mut answer = reply(&name, &[300, 20], ResponseCode::NoError, minimum);
            // The question is compared before.
            let damaged = end + at.index(answer.len() - end);
            answer[damaged] = byte;
            if byte % 4 == 0 {
                answer.truncate(end + cut.index(answer.len() - end));
            }
            put(&mut cache, &name, &answer);
            if let Some(kept) = cache.get(&name, end, 0) {
                proptest::prop_assert_eq!(kept, answer);
            }
        }
    }
}
