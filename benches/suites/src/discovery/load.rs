//! Clients that write or read as fast as they are answered.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::task::JoinSet;

use super::client::{Client, value};
use super::cluster::Cluster;

/// What clients do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deed {
    Write,
    Read,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Calls a second.
    pub(crate) rate: f64,
    /// Milliseconds within which 99 of 100 were answered.
    pub(crate) p99: f64,
}

/// Clients with their registers and how often each was written.
pub(crate) struct Load(Vec<(Client, u64)>);

impl Load {
    /// So many clients, whose registers have been written once.
    pub(crate) async fn of(cluster: &Cluster, clients: usize) -> Result<Self> {
        let mut load = Vec::new();
        for mut client in cluster.clients(clients).await? {
            client.make().await?;
            client.write(1).await?;
            load.push((client, 1));
        }
        Ok(Self(load))
    }

    /// Runs for `time`; then every register must hold what was last written to it.
    pub(crate) async fn run(&mut self, deed: Deed, time: Duration) -> Result<Sample> {
        let mut tasks = JoinSet::new();
        let begun = Instant::now();
        for (mut client, mut written) in self.0.drain(..) {
            tasks.spawn(async move {
                let mut took = Vec::new();
                while begun.elapsed() < time {
                    let asked = Instant::now();
                    match deed {
                        Deed::Write => {
                            client.write(written + 1).await?;
                            written += 1;
                        }
                        Deed::Read => {
                            let read = client.read().await?;
                            ensure!(read == value(written), "not what was written last");
                        }
                    }
                    took.push(asked.elapsed());
                }
                anyhow::Ok((client, written, took))
            });
        }
        let mut took = Vec::new();
        while let Some(done) = tasks.join_next().await {
            let (client, written, of_this) = done??;
            took.extend(of_this);
            self.0.push((client, written));
        }
        let elapsed = begun.elapsed();
        for (client, written) in &mut self.0 {
            ensure!(client.read().await? == value(*written), "a write is not there");
        }
        let p99 = percentile(&mut took, 99).context("nothing was done")?;
        Ok(Sample {
            #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52")]
            rate: took.len() as f64 / elapsed.as_secs_f64(),
            p99,
        })
    }
}

/// Milliseconds within which so many of a hundred are.
pub(crate) fn percentile(times: &mut [Duration], percent: usize) -> Option<f64> {
    times.sort_unstable();
    let at = (times.len() * percent).div_ceil(100).saturating_sub(1);
    times.get(at).map(|time| time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_upper_end() {
        let mut times: Vec<_> = (1..=50).rev().map(Duration::from_millis).collect();
        let whole = |time: Option<f64>| time.map(|time| format!("{time:.0}"));
        assert_eq!(whole(percentile(&mut times, 99)), Some("50".to_owned()));
        assert_eq!(whole(percentile(&mut times, 50)), Some("25".to_owned()));
        assert_eq!(percentile(&mut [], 99), None);
    }
}
