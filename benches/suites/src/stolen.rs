//! What a hypervisor has given to others: a tail that was measured meanwhile may be theirs.

use std::fs;

use anyhow::{Context as _, Result};

/// The time of all CPUs, in ticks since the machine was started.
#[derive(Clone, Copy)]
pub(crate) struct CpuTime {
    stolen: u64,
    all: u64,
}

impl CpuTime {
    /// As it is now.
    pub(crate) fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        Self::parse(&text).context("/proc/stat is not as expected")
    }

    /// user, nice, system, idle, iowait, irq, softirq and steal; what follows is in the first two.
    fn parse(text: &str) -> Option<Self> {
        let ticks = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
        let ticks: Vec<u64> = ticks.take(8).map(str::parse).collect::<Result<_, _>>().ok()?;
        let stolen = *ticks.get(7)?;
        let all = ticks.iter().sum();
        Some(Self { stolen, all })
    }

    /// Of a hundred ticks since then, how many were stolen.
    #[expect(clippy::cast_precision_loss, reason = "ticks of a few hours")]
    pub(crate) fn stolen_since(self, before: Self) -> f64 {
        let all = self.all.saturating_sub(before.all).max(1);
        self.stolen.saturating_sub(before.stolen) as f64 * 100.0 / all as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_was_stolen() {
        let before = CpuTime::parse("cpu  10 0 10 60 5 0 5 10 3 0\ncpu0 1").unwrap();
        let now = CpuTime::parse("cpu  30 0 20 100 5 0 5 40 9 0\n").unwrap();
        assert!((now.stolen_since(before) - 30.0).abs() < 1e-9);
        assert!(now.stolen_since(now).abs() < 1e-9);
        assert!(CpuTime::parse("cpu 1 2 3").is_none() && CpuTime::parse("").is_none());
    }
}
