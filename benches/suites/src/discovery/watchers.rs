//! A thousand watchers of one service, all at one member: how long until the last of them is told of a change.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use flynn_api::discovery::{ServiceConfig, ServiceMeta};
use http_body_util::BodyExt as _;
use hyper::Method;
use hyper::body::Incoming;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::client::value;
use super::cluster::{Cluster, Kind, MEMBERS};
use super::load::percentile;
use super::wire::Http1;
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
    let (sender, mut seen) = mpsc::unbounded_channel();
    let mut watchers = JoinSet::new();
    for _ in 0..WATCHERS {
        let mut connection = Http1::open(&cluster.identity, at).await?;
        let path = format!("/services/{SERVICE}");
        let answer = connection
            .send(Method::GET, &path, Bytes::new(), "text/event-stream")
            .await?;
        let sender = sender.clone();
        watchers.spawn(async move {
            // The connection is open as long as its sender is there.
            let _connection = connection;
            watch(answer.into_body(), &sender).await
        });
    }
    drop(sender);
    let (mut index, mut times) = (0, Vec::new());
    for number in 0..=changes {
        let begun = Instant::now();
        let meta = ServiceMeta {
            data: value(number).into(),
            index,
            leader_id: None,
        };
        let written = writer.set_meta(SERVICE, &meta);
        let last = async {
            let mut last = begun;
            for _ in 0..WATCHERS {
                let (told, at) = tokio::select! {
                    Some(told) = seen.recv() => told,
                    Some(ended) = watchers.join_next() => {
                        ended?.context("a watcher has ended")?;
                        bail!("a watcher has ended");
                    }
                };
                ensure!(told == number, "a watcher is told of {told} and not of {number}");
                last = last.max(at);
            }
            anyhow::Ok(last.duration_since(begun))
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

/// Says which number each change carries.
async fn watch(mut body: Incoming, seen: &mpsc::UnboundedSender<(u64, Instant)>) -> Result<()> {
    let mut text = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        text.extend_from_slice(&data);
        while let Some(end) = text.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = text.drain(..end + 2).collect();
            if let Some(number) = number(&event)? {
                seen.send((number, Instant::now()))?;
            }
        }
    }
    bail!("the stream is over")
}

/// The number that the metadata in this event holds.
fn number(event: &[u8]) -> Result<Option<u64>> {
    let text = std::str::from_utf8(event)?;
    if !text.contains(r#""kind":"service_meta""#) {
        return Ok(None);
    }
    let data = text.split_once(r#""data":""#).context("no data")?.1;
    let digits = data.split_once('"').context("no end")?.0;
    Ok(Some(digits.parse()?))
}
