//! Waiting for conditions, saying for which.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Waits until `attempt` gives something; an error of it is an answer like `None`, and is told when time is up.
pub fn until<T>(limit: Duration, what: &str, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    eprintln!("    waiting until {what}");
    let begun = Instant::now();
    loop {
        let last = match attempt() {
            Ok(Some(value)) => {
                eprintln!("      after {:.1} s", begun.elapsed().as_secs_f64());
                return Ok(value);
            }
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if begun.elapsed() > limit {
            let limit = limit.as_secs();
            match last {
                Some(error) => bail!("waited {limit} s in vain until {what}; at last: {error:#}"),
                None => bail!("waited {limit} s in vain until {what}"),
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
