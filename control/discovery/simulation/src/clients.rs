//! Clients: they register, deregister, compare and swap, and read, and tell the chronicle what they were told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use flynn_api::discovery::{Consistency, Instance, LeaderType, ServiceMeta};
use flynn_discovery::command::Command;
use flynn_discovery::node::Forwarded;
use openraft::async_runtime::WatchReceiver as _;
use rand::RngExt as _;

use crate::cluster::Cluster;
use crate::executor::{draw, sleep};
use crate::network::CLIENTS;

/// The service that all write to.
pub(crate) const SERVICE: &str = "web";
/// A client gives up after this long, and does not know then.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often a client asks another when it was told that one does not lead.
const ATTEMPTS: u32 = 8;

pub(crate) fn create() -> Command {
    Command::CreateService {
        service: SERVICE.to_owned(),
        leader_type: LeaderType::Oldest,
    }
}

/// Registers an instance that is like no other.
pub(crate) fn register(client: u64, number: u64) -> Command {
    let id = format!("{client}-{number}");
    Command::PutInstance {
        service: SERVICE.to_owned(),
        instance: Arc::new(Instance {
            addr: format!("192.0.2.{client}:{number}"),
            proto: "tcp".to_owned(),
            meta: BTreeMap::from([("n".to_owned(), id.clone())]),
            index: 0,
            id,
        }),
        member: 1 + client,
    }
}

/// Calls until `over`.
pub(crate) async fn client(client: u64, cluster: Cluster, lease: bool) {
    let (mut number, mut meta, mut there) = (0, 0, Vec::new());
    while !cluster.over() {
        sleep(Duration::from_millis(draw(|random| random.random_range(5..150)))).await;
        number += 1;
        match draw(|random| random.random_range(0..10)) {
            0..=3 => {
                if write(&cluster, register(client, number)).await == Some(true) {
                    there.push(format!("{client}-{number}"));
                }
            }
            4 if !there.is_empty() => {
                let at = draw(|random| random.random_range(0..there.len()));
                let service = SERVICE.to_owned();
                let id = there.swap_remove(at);
                write(&cluster, Command::DeleteInstance { service, id }).await;
            }
            4..=6 => {
                let command = Command::SetMeta {
                    service: SERVICE.to_owned(),
                    meta: ServiceMeta {
                        data: format!("{client}-{number}").into(),
                        index: meta,
                        leader_id: None,
                    },
                    request: client * 1_000_000 + number,
                };
                write(&cluster, command).await;
            }
            _ => {
                let weak = lease && draw(|random| random.random_bool(0.5));
                let strength = if weak {
                    Consistency::Lease
                } else {
                    Consistency::Linearizable
                };
                meta = read(&cluster, strength).await.unwrap_or(meta);
            }
        }
    }
}

fn someone(cluster: &Cluster) -> Option<u64> {
    let running = cluster.net().running();
    let at = draw(|random| random.random_range(0..running.len().max(1)));
    running.get(at).map(|(id, _)| *id)
}

/// Writes, and says whether it was done; nothing when that is not known.
pub(crate) async fn write(cluster: &Cluster, command: Command) -> Option<bool> {
    let known = cluster.chronicle().write().known();
    for _ in 0..ATTEMPTS {
        let Some(to) = someone(cluster) else {
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        // A member that does not lead says who does, as far as it knows.
        let leader = cluster.net().find(to).and_then(|running| {
            let metrics = running.raft.server_metrics();
            metrics.borrow_watched().current_leader
        });
        let given = command.clone();
        let call = cluster
            .net()
            .call(CLIENTS, leader.unwrap_or(to), PATIENCE, move |member| {
                member.write(given)
            });
        match call.await {
            Ok(Ok(Forwarded::Taken(outcome))) => {
                let done = matches!(outcome, flynn_discovery::command::Outcome::Done { .. });
                cluster
                    .chronicle()
                    .write()
                    .acknowledged(leader.unwrap_or(to), command, known, &outcome);
                return Some(done);
            }
            Ok(Ok(Forwarded::NotLeader)) => {
                sleep(Duration::from_millis(50)).await;
            }
            Ok(Err(_)) | Err(_) => {
                cluster.chronicle().write().unknown(command);
                return None;
            }
        }
    }
    cluster.chronicle().write().never(command);
    Some(false)
}

/// Reads at some member, and gives the index of the metadata.
pub(crate) async fn read(cluster: &Cluster, strength: Consistency) -> Option<u64> {
    let known = cluster.chronicle().write().known();
    let to = someone(cluster)?;
    read_at(cluster, to, known, strength).await
}

/// Reads at that member.
pub(crate) async fn read_at(cluster: &Cluster, to: u64, known: u64, strength: Consistency) -> Option<u64> {
    let call = cluster
        .net()
        .call(CLIENTS, to, PATIENCE, move |member| member.read(strength));
    let (index, state) = call.await.ok()??;
    cluster
        .chronicle()
        .write()
        .read(to, strength, known, index, &state);
    if strength == Consistency::Lease {
        cluster.seen().note("a read relied on the lease");
    }
    let meta = state.service(SERVICE).and_then(|of| of.meta.as_ref());
    Some(meta.map_or(0, |meta| meta.index))
}
