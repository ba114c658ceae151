//! Which backend a request goes to, and whether it may be tried again. Pure: chance and time come from outside.

use std::sync::atomic::{AtomicI64, Ordering};

/// How much a backend has to do now, as the balancer sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load {
    /// It refused a connection a moment ago.
    pub failing: bool,
    /// Requests under way.
    pub in_flight: usize,
}

/// The better of two backends drawn at random (`first`, `second`: any numbers) out of those not yet `tried`.
///
/// Where one of the two is failing, the other wins; where both are, all are looked at, so that one that is well is
/// found if there is any.
pub fn pick(loads: &[Load], tried: &[usize], first: usize, second: usize) -> Option<usize> {
    let left = || (0..loads.len()).filter(|index| !tried.contains(index));
    let count = left().count();
    if count == 0 {
        return None;
    }
    let a = left().nth(first % count)?;
    // Of the others, so that the two differ when they can.
    let b = if count > 1 {
        left().filter(|index| *index != a).nth(second % (count - 1))?
    } else {
        a
    };
    let best = if loads[b] < loads[a] { b } else { a };
    if loads[best].failing {
        left().min_by_key(|index| loads[*index])
    } else {
        Some(best)
    }
}

/// Limits retries to a share of the requests, so that they cannot multiply a load that backends do not stand.
#[derive(Debug)]
pub struct Budget(AtomicI64);

impl Default for Budget {
    fn default() -> Self {
        Self(AtomicI64::new(Self::MOST))
    }
}

impl Budget {
    /// A retry costs so much…
    const RETRY: i64 = 10;
    /// …and a request brings so much: one retry for five requests.
    const REQUEST: i64 = 2;
    /// Retries that can be saved up, a hundred.
    const MOST: i64 = 1000;

    /// A request has come.
    pub fn deposit(&self) {
        let more = |saved: i64| (saved < Self::MOST).then(|| (saved + Self::REQUEST).min(Self::MOST));
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    /// Whether one may be tried again.
    pub fn withdraw(&self) -> bool {
        let less = |saved: i64| (saved >= Self::RETRY).then(|| saved - Self::RETRY);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn loads(in_flight: &[usize]) -> Vec<Load> {
        in_flight
            .iter()
            .map(|in_flight| Load {
                failing: false,
                in_flight: *in_flight,
            })
            .collect()
    }

    #[test]
    fn the_less_loaded_of_two() {
        assert_eq!(pick(&loads(&[5, 3]), &[], 0, 0), Some(1));
        assert_eq!(
            pick(&loads(&[5, 3, 1]), &[], 0, 0),
            Some(1),
            "the third was not drawn"
        );
        assert_eq!(pick(&loads(&[5, 3, 1]), &[1], 0, 0), Some(2));
        assert_eq!(pick(&loads(&[5]), &[0], 7, 9), None);
        assert_eq!(pick(&[], &[], 7, 9), None);
    }

    #[test]
    fn budgets_run_out_and_recover() {
        let budget = Budget::default();
        let granted = (0..1000).filter(|_| budget.withdraw()).count();
        assert_eq!(granted, 100);
        for _ in 0..5 {
            budget.deposit();
        }
        assert!(budget.withdraw() && !budget.withdraw());
    }

    proptest! {
        #[test]
        fn whoever_is_well_is_found(
            all in proptest::collection::vec((any::<bool>(), 0usize..9), 0..8),
            tried in proptest::collection::vec(0usize..8, 0..8),
            first: usize, second: usize,
        ) {
            let all: Vec<Load> = all.into_iter().map(|(failing, in_flight)| Load { failing, in_flight }).collect();
            let left: Vec<usize> = (0..all.len()).filter(|index| !tried.contains(index)).collect();
            match pick(&all, &tried, first, second) {
                None => prop_assert!(left.is_empty()),
                Some(index) => {
                    prop_assert!(left.contains(&index));
                    prop_assert!(!all[index].failing || left.iter().all(|other| all[*other].failing));
                }
            }
        }
    }
}
