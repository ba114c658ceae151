//! How long a job that keeps ending must wait.

use jiff::{SignedDuration, Timestamp};

/// A job that was up for so long ended for a new reason: counting begins again.
pub const STEADY: SignedDuration = SignedDuration::from_secs(300);

/// How long the `restarts`th restart waits after the end of the job before it.
pub fn delay(restarts: u32) -> SignedDuration {
    match restarts {
        0..=5 => SignedDuration::ZERO,
        6..=15 => SignedDuration::from_secs(10),
        _ => SignedDuration::from_secs(30),
    }
}

/// What the next restart is, after a job that was the `restarts`th.
pub fn next(restarts: u32, started_at: Option<Timestamp>, ended_at: Timestamp) -> u32 {
    let steady = started_at.is_some_and(|started_at| ended_at.duration_since(started_at) >= STEADY);
    if steady { 1 } else { restarts.saturating_add(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_are_immediate_and_steadiness_is_rewarded() {
        let at = |seconds: i64| Timestamp::from_second(1_000_000 + seconds).unwrap();
        assert_eq!(
            [1, 5, 6, 15, 16, u32::MAX].map(|n| delay(n).as_secs()),
            [0, 0, 10, 10, 30, 30]
        );
        assert_eq!(next(7, Some(at(0)), at(299)), 8);
        assert_eq!(next(7, Some(at(0)), at(300)), 1);
        assert_eq!(next(7, None, at(300)), 8, "it never ran");
    }
}
