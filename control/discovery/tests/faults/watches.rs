//! Watchers of a register, one at each host, who resume with any host after whatever broke off.
//!
//! Each sees the changes in their order, none twice and none left out, or is told that it must begin anew.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use flynn_api::ErrorCode;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::EventKind;
use futures::StreamExt as _;

use crate::history::Value;
use crate::world::{Phase, World, register};

/// The register that is watched.
pub(crate) const WATCHED: usize = 0;
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a watch may take to begin.
const PATIENCE: Duration = Duration::from_secs(3);

/// What one watcher has been told.
#[derive(Default)]
pub(crate) struct Watcher(Mutex<Told>);

#[derive(Default)]
struct Told {
    /// Where it resumes.
    last: Option<String>,
    /// Index and value of each change. Another list for each time that it had to begin anew.
    changes: Vec<Vec<(u64, Value)>>,
    resumed: usize,
}

impl Watcher {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches as long as there is load; the members are asked in this order, the next when one fails.
pub(crate) async fn watch(world: &World, watcher: &Watcher, members: &[DiscoveryClient]) {
    let mut at = 0;
    while *world.phase.borrow() == Phase::Load {
        // A stream that has broken off without a word says so after a while only.
        if let Err(why) = follow(watcher, &members[at % members.len()]).await {
            world.wrong(&format!("a watch cannot be understood: {why:#}"));
        }
        at += 1;
        tokio::time::sleep(PAUSE).await;
    }
}

/// One stream, from where the last one has ended until its own end.
async fn follow(watcher: &Watcher, member: &DiscoveryClient) -> Result<()> {
    let service = register(WATCHED);
    let last = watcher.told().last.clone();
    let begun = tokio::time::timeout(PATIENCE, async {
        match &last {
            Some(last) => member.watch_since(&service, last).await,
            None => member.watch(&service).await,
        }
    });
    let mut stream = match begun.await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) if error.code == ErrorCode::Gone => {
            watcher.told().last = None;
            return Ok(());
        }
        _ => return Ok(()),
    };
    {
        let mut told = watcher.told();
        match last {
            Some(_) => told.resumed += 1,
            None => told.changes.push(Vec::new()),
        }
    }
    while let Some(Ok((_, event))) = stream.next().await {
        let mut told = watcher.told();
        told.last = stream.last_id().map(str::to_owned);
        if event.kind == EventKind::ServiceMeta {
            let meta = event.service_meta.context("metadata without metadata")?;
            let value = meta.data.as_u64().context("a value is no number")?;
            let changes = told.changes.last_mut().context("nothing has begun")?;
            changes.push((meta.index, value));
        }
    }
    Ok(())
}

/// Fails when a watcher was told something twice, not at all, or other than the others. `known` are the changes that
/// there were, as far as clients know. Gives how often watches resumed, and how many changes were told.
pub(crate) fn judge(watchers: &[Watcher], mut known: BTreeMap<u64, Value>) -> Result<(usize, usize)> {
    let all: Vec<_> = watchers.iter().map(Watcher::told).collect();
    for (index, value) in all.iter().flat_map(|told| told.changes.iter().flatten()) {
        let there = *known.entry(*index).or_insert(*value);
        ensure!(there == *value, "at index {index} there are {value} and {there}");
    }
    for (number, told) in all.iter().enumerate() {
        for changes in &told.changes {
            let indexes: Vec<u64> = changes.iter().map(|(index, _)| *index).collect();
            let (Some(first), Some(last)) = (indexes.first(), indexes.last()) else {
                continue;
            };
            ensure!(
                indexes.is_sorted_by(|one, next| one < next),
                "watcher {number} was told twice, or in another order: {indexes:?}"
            );
            let there: Vec<u64> = known.range(first..=last).map(|(index, _)| *index).collect();
            let missing: Vec<&u64> = there.iter().filter(|index| !indexes.contains(index)).collect();
            ensure!(missing.is_empty(), "watcher {number} was not told of {missing:?}");
        }
    }
    let told = all.iter().flat_map(|told| &told.changes).map(Vec::len).sum();
    Ok((all.iter().map(|told| told.resumed).sum(), told))
}
