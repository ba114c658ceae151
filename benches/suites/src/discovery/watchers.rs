//! A thousand watchers of one service, all at one member: how long until the last of them is told of a change.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use flynn_api::discovery::{ServiceConfig, ServiceMeta};
use memchr::memmem;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::client::value;
use super::cluster::{Cluster, Kind, MEMBERS};
use super::load::percentile;
use super::wire::Events;
use super::{alone, disk};
use crate::row::{Row, Subject};
use crate::suites::Thoroughness;

const WATCHERS: usize = 1_000;
const SERVICE: &str = "watched";
/// Between two changes.
const PAUSE: Duration = Duration::from_millis(50);
/// How long the last may take.
const PATIENCE: Duration = Duration::from_secs(10);

const TOLD: Subject = alone("last of 1,000 watchers told, 99 of 100 within", "ms", 20.0);

/// Takes the row.
pub(super) async fn measured(thoroughness: Thoroughness) -> Row {
    match told(thoroughness.pick(100, 500)).await {
        Ok(mut times) => {
            if let (Some(half), Some(most)) = (percentile(&mut times, 50), percentile(&mut times, 90)) {
                eprintln!(
                    "    last of {WATCHERS} told: half within {half:.1} ms, 9 of 10 within {most:.1} ms"
                );
            }
            match percentile(&mut times, 99) {
                Some(p99) => TOLD.figure(p99, times.len()),
                None => TOLD.missing("nothing was changed"),
            }
        }
        Err(error) => TOLD.missing(format!("{error:#}")),
    }
}

/// From the moment that a write is sent until the last watcher has it.
async fn told(changes: u64) -> Result<Vec<Duration>> {
    let dir = disk()?;
    let cluster = Cluster::start(Kind::Ours, dir.path()).await?;
    let leader = cluster.settled().await?;
    let writer = cluster.client(leader)?;
    writer.create_service(SERVICE, &ServiceConfig::default()).await?;
    // Not at the leader: the change has to get there first.
    let at = cluster.addr((leader + 1) % MEMBERS);
    let change = Arc::new(Change::default());
    let mut watchers = JoinSet::new();
    for _ in 0..WATCHERS {
        let events = Events::open(&cluster.identity, at, &format!("/services/{SERVICE}")).await?;
        watchers.spawn(watch(events, Arc::clone(&change)));
    }
    let (mut index, mut times) = (0, Vec::new());
    for number in 0..=changes {
        change.begin(number);
        let begun = Instant::now();
        let meta = ServiceMeta {
            data: value(number).into(),
            index,
            leader_id: None,
        };
        let written = writer.set_meta(SERVICE, &meta);
        let last = async {
            tokio::select! {
                () = change.told.notified() => Ok(begun.elapsed()),
                Some(ended) = watchers.join_next() => {
                    ended?.context("a watcher has ended")?;
                    bail!("a watcher has ended")
                }
            }
        };
        let (written, last) = tokio::join!(written, tokio::time::timeout(PATIENCE, last));
        index = written?.index;
        let last = last.context("not all were told within 10 s")??;
        // The first finds caches cold.
        if number > 0 {
            times.push(last);
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(times)
}

/// The change that is under way. Only the last who is told of it wakes the one that waits: a thousand wake-ups would be
/// what is measured.
#[derive(Default)]
struct Change {
    number: AtomicU64,
    left: AtomicUsize,
    told: Notify,
}

impl Change {
    fn begin(&self, number: u64) {
        self.number.store(number, Ordering::SeqCst);
        self.left.store(WATCHERS, Ordering::SeqCst);
    }
}

/// Sees that each change is told, once and in its turn.
async fn watch(mut events: Events, change: Arc<Change>) -> Result<()> {
    loop {
        let event = events.next().await?;
        let Some(told) = number(&event)? else { continue };
        let number = change.number.load(Ordering::SeqCst);
        ensure!(told == number, "a watcher is told of {told} and not of {number}");
        match change.left.fetch_sub(1, Ordering::SeqCst) {
            0 => bail!("a watcher is told of {told} twice"),
            1 => change.told.notify_one(),
            _ => {}
        }
    }
}

/// The number that the metadata in this event holds.
fn number(event: &[u8]) -> Result<Option<u64>> {
    if memmem::find(event, br#""kind":"service_meta""#).is_none() {
        return Ok(None);
    }
    let key = br#""data":""#;
    let data = memmem::find(event, key).context("no data")? + key.len();
    let digits = event[data..]
        .split(|byte| *byte == b'"')
        .next()
        .context("no end")?;
    Ok(Some(std::str::from_utf8(digits)?.parse()?))
}
