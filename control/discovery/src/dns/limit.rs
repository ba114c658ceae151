//! How many queries a client may ask: a bucket of tokens for each address.

use std::collections::HashMap;
use std::net::Ipv4Addr;

/// Addresses that are remembered; when there are more, all are forgotten. A host has a few hundred containers.
const MAX_CLIENTS: usize = 4096;
const MICROS: u64 = 1_000_000;

/// The buckets.
#[derive(Debug)]
pub(super) struct Limits {
    /// Queries a second, and as many at once.
    rate: u64,
    buckets: HashMap<Ipv4Addr, Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// In millionths of a query.
    tokens: u64,
    filled: u64,
}

impl Limits {
    /// So many queries a second.
    pub(super) fn new(rate: u64) -> Self {
        Self {
            rate,
            buckets: HashMap::new(),
        }
    }

    /// Whether a client may ask, at this time in microseconds.
    pub(super) fn allow(&mut self, now: u64, client: Ipv4Addr) -> bool {
        if self.buckets.len() >= MAX_CLIENTS && !self.buckets.contains_key(&client) {
            self.buckets.clear();
        }
        let full = self.rate.saturating_mul(MICROS);
        let bucket = self.buckets.entry(client).or_insert(Bucket {
            tokens: full,
            filled: now,
        });
        let new = now.saturating_sub(bucket.filled).saturating_mul(self.rate);
        bucket.tokens = bucket.tokens.saturating_add(new).min(full);
        bucket.filled = bucket.filled.max(now);
        let may = bucket.tokens >= MICROS;
        if may {
            bucket.tokens -= MICROS;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_its_rate_and_no_more() {
        let mut limits = Limits::new(100);
        let (greedy, modest) = (Ipv4Addr::new(100, 100, 1, 2), Ipv4Addr::new(100, 100, 1, 3));
        let asked = |limits: &mut Limits, from: u64, to: u64| {
            (from..to)
                .filter(|now| limits.allow(*now * 1_000, greedy))
                .count()
        };
        // A burst of a second's worth, then what flows in.
        assert_eq!(asked(&mut limits, 0, 1_000), 199);
        assert_eq!(asked(&mut limits, 1_000, 2_000), 100);
        assert!(limits.allow(2_000_000, modest));
    }
}
