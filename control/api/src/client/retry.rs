//! Waiting between attempts.

use std::time::Duration;

/// Waits longer each time, from a quarter of a second to five, until something works.
#[derive(Debug)]
pub struct Retry(Duration);

impl Retry {
    const FIRST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(5);

    /// Waits before the next attempt.
    pub async fn wait(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(Self::LONGEST);
    }

    /// It worked.
    pub fn reset(&mut self) {
        self.0 = Self::FIRST;
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self(Self::FIRST)
    }
}
