//! A second host joins the cluster.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flynn_api::discovery::{Instance, MemberStatus, OwnStatus, Peer};
use flynn_cluster_tests::{FLYNN_HOST, IMAGES, Platform, until};
use serde::de::DeserializeOwned;

use crate::fixture::{Cluster, MEMBERS};

const LIMIT: Duration = Duration::from_mins(2);

/// Has a host join, as `flynn-host token` says.
pub(crate) fn join(platform: &Platform, host: u8) -> Result<()> {
    let (address, token) = token(platform)?;
    flynn_host(platform, host, &["join", &address, &token, "--images", IMAGES]).map(drop)
}

fn token(platform: &Platform) -> Result<(String, String)> {
    let token = flynn_host(platform, 1, &["token"])?;
    let words: Vec<&str> = token.split_whitespace().collect();
    let [_, "join", address, token] = words[..] else {
        anyhow::bail!("`token` says {token:?}")
    };
    Ok((address.to_owned(), token.to_owned()))
}

pub(crate) fn joins(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.platform()?;
    let (address, token) = token(platform)?;

    // A token of another cluster, and no token at all, get nowhere.
    let (secret, fingerprint) = token.split_once('.').context("a token has two halves")?;
    let foreign = format!("{secret}.{}", flynn_api::Digest::of(fingerprint.as_bytes()));
    let wrong = format!("{}.{fingerprint}", "0".repeat(secret.len()));
    for bad in [foreign.as_str(), wrong.as_str(), "nonsense"] {
        let said = flynn_host(platform, 2, &["join", &address, bad])
            .err()
            .context("it was let in")?;
        eprintln!("      refused: {said:#}");
    }

    // A host that lacks a tool says so before it uses the token up.
    let second = platform.lab().host(2);
    let nft = second.run("sh", ["-c", "command -v nft"])?;
    let (nft, away) = (nft.trim().to_owned(), format!("{}.away", nft.trim()));
    second.run("mv", [&nft, &away])?;
    let said = flynn_host(platform, 2, &["join", &address, &token])
        .err()
        .context("it joined without nft")?;
    second.run("mv", [&away, &nft])?;
    eprintln!("      refused: {said:#}");
    let said = said.to_string();
    ensure!(
        said.contains("nft")
            && said.contains("apt-get install nftables")
            && said.contains("nothing was changed"),
        "the missing tool is not named: {said}"
    );

    let platform = cluster.members()?;
    until(LIMIT, "all hosts are known on the second host's gateway", || {
        let hosts: Vec<Instance> = discoverd(platform, 2, "/services/flynn-host/instances")?;
        let peers: Vec<Peer> = discoverd(platform, 2, "/raft/peers")?;
        Ok((hosts.len() == MEMBERS.len() && peers.len() == MEMBERS.len()).then_some(()))
    })?;
    until(LIMIT, "the second host runs what every host runs", || {
        let jobs = flynn_host(platform, 2, &["ps"])?;
        Ok(["discoverd", "router", "scheduler"]
            .iter()
            .all(|app| jobs.contains(app))
            .then_some(()))
    })
}

/// Runs `flynn-host` on a host.
/// Each host can tell who the members are, how it does itself, and where the hosts are.
pub(crate) fn listed(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.platform()?;
    for host in MEMBERS {
        until(
            LIMIT,
            &format!("host {host} lists all as voters with the log"),
            || {
                let members: Vec<MemberStatus> =
                    serde_json::from_str(&flynn_host(platform, host, &["list", "--json"])?)?;
                let well =
                    |member: &&MemberStatus| member.peer.voter && member.lag.is_some_and(|lag| lag < 100);
                let leaders = members.iter().filter(|member| member.peer.leader).count();
                ensure!(
                    members.len() == MEMBERS.len()
                        && members.iter().filter(well).count() == MEMBERS.len()
                        && leaders == 1,
                    "{members:?}"
                );
                let status: OwnStatus =
                    serde_json::from_str(&flynn_host(platform, host, &["discoverd", "status", "--json"])?)?;
                ensure!(
                    ["leader", "follower"].contains(&status.state.as_str()) && status.applied > 0,
                    "{status:?}"
                );
                let hosts: Vec<Instance> = serde_json::from_str(&flynn_host(
                    platform,
                    host,
                    &["discover", "flynn-host", "--json"],
                )?)?;
                ensure!(hosts.len() == MEMBERS.len(), "{hosts:?}");
                Ok(Some(()))
            },
        )?;
    }
    let refused = flynn_host(platform, 1, &["demote", "nobody"])
        .err()
        .context("nobody was demoted")?;
    ensure!(format!("{refused:#}").contains("nobody"), "{refused:#}");
    Ok(())
}

pub(crate) fn flynn_host(platform: &Platform, host: u8, args: &[&str]) -> Result<String> {
    let output = platform.lab().host(host).exec(FLYNN_HOST, args.iter().copied())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "flynn-host {}: {}: {}",
        args[0],
        output.status,
        said.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Asks discoverd as the containers of a host see it.
pub(crate) fn discoverd<T: DeserializeOwned>(platform: &Platform, host: u8, path: &str) -> Result<T> {
    let url = format!("http://100.100.{host}.1:{}{path}", flynn_api::discovery::PORT);
    let output = platform
        .lab()
        .host(host)
        .exec("curl", ["-sSf", "--max-time", "5", &url])?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}
