//! Membership by itself, with real members: the dead are replaced, the count stays odd, zones are spread over, operators
//! have their say.
//!
//! What each choice must be is in `voters.rs`; here it is carried out, by Raft.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{Cluster, block_on, create, eventually, instance};
use flynn_api::ErrorCode;
use flynn_api::discovery::{HOST_SERVICE, ServiceConfig, Voting};
use flynn_discovery::Options;
use flynn_discovery::raft::journal::{Journal, Record};
use flynn_discovery::voters::majority;
use openraft::EntryPayload;

/// So many members that run, of which those vote that can. A voter is replaced after three seconds.
async fn grown(size: usize) -> Cluster {
    grown_with(size, Duration::from_secs(3)).await
}

async fn grown_with(size: usize, replace: Duration) -> Cluster {
    let mut cluster = Cluster::new();
    for at in 0..size {
        cluster.add_with(|options: &mut Options| {
            options.timing.replace = replace;
            // All that happened stays in the journal, to be looked at.
            options.timing.snapshot_after = 1 << 20;
        });
        cluster.ready(0).await;
        let voters = [1, 1, 3, 3, 5, 5, 5][at];
        eventually("its voters", async || {
            let peers = cluster.client(0).peers().await.ok()?;
            (peers.len() == at + 1 && peers.iter().filter(|peer| peer.voter).count() == voters).then_some(())
        })
        .await;
    }
    cluster
}

/// Who votes, by what the member `at` says.
async fn voters(cluster: &Cluster, at: usize) -> Option<BTreeSet<usize>> {
    let peers = cluster.client(at).peers().await.ok()?;
    let place = |addr: &str| {
        let members = &mut cluster.members.iter();
        members
            .position(|member| member.addr().to_string() == addr)
            .unwrap()
    };
    let voters = peers.into_iter().filter(|peer| peer.voter);
    Some(voters.map(|peer| place(&peer.addr)).collect())
}

/// Has the operator say it until it is taken: it is refused as long as too few are known to be well.
async fn say(cluster: &Cluster, at: usize, member: usize, vote: Voting) {
    let client = cluster.client(at);
    eventually(&format!("{member}: {vote:?}"), async || {
        client.set_vote(&format!("h{member}"), vote).await.ok()
    })
    .await;
}

async fn until_voters(cluster: &Cluster, at: usize, wanted: impl IntoIterator<Item = usize>) {
    let wanted: BTreeSet<usize> = wanted.into_iter().collect();
    eventually(&format!("the voters {wanted:?}"), async || {
        (voters(cluster, at).await? == wanted).then_some(())
    })
    .await;
}

/// Every set of voters that there was: each odd, and never smaller than the majority of the one before.
fn audit(mut cluster: Cluster, at: usize) -> Vec<usize> {
    cluster.members[at].kill();
    let copy = cluster.members[at].dir.path().join("copy");
    std::fs::copy(cluster.members[at].options.data.join("raft/journal"), &copy).unwrap();
    let mut sizes: Vec<usize> = Vec::new();
    Journal::open(&copy, |record| {
        if let Record::Entry(entry) = record
            && let EntryPayload::Membership(membership) = entry.payload
        {
            for voters in membership.get_joint_config() {
                assert_eq!(voters.len() % 2, 1, "{membership:?}");
                if let Some(last) = sizes.last() {
                    assert!(
                        voters.len() >= majority(*last),
                        "{last} voters, then {}",
                        voters.len()
                    );
                }
                sizes.push(voters.len());
            }
        }
    })
    .unwrap();
    sizes.dedup();
    sizes
}

#[test]
fn a_cluster_grows_to_five_voters() {
    block_on(async {
        let cluster = grown(6).await;
        assert_eq!(audit(cluster, 0), [1, 3, 5]);
    });
}

#[test]
fn a_voter_that_stays_dead_is_replaced_and_returns_as_a_learner() {
    block_on(async {
        let mut cluster = grown(4).await;
        // A follower first, then a leader.
        for leads in [false, true] {
            let leader = cluster.ready(0).await;
            let present = voters(&cluster, 0).await.unwrap();
            let dead = *present.iter().find(|at| (**at == leader) == leads).unwrap();
            let learner = (0..4).find(|at| !present.contains(at)).unwrap();
            let witness = *present.iter().find(|at| **at != dead).unwrap();
            cluster.members[dead].kill();
            let next = present.iter().copied().filter(|at| *at != dead).chain([learner]);
            until_voters(&cluster, witness, next.clone()).await;
            let service = format!("by-others-than-{dead}");
            let client = cluster.client(learner);
            create(&client, &service).await;
            cluster.members[dead].start();
            cluster.ready(dead).await;
            eventually("the one that was dead has caught up", async || {
                cluster.client(dead).service(&service).await.ok()
            })
            .await;
            until_voters(&cluster, dead, next).await;
        }
        let leader = cluster.ready(0).await;
        assert_eq!(audit(cluster, leader), [1, 3]);
    });
}

