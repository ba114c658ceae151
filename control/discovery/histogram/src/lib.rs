//! Stands in for the crate of this name, with the part of its API that openraft uses.
//!
//! openraft counts its batches in histograms, whether or not anybody asks for them. The published crate fills tables for
//! sixteen resolutions when the first value arrives, of which openraft uses one: 25 MiB of every discoverd's memory.
//! Here a histogram has one bucket per power of two, kept in half a kilobyte. The root manifest puts this crate in the
//! other's place (`[patch.crates-io]`).

use std::fmt;
use std::marker::PhantomData;

const BUCKETS: usize = u64::BITS as usize + 1;

/// Counts values by their number of binary digits.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram<T = ()> {
    counts: [u64; BUCKETS],
    data: PhantomData<T>,
}

/// What a histogram comes to. Each percentile is the top of the bucket that it falls in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct PercentileStats {
    pub samples: u64,
    pub p0_1: u64,
    pub p1: u64,
    pub p5: u64,
    pub p10: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
}

/// Several histograms, shown below one another.
#[derive(Clone, Debug, Default)]
pub struct AsciiChart {
    rows: Vec<(String, PercentileStats)>,
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Histogram<T> {
    /// An empty one.
    pub const fn new() -> Self {
        Self {
            counts: [0; BUCKETS],
            data: PhantomData,
        }
    }

    /// Counts a value.
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// Counts a value `n` times.
    pub fn record_n(&mut self, value: u64, n: u64) {
        let digits = (u64::BITS - value.leading_zeros()) as usize;
        self.counts[digits] = self.counts[digits].saturating_add(n);
    }

    /// The usual percentiles.
    pub fn percentile_stats(&self) -> PercentileStats {
        let samples = self
            .counts
            .iter()
            .fold(0_u64, |sum, count| sum.saturating_add(*count));
        let permille = |wanted: u64| {
            let rank = u128::from(samples) * u128::from(wanted) / 1000;
            let mut below = 0_u128;
            let found = self.counts.iter().position(|count| {
                below += u128::from(*count);
                below > rank || (below > 0 && below == u128::from(samples))
            });
            found.map_or(0, top)
        };
        PercentileStats {
            samples,
            p0_1: permille(1),
            p1: permille(10),
            p5: permille(50),
            p10: permille(100),
            p50: permille(500),
            p90: permille(900),
            p99: permille(990),
            p99_9: permille(999),
        }
    }
}

/// The greatest value of so many binary digits.
fn top(digits: usize) -> u64 {
    u32::try_from(digits)
        .ok()
        .and_then(|digits| u64::MAX.checked_shr(u64::BITS - digits))
        .unwrap_or(0)
}

impl<T> fmt::Debug for Histogram<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.percentile_stats(), f)
    }
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "n={} p50={} p90={} p99={} p99.9={}",
            self.samples, self.p50, self.p90, self.p99, self.p99_9
        )
    }
}

impl AsciiChart {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// With one row more.
    #[must_use]
    #[expect(clippy::needless_pass_by_value, reason = "so is the type")]
    pub fn add<T>(mut self, name: impl Into<String>, histogram: Histogram<T>) -> Self {
        self.rows.push((name.into(), histogram.percentile_stats()));
        self
    }
}

impl fmt::Display for AsciiChart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows
            .iter()
            .try_for_each(|(name, stats)| writeln!(f, "{name}: {stats}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_to_a_factor_of_two() {
        let mut histogram = Histogram::<()>::new();
        assert_eq!(histogram.percentile_stats(), PercentileStats::default());
        (1..=1000).for_each(|value| histogram.record(value));
        histogram.record(u64::MAX);
        let stats = histogram.percentile_stats();
        assert_eq!(
            (stats.samples, stats.p1, stats.p50, stats.p99),
            (1001, 15, 511, 1023)
        );
        histogram.record_n(0, 1_000_000);
        assert_eq!(histogram.percentile_stats().p50, 0);
        assert_eq!((top(0), top(1), top(64)), (0, 1, u64::MAX));
    }
}
