//! `flynn-host remove`: takes a host out of the cluster for good.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use flynn_api::ErrorCode;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{HOST_SERVICE, NetworkLeases, PORT};
use flynn_api::network::endpoints_service;
use flynn_api::tls::Identity;

use super::join::discoverd_url;
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

/// Removes a host: its vote, its subnet, and what discoverd knows of it. Each step can be done again.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    let (own, address) = own_address(&local_host()?).await?;
    if own == args.host {
        bail!("this is {own} itself: run `flynn-host remove {own}` on another host of the cluster");
    }
    let identity = Identity::load(&identities::host_dir(&args.state))
        .context("this host belongs to no cluster yet; run `flynn-host bootstrap` first")?;
    let discoverd = DiscoveryClient::new(Http::new(&discoverd_url(address))?.identity(&identity)?);

    let id = args.host.as_str();
    let leases: NetworkLeases = serde_json::from_value(discoverd.meta(HOST_SERVICE).await?.data)
        .context("the network leases cannot be read")?;
    let lease = leases.leases.get(id).with_context(|| {
        let known: Vec<&str> = leases.leases.keys().map(String::as_str).collect();
        format!("the cluster has no host {id}; there are: {}", known.join(", "))
    })?;
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
    let member = format!("{}:{PORT}", lease.address);
    let peers = discoverd.peers().await?;
    let is_member = peers.iter().any(|peer| peer.addr == member);
    if is_member && peers.iter().all(|peer| peer.addr == member || !peer.voter) {
        bail!(
            "{id} has the only vote in discoverd: bring another host in first, and wait until `flynn-host network hosts` \
             shows it"
        );
    }
    // While it is a member it hears of it.
    say("taking its subnet back");
    let release = |leases: &mut NetworkLeases| Ok(leases::release(leases, id));
    discoverd.change_meta(HOST_SERVICE, release).await?;
    if is_member {
        say("taking it out of discoverd's members");
        discoverd
            .remove_peer(&member)
            .await
            .context("it has no subnet any more but is still a member of discoverd")?;
    }
    for removed in [
        discoverd.remove_service(&endpoints_service(&lease.subnet)).await,
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
    eprintln!("\n{id} is removed; {} is free for another host.", lease.subnet);
    Ok(())
}
