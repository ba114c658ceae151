//! Maglev's ring. Pure: which of a service's members has which slot follows from their names and weights alone, so that
//! every host works out the same; and when a member comes or goes, hardly any slot of the others changes hands.

use flynn_abi::lb::RING_SLOTS;

/// One who wants slots.
#[derive(Clone, Copy, Debug)]
pub struct Member<'n> {
    /// What nobody else is called.
    pub name: &'n [u8],
    /// How many slots it gets, in proportion to the others'. None for 0.
    pub weight: u32,
}

/// Who has each slot, as a place in `members`: empty where nobody wants any. Of equal weights, nobody has more than one
/// slot more than another.
pub fn ring(members: &[Member<'_>]) -> Vec<u16> {
    let Some(most) = members
        .iter()
        .map(|member| u64::from(member.weight))
        .max()
        .filter(|most| *most > 0)
    else {
        return Vec::new();
    };
    // The order of turns must not depend on that of the list.
    let mut turns: Vec<Turn> = members
        .iter()
        .zip(0..)
        .filter(|(member, _)| member.weight > 0)
        .map(|(member, index)| Turn::new(member, index))
        .collect();
    turns.sort_unstable_by_key(|turn| (turn.first, turn.step, turn.index));

    let mut ring = vec![0; RING_SLOTS as usize];
    let mut taken = vec![0_u64; RING_SLOTS.div_ceil(64) as usize];
    let mut left = RING_SLOTS;
    loop {
        for turn in &mut turns {
            turn.credit += turn.weight;
            if turn.credit < most {
                continue;
            }
            turn.credit -= most;
            // Each member prefers the slots in an order of its own.
            let slot = loop {
                let slot = turn.next;
                turn.next = (slot + turn.step) % RING_SLOTS;
                if taken[slot as usize / 64] & 1 << (slot % 64) == 0 {
                    break slot;
                }
            };
            taken[slot as usize / 64] |= 1 << (slot % 64);
            ring[slot as usize] = turn.index;
            left -= 1;
            if left == 0 {
                return ring;
            }
        }
    }
}

struct Turn {
    index: u16,
    first: u32,
    step: u32,
    next: u32,
    weight: u64,
    credit: u64,
}

impl Turn {
    fn new(member: &Member<'_>, index: u16) -> Self {
        let hash = hash(member.name);
        #[expect(clippy::cast_possible_truncation, reason = "one half and the other")]
        let (first, step) = ((hash >> 32) as u32, hash as u32);
        let (first, step) = (first % RING_SLOTS, step % (RING_SLOTS - 1) + 1);
        Self {
            index,
            first,
            step,
            next: first,
            weight: member.weight.into(),
            credit: 0,
        }
    }
}

/// FNV-1a, and a finisher that lets every bit of it count everywhere.
fn hash(name: &[u8]) -> u64 {
    let fnv = name.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mixed = (fnv ^ fnv >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(count: usize) -> Vec<String> {
        (0..count)
            .map(|n| format!("100.100.{}.{}:8080", n / 250, n % 250 + 2))
            .collect()
    }

    fn equal<'n>(names: impl IntoIterator<Item = &'n String>) -> Vec<Member<'n>> {
        let member = |name: &'n String| Member {
            name: name.as_bytes(),
            weight: 1,
        };
        names.into_iter().map(member).collect()
    }

    fn counts(ring: &[u16], members: usize) -> Vec<u32> {
        let mut counts = vec![0; members];
        for &index in ring {
            counts[usize::from(index)] += 1;
        }
        counts
    }

    fn share(part: usize, whole: usize) -> f64 {
        let number = |n: usize| f64::from(u32::try_from(n).unwrap());
        number(part) / number(whole)
    }

    /// Of the slots that `gone` did not have, the share that changed hands.
    fn moved(names: &[String], gone: usize) -> f64 {
        let before = ring(&equal(names));
        let others: Vec<_> = names
            .iter()
            .enumerate()
            .filter(|(index, _)| *index != gone)
            .map(|(_, name)| name.clone())
            .collect();
        let after = ring(&equal(&others));
        let kept: Vec<_> = before
            .iter()
            .zip(&after)
            .filter(|(before, _)| usize::from(**before) != gone)
            .collect();
        let moved = kept
            .iter()
            .filter(|(before, after)| names[usize::from(**before)] != others[usize::from(**after)])
            .count();
        share(moved, kept.len())
    }

    #[test]
    fn one_of_400_goes_and_hardly_a_slot_moves() {
        let names = names(400);
        let shares: Vec<_> = (0..400).step_by(16).map(|gone| moved(&names, gone)).collect();
        let average = shares.iter().sum::<f64>() / 25.0;
        assert!(average <= 0.01, "{average}: {shares:?}");
    }

    #[test]
    fn nobody_gets_nothing() {
        assert!(ring(&[]).is_empty());
        let idle = Member {
            name: b"a",
            weight: 0,
        };
        assert!(ring(&[idle]).is_empty());
        let ring = ring(&[
            idle,
            Member {
                name: b"b",
                weight: 7,
            },
        ]);
        assert!(ring.iter().all(|index| *index == 1));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn equals_are_within_one_of_each_other(count in 1_usize..300) {
            let names = names(count);
            let counts = counts(&ring(&equal(&names)), count);
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            prop_assert!(most - least <= 1, "{least} to {most}");
        }

        #[test]
        fn shares_follow_weights(weights in proptest::collection::vec(0_u32..100, 1..40)) {
            let names = names(weights.len());
            let members: Vec<_> = names.iter().zip(&weights)
                .map(|(name, weight)| Member { name: name.as_bytes(), weight: *weight })
                .collect();
            let total: u32 = weights.iter().sum();
            let ring = ring(&members);
            prop_assert_eq!(ring.is_empty(), total == 0);
            if total == 0 {
                return Ok(());
            }
            for (count, weight) in counts(&ring, weights.len()).into_iter().zip(&weights) {
                let fair = f64::from(RING_SLOTS) * f64::from(*weight) / f64::from(total);
                // In the last round, not everybody had all of their turns.
                let off = 2.0 + share(weights.len() * *weight as usize, total as usize);
                prop_assert!((f64::from(count) - fair).abs() <= off, "{count} instead of {fair}");
            }
        }

        #[test]
        fn the_order_of_the_list_means_nothing(count in 2_usize..60, turn in 1_usize..60) {
            let names = names(count);
            let mut turned = names.clone();
            turned.rotate_left(turn % count);
            let (first, second) = (ring(&equal(&names)), ring(&equal(&turned)));
            for (a, b) in first.into_iter().zip(second) {
                prop_assert_eq!(&names[usize::from(a)], &turned[usize::from(b)]);
            }
        }
    }
}
