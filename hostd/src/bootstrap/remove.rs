//! `flynn-host remove`: takes a host out of the cluster for good; `flynn-host replace`: and lets another take its place.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use flynn_api::ErrorCode;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{HOST_SERVICE, NetworkLeases, PORT};
use flynn_api::network::endpoints_service;

use super::{local_host, own_address, say};
use crate::{identities, leases};

/// `flynn-host remove`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The id of the host that goes, as `flynn-host network hosts` shows it
    host: String,
    /// Also when it is there and answers: its containers are cut off from the other hosts at once
    #[arg(long)]
    force: bool,
    /// This host's state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
}

/// `flynn-host replace`
#[derive(clap::Args, Debug)]
pub struct ReplaceArgs {
    /// Which host
    #[command(flatten)]
    remove: Args,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// What has been done for a replacement.
#[derive(serde::Serialize)]
struct Replaced<'a> {
    removed: &'a str,
    /// Where the other host joins, and with what.
    address: Ipv4Addr,
    token: String,
}

/// Removes a host, and prints the command by which another one, or the same made anew, joins within the hour.
pub async fn replace(args: &ReplaceArgs) -> anyhow::Result<()> {
    let (discoverd, address) = remove(&args.remove).await?;
    let token = discoverd
        .join_token()
        .await
        .context("it is removed; get a token for the other host with `flynn-host token`")?
        .token;
    if args.json {
        let removed = args.remove.host.as_str();
        let replaced = Replaced {
            removed,
            address,
            token,
        };
        println!("{}", serde_json::to_string_pretty(&replaced)?);
    } else {
        eprintln!("\nOn the host that takes its place, within the hour (it may have the same id):");
        println!("flynn-host join {address} {token}");
    }
    Ok(())
}

/// Removes a host.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    remove(args).await.map(drop)
}

/// Removes a host: its vote, its subnet, and what discoverd knows of it. Each step can be done again. Gives this host's
/// discoverd and address.
async fn remove(args: &Args) -> anyhow::Result<(DiscoveryClient, Ipv4Addr)> {
    let (own, address) = own_address(&local_host()?).await?;
    if own == args.host {
        bail!("this is {own} itself: run `flynn-host remove {own}` on another host of the cluster");
    }
    let discoverd = identities::discoverd(&args.state)?;

    let id = args.host.as_str();
    let leases: NetworkLeases = serde_json::from_value(discoverd.meta(HOST_SERVICE).await?.data)
        .context("the network leases cannot be read")?;
    let lease = leases.leases.get(id);
    // An earlier removal may have come as far as the lease.
    let at = lease.map(|lease| format!("{}:{PORT}", lease.address));
    let members = discoverd.members().await?;
    let member = members
        .into_iter()
        .map(|member| (member.peer, member.host))
        .find(|(peer, host)| at.as_ref().map_or(host == id, |at| peer.addr == *at))
        .map(|(peer, _)| peer);
    if lease.is_none() && member.is_none() {
        let known: Vec<&str> = leases.leases.keys().map(String::as_str).collect();
        bail!("the cluster has no host {id}; there are: {}", known.join(", "));
    }
    let instances = discoverd.instances(HOST_SERVICE).await?;
    let instance = instances
        .into_iter()
        .find(|instance| instance.meta.get("id").is_some_and(|found| found == id));
    if instance.is_some() && !args.force {
        bail!(
            "{id} is alive: it sent a heartbeat within the last seconds. Stop its daemon and its jobs first (and wait ten \
             seconds); or say --force, which cuts its containers off from the other hosts at once, while the scheduler \
             starts others in their place"
        );
    }

    // What can be refused comes first: nothing is lost then.
    let peers = discoverd.peers().await?;
    if let Some(member) = &member
        && peers.iter().all(|peer| peer.id == member.id || !peer.voter)
    {
        bail!(
            "{id} has the only vote in discoverd: bring another host in first, and wait until `flynn-host network hosts` \
             shows it"
        );
    }
    if lease.is_some() {
        // While it is a member it hears of it.
        say("taking its subnet back");
        let release = |leases: &mut NetworkLeases| Ok(leases::release(leases, id));
        discoverd.change_meta(HOST_SERVICE, release).await?;
    }
    if let Some(member) = &member {
        say("taking it out of discoverd's members");
        discoverd
            .remove_peer(&member.id.to_string())
            .await
            .context("it has no subnet any more but is still a member of discoverd; remove it again")?;
    }
    for removed in [
        match lease {
            Some(lease) => discoverd.remove_service(&endpoints_service(&lease.subnet)).await,
            None => Ok(()),
        },
        match &instance {
            Some(instance) => discoverd.deregister(HOST_SERVICE, &instance.id).await,
            None => Ok(()),
        },
    ] {
        match removed {
            Err(error) if error.code != ErrorCode::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    match lease {
        Some(lease) => eprintln!("\n{id} is removed; {} is free for another host.", lease.subnet),
        None => eprintln!("\n{id} is removed."),
    }
    Ok((discoverd, address))
}
