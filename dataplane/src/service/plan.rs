//! Which entries change when a service's instances do.

use std::collections::{HashMap, HashSet};

use super::Instance;

/// One write. A service's places are numbered from 0 to its count; programs look at the count first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// This place has this instance.
    Put(u32, Instance),
    /// So many places count.
    Count(u32),
    /// This place is empty.
    Clear(u32),
}

/// The writes from `present` to `wanted`, in an order in which every place below the count is taken at all times.
/// Instances that stay keep their places, but for one that fills a gap for each that the service has become smaller by.
pub(super) fn plan(present: &[Instance], wanted: &[Instance]) -> (Vec<Step>, Vec<Instance>) {
    let by_id: HashMap<u64, &Instance> = wanted.iter().map(|instance| (instance.id, instance)).collect();
    let kept: HashSet<u64> = present
        .iter()
        .map(|instance| instance.id)
        .filter(|id| by_id.contains_key(id))
        .collect();
    let mut seen = kept.clone();
    let mut new = wanted.iter().filter(|instance| seen.insert(instance.id)).copied();
    let mut places: Vec<Option<Instance>> = present
        .iter()
        .map(|old| {
            by_id
                .get(&old.id)
                .map(|instance| **instance)
                .or_else(|| new.next())
        })
        .collect();
    places.extend(new.map(Some));
    // What is missing is filled from the end.
    let mut at = 0;
    while at < places.len() {
        if places[at].is_none() {
            // Either an instance from beyond the gap, or one more gap, the one in hand at the latest.
            let Some(last) = places.pop().flatten() else {
                continue;
            };
            places[at] = Some(last);
        }
        at += 1;
    }
    let places: Vec<Instance> = places.into_iter().flatten().collect();

    let number = |place: usize| u32::try_from(place).unwrap_or(u32::MAX);
    let mut steps: Vec<Step> = places
        .iter()
        .enumerate()
        .filter(|(place, instance)| present.get(*place) != Some(instance))
        .map(|(place, instance)| Step::Put(number(place), *instance))
        .collect();
    if places.len() != present.len() {
        steps.push(Step::Count(number(places.len())));
        steps.extend((places.len()..present.len()).map(|place| Step::Clear(number(place))));
    }
    (steps, places)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::Ipv4Addr};

    use proptest::prelude::*;

    use super::*;

    fn instance(id: u64) -> Instance {
        Instance {
            id,
            address: Ipv4Addr::from_bits(u32::try_from(id).unwrap()).into(),
            address6: None,
        }
    }

    fn instances() -> impl Strategy<Value = Vec<Instance>> {
        proptest::collection::hash_set(0_u64..40, 0..30)
            .prop_map(|ids| ids.into_iter().map(instance).collect())
    }

    proptest! {
        #[test]
        fn there_is_never_a_gap(present in instances(), wanted in instances()) {
            let mut map: BTreeMap<u32, Instance> = (0..).zip(present.iter().copied()).collect();
            let mut count = u32::try_from(present.len()).unwrap();
            let (steps, places) = plan(&present, &wanted);
            for step in &steps {
                match *step {
                    Step::Put(place, instance) => drop(map.insert(place, instance)),
                    Step::Count(new) => count = new,
                    Step::Clear(place) => prop_assert!(map.remove(&place).is_some()),
                }
                prop_assert!((0..count).all(|place| map.contains_key(&place)));
            }
            prop_assert_eq!(map.values().copied().collect::<Vec<_>>(), places);
            let mut ids: Vec<_> = map.values().map(|instance| instance.id).collect();
            let mut expected: Vec<_> = wanted.iter().map(|instance| instance.id).collect();
            ids.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(ids, expected);
            prop_assert_eq!(map.len(), usize::try_from(count).unwrap());
            // No more is written than has to be.
            let changed = present.iter().filter(|old| !wanted.contains(old)).count()
                + wanted.iter().filter(|new| !present.contains(new)).count();
            prop_assert!(steps.len() <= 2 * changed + 1, "{} steps for {} changes", steps.len(), changed);
        }
    }

    #[test]
    fn the_same_twice_counts_once() {
        let (steps, places) = plan(&[], &[instance(1), instance(1)]);
        assert_eq!(steps, [Step::Put(0, instance(1)), Step::Count(1)]);
        assert_eq!(places, [instance(1)]);
    }
}
