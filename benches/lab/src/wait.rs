//! Waiting on conditions, with an end.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// Waits until `condition` holds, looking again after a moment that grows to 50 ms.
pub fn until(limit: Duration, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    let mut pause = Duration::from_millis(1);
    while !condition()? {
        if begun.elapsed() > limit {
            bail!("waited {} s in vain for {what}", limit.as_secs());
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(())
}