#[test]
fn a_voter_that_is_away_for_a_while_keeps_its_vote() {
    block_on(async {
        let mut cluster = grown_with(4, Duration::from_mins(1)).await;
        let leader = cluster.ready(0).await;
        let present = voters(&cluster, leader).await.unwrap();
        let away = *present.iter().find(|at| **at != leader).unwrap();
        cluster.members[away].kill();
        let silent = async || {
            let members = cluster.client(leader).members().await.ok()?;
            let addr = cluster.members[away].addr().to_string();
            let member = members.into_iter().find(|member| member.peer.addr == addr)?;
            member.silent_ms.filter(|silent| *silent > 2_000)
        };
        eventually("two seconds of silence", silent).await;
        assert_eq!(voters(&cluster, leader).await.unwrap(), present);
        cluster.members[away].start();
        cluster.ready(away).await;
        assert_eq!(voters(&cluster, away).await.unwrap(), present);
    });
}

#[test]
fn five_that_lose_two_go_on_as_three_and_grow_again() {
    block_on(async {
        let mut cluster = grown(5).await;
        let leader = cluster.ready(0).await;
        let dead = [(leader + 1) % 5, (leader + 3) % 5];
        for at in dead {
            cluster.members[at].kill();
        }
        until_voters(&cluster, leader, (0..5).filter(|at| !dead.contains(at))).await;
        // Three bear the loss of one more, which five of which two are dead do as well; but no majority of five is
        // needed any more once that one is gone for good.
        for at in dead {
            cluster.members[at].start();
        }
        until_voters(&cluster, leader, 0..5).await;
        assert_eq!(audit(cluster, leader), [1, 3, 5, 3, 5]);
    });
}

#[test]
fn votes_are_spread_over_zones() {
    block_on(async {
        let cluster = grown(4).await;
        let leader = cluster.ready(0).await;
        let client = cluster.client(leader);
        let present = voters(&cluster, leader).await.unwrap();
        let learner = (0..4).find(|at| !present.contains(at)).unwrap();
        client
            .ensure_service(HOST_SERVICE, &ServiceConfig::default())
            .await
            .unwrap();
        for (at, member) in cluster.members.iter().enumerate() {
            let mut host = instance(&format!("{}:1113", member.options.host_ip));
            let zone = if at == learner { "b" } else { "a" };
            host.meta.insert("id".into(), member.options.host_id.clone());
            host.meta.insert("zone".into(), zone.into());
            client.register(HOST_SERVICE, &host).await.unwrap();
        }
        eventually("a vote in zone b", async || {
            voters(&cluster, leader).await?.contains(&learner).then_some(())
        })
        .await;
        eventually("three voters in two zones", async || {
            let members = client.members().await.ok()?;
            let voters = members.into_iter().filter(|member| member.peer.voter);
            let mut zones: Vec<String> = voters.map(|member| member.zone).collect();
            zones.sort();
            (zones == ["a", "a", "b"]).then_some(())
        })
        .await;
        let leader = cluster.ready(leader).await;
        assert_eq!(audit(cluster, leader), [1, 3]);
    });
}

#[test]
fn operators_promote_and_demote() {
    block_on(async {
        let mut cluster = grown(4).await;
        let leader = cluster.ready(0).await;
        let client = cluster.client(leader);
        let present = voters(&cluster, leader).await.unwrap();
        let learner = (0..4).find(|at| !present.contains(at)).unwrap();
        let out = *present.iter().find(|at| **at != leader).unwrap();
        let name = |at: usize| format!("h{at}");

        say(&cluster, leader, learner, Voting::Promoted).await;
        let promoted = voters(&cluster, leader).await.unwrap();
        assert!(promoted.contains(&learner) && promoted.len() == 3, "{promoted:?}");
        say(&cluster, leader, learner, Voting::Demoted).await;
        until_voters(&cluster, leader, present.iter().copied()).await;
        // Nobody else is there to vote.
        let refused = client.set_vote(&name(out), Voting::Demoted).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Conflict);
        assert!(
            refused.message.contains("too few of the others are well"),
            "{refused}"
        );
        let unknown = client.set_vote("h9", Voting::Demoted).await.unwrap_err();
        assert_eq!(unknown.code, ErrorCode::NotFound);

        // Whoever leads is demoted as well: another leads from then on.
        say(&cluster, leader, learner, Voting::Auto).await;
        say(&cluster, leader, leader, Voting::Demoted).await;
        let others = (0..4).filter(|at| *at != leader);
        until_voters(&cluster, learner, others).await;
        let next = eventually("another leader", async || {
            cluster.leader(learner).await.filter(|next| *next != leader)
        })
        .await;
        // The demoted one is not taken back, though one more dies for good.
        let dead = (0..4).find(|at| ![leader, next].contains(at)).unwrap();
        cluster.members[dead].kill();
        let silent = async || {
            let members = cluster.client(next).members().await.ok()?;
            members
                .iter()
                .any(|member| member.silent_ms > Some(5_000))
                .then_some(())
        };
        eventually("a silence", silent).await;
        let last = voters(&cluster, next).await.unwrap();
        assert!(!last.contains(&leader), "{last:?}");
        assert_eq!(audit(cluster, next), [1, 3]);
    });
}
