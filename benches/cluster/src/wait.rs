//! Waiting for conditions, saying for which.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How many of the errors that are met while waiting are told.
const TOLD: usize = 5;

/// Waits until `attempt` gives something. An error of it is an answer like `None`; the first few that differ are told at
/// once, and the last when time is up.
pub fn until<T>(limit: Duration, what: &str, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    eprintln!("    waiting until {what}");
    let begun = Instant::now();
    let mut told: Vec<String> = Vec::new();
    loop {
        let last = match attempt() {
            Ok(Some(value)) => {
                eprintln!("      after {:.1} s", begun.elapsed().as_secs_f64());
                return Ok(value);
            }
            Ok(None) => None,
            Err(error) => Some(format!("{error:#}")),
        };
        if begun.elapsed() > limit {
            let limit = limit.as_secs();
            match last {
                Some(error) => bail!("waited {limit} s in vain until {what}; at last: {error}"),
                None => bail!("waited {limit} s in vain until {what}"),
            }
        }
        if let Some(error) = last
            && told.len() < TOLD
            && !told.contains(&error)
        {
            let start: String = error.chars().take(300).collect();
            eprintln!("      {:.1} s: {start}", begun.elapsed().as_secs_f64());
            told.push(error);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
