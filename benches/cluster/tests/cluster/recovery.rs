//! discoverd's last resorts, by the operator's commands.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use flynn_api::discovery::{Instance, MemberStatus, OwnStatus};
use flynn_cluster_tests::{Platform, until};

use crate::containers::{all_exchange, answering, containers_on};
use crate::fixture::{APP, Cluster, MEMBERS};
use crate::join::{discoverd, flynn_host};

const LIMIT: Duration = Duration::from_mins(3);

/// A file of a host's own.
const SNAPSHOT: &str = "/var/lib/flynn/discoverd.snapshot";

fn status(platform: &Platform, host: u8) -> Result<OwnStatus> {
    let status = flynn_host(platform, host, &["discoverd", "status", "--json"])?;
    Ok(serde_json::from_str(&status)?)
}

fn refused(platform: &Platform, args: &[&str], words: &str) -> Result<()> {
    let Err(error) = flynn_host(platform, MEMBERS[0], args) else {
        bail!("{args:?} was not refused")
    };
    let said = format!("{error:#}");
    eprintln!("      refused: {said}");
    ensure!(said.contains(words), "{said}");
    Ok(())
}

/// Waits until each host says that all of them vote, and are as far as the leader.
fn all_vote(platform: &Platform) -> Result<()> {
    for host in MEMBERS {
        until(LIMIT, &format!("by host {host}, three vote"), || {
            let members: Vec<MemberStatus> =
                serde_json::from_str(&flynn_host(platform, host, &["list", "--json"])?)?;
            let well = |member: &&MemberStatus| member.peer.voter && member.lag.is_some_and(|lag| lag < 100);
            ensure!(
                members.len() == MEMBERS.len() && members.iter().filter(well).count() == MEMBERS.len(),
                "{members:?}"
            );
            Ok(Some(()))
        })?;
    }
    Ok(())
}

/// Two of three hosts are lost for good, as far as the operator knows; and come back nevertheless.
pub(crate) fn majority_lost(cluster: &mut Cluster) -> Result<()> {
    cluster.app()?;
    let platform = cluster.members()?;
    let containers = containers_on(platform, APP, &MEMBERS)?;
    let [first, lost @ ..] = MEMBERS;
    // Else there is no majority to lose.
    all_vote(platform)?;
    refused(platform, &["discoverd", "recover", "--yes"], "majority")?;
    flynn_host(platform, first, &["discoverd", "snapshot", SNAPSHOT])?;
    refused(platform, &["discoverd", "restore", SNAPSHOT, "--yes"], "--force")?;

    let before = status(platform, first)?;
    for host in lost {
        platform.lab().host(host).power_cut()?;
    }
    until(LIMIT, "the host that is left knows of no leader", || {
        Ok(status(platform, first)?.leader.is_none().then_some(()))
    })?;
    // What it knew it still tells.
    let hosts: Vec<Instance> = discoverd(platform, first, "/services/flynn-host/instances")?;
    ensure!(!hosts.is_empty(), "nobody is known any more");
    refused(platform, &["discoverd", "recover"], "--yes")?;
    let said = flynn_host(platform, first, &["discoverd", "recover", "--yes"])?;
    eprintln!("      {}", said.trim());
    let after = status(platform, first)?;
    ensure!(
        after.state == "leader" && after.id != before.id && after.applied > before.applied + 900_000,
        "{before:?} became {after:?}"
    );
    flynn_host(platform, first, &["token"]).context("nothing can be written")?;

    for host in lost {
        platform.lab().host(host).boot()?;
    }
    all_vote(platform)?;
    let containers = until(LIMIT, "all jobs are back", || {
        let all = containers_on(platform, APP, &MEMBERS)?;
        Ok((all.len() == containers.len()).then_some(all))
    })?;
    let _answering = answering(platform, &containers)?;
    all_exchange(platform, &containers)
}
