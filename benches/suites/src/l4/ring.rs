//! Maglev's rings: how long one takes, and how many slots move that need not.

use std::time::Instant;

use flynn_dataplane::lb::maglev::{Member, ring};

use super::{SUITE, number};
use crate::row::{Goal, Row, Subject};

const MEMBERS: u16 = 400;

const fn subject(name: &'static str, unit: &'static str, most: f64) -> Subject {
    Subject {
        suite: SUITE,
        name,
        unit,
        peer: None,
        goal: Goal::AtMost(most),
    }
}

pub(super) fn rows() -> Vec<Row> {
    let names: Vec<String> = (0..MEMBERS)
        .map(|n| format!("100.100.{}.{}:8080", n / 250, n % 250 + 2))
        .collect();
    let members: Vec<Member<'_>> = names
        .iter()
        .map(|name| Member {
            name: name.as_bytes(),
            weight: 1,
        })
        .collect();
    let times: Vec<f64> = (0..101)
        .map(|_| {
            let began = Instant::now();
            std::hint::black_box(ring(std::hint::black_box(&members)));
            began.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    let before = ring(&members);
    let mut held = vec![0_u64; members.len()];
    for index in &before {
        held[usize::from(*index)] += 1;
    }
    let spread = held.iter().max().unwrap_or(&0) - held.iter().min().unwrap_or(&0);
    let moved: Vec<f64> = (0..members.len())
        .map(|gone| moved(&members, &before, gone))
        .collect();
    vec![
        subject("Maglev, 400 backends: build", "ms", 2.0).row(&times, &[]),
        subject("Maglev, 400 backends: most slots over fewest", "slots", 1.0).row(&[number(spread)], &[]),
        subject(
            "Maglev, 400 backends, each removed once: other slots moved",
            "%",
            1.0,
        )
        .row(&moved, &[]),
    ]
}

/// The share of slots of others that change hands when one goes.
fn moved(members: &[Member<'_>], before: &[u16], gone: usize) -> f64 {
    let others: Vec<_> = members
        .iter()
        .enumerate()
        .filter(|(index, _)| *index != gone)
        .map(|(_, member)| *member)
        .collect();
    let after = ring(&others);
    let kept = before
        .iter()
        .zip(&after)
        .filter(|(before, _)| usize::from(**before) != gone);
    let (mut all, mut moved) = (0, 0);
    for (before, after) in kept {
        all += 1;
        moved += u64::from(members[usize::from(*before)].name != others[usize::from(*after)].name);
    }
    100.0 * number(moved) / number(all)
}
