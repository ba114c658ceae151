//! Answers that are ready: what [`super::zone`] has found for a name and a type, as bytes, for as long as the registry
//! stays as it is.

use std::collections::HashMap;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{Name, Record, RecordType};
use hickory_proto::serialize::binary::{BinEncodable, BinEncoder, NameEncoding};
use rand::Rng;

use super::plain::{Key, Query};
use super::zone::{self, MAX_UDP_ANSWERS, MAX_UDP_PAYLOAD, labels_of};
use crate::state::State;

/// Names and types that are kept; when there are more, all are forgotten.
const MAX_KEPT: usize = 1 << 16;

/// The answers that are ready.
#[derive(Debug, Default)]
pub struct Ready {
    /// The index of the registry that they are from.
    index: u64,
    answers: HashMap<Box<[u8]>, Answer>,
}

#[derive(Debug)]
struct Answer {
    code: u8,
    /// Without their names.
    records: Vec<Box<[u8]>>,
    /// The SOA, where there are no records.
    authority: Option<Box<[u8]>>,
}

impl Ready {
    /// Forgets everything if the registry is no longer at the index of what is kept.
    pub fn keep_to(&mut self, index: u64) {
        if self.index != index {
            self.index = index;
            self.answers.clear();
        }
    }

    /// Answers from what is kept; false when there is nothing.
    pub fn answer(&self, query: &Query<'_>, key: &Key, into: &mut Vec<u8>, rng: &mut impl Rng) -> bool {
        let Some(answer) = self.answers.get(key.as_bytes()) else {
            return false;
        };
        let chosen = choose(answer.records.len(), rng);
        let records = chosen.iter().map(|at| &*answer.records[*at]);
        query.answer(
            into,
            answer.code,
            records,
            answer.authority.as_deref(),
            MAX_UDP_PAYLOAD,
        );
        true
    }

    /// Finds and keeps the answer to a query; false when it is not a name of ours, or none that is kept ready.
    pub fn make(&mut self, query: &Query<'_>, key: &Key, state: &State) -> bool {
        let Some(answer) = make(query, state, self.index) else {
            return false;
        };
        if self.answers.len() >= MAX_KEPT {
            self.answers.clear();
        }
        self.answers.insert(key.as_bytes().into(), answer);
        true
    }
}

fn make(query: &Query<'_>, state: &State, index: u64) -> Option<Answer> {
    let mut rest = query.name();
    let mut labels = Vec::new();
    while let Some((length, after)) = rest.split_first().filter(|(length, _)| **length > 0) {
        let (label, after) = after.split_at_checked(usize::from(*length))?;
        labels.push(label);
        rest = after;
    }
    let name = Name::from_labels(labels.iter().copied()).ok()?;
    let labels = labels_of(&name);
    let ours = zone::ours(&labels)?;
    let found = zone::look_up(ours, &name, RecordType::from(query.kind), state, index);
    let mut records = Vec::new();
    for (record, additional) in found.iter().flatten() {
        // What goes along with a record is left to the long way.
        if additional.is_some() {
            return None;
        }
        records.push(without_name(record)?);
    }
    let authority = if records.is_empty() {
        Some(bytes(&zone::soa(index)?)?.into())
    } else {
        None
    };
    let code = if found.is_some() {
        ResponseCode::NoError
    } else {
        ResponseCode::NXDomain
    };
    Some(Answer {
        code: u16::from(code).to_be_bytes()[1],
        records,
        authority,
    })
}

fn without_name(record: &Record) -> Option<Box<[u8]>> {
    let name = bytes(&record.name)?;
    Some(bytes(record)?.strip_prefix(&*name)?.into())
}

/// The bytes of something, wherever in a message it comes to be: no name in it points to another place.
fn bytes(of: &impl BinEncodable) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_name_encoding(NameEncoding::Uncompressed);
    of.emit(&mut encoder).ok()?;
    Some(bytes)
}

/// Up to [`MAX_UDP_ANSWERS`] of so many, in random order.
fn choose(count: usize, rng: &mut impl Rng) -> Chosen {
    let mut chosen = Chosen {
        at: [0; MAX_UDP_ANSWERS],
        length: count.min(MAX_UDP_ANSWERS),
    };
    for length in 0..chosen.length {
        // Floyd's way of drawing without replacement: each draw has one more to draw from, and whoever was drawn
        // already gives way to the last.
        let last = count - chosen.length + length;
        let drawn = rng.random_range(0..=last);
        let at = if chosen.at[..length].contains(&drawn) {
            last
        } else {
            drawn
        };
        let place = rng.random_range(0..=length);
        chosen.at[length] = at;
        chosen.at.swap(place, length);
    }
    chosen
}

struct Chosen {
    at: [usize; MAX_UDP_ANSWERS],
    length: usize,
}

impl Chosen {
    fn iter(&self) -> std::slice::Iter<'_, usize> {
        self.at[..self.length].iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_is_chosen_as_often_as_the_others() {
        let mut rng = rand::rng();
        for count in 0..=6_usize {
            let mut first = vec![0_u32; count];
            let mut anywhere = vec![0_u32; count];
            for _ in 0..3_000 {
                let chosen: Vec<usize> = choose(count, &mut rng).iter().copied().collect();
                assert_eq!(chosen.len(), count.min(MAX_UDP_ANSWERS));
                assert_eq!(chosen.iter().collect::<BTreeSet<_>>().len(), chosen.len());
                if let Some(at) = chosen.first() {
                    first[*at] += 1;
                }
                for at in chosen {
                    anywhere[at] += 1;
                }
            }
            // A fair draw is this far off once in a universe.
            for counts in [first, anywhere] {
                let fair = counts.iter().sum::<u32>() / u32::try_from(count.max(1)).unwrap();
                assert!(
                    counts.iter().all(|times| times.abs_diff(fair) < 400),
                    "{counts:?}"
                );
            }
        }
    }
}
