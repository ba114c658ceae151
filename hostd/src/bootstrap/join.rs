//! `flynn-host token` and `flynn-host join`: brings a further host into the cluster.
//!
//! The token carries the fingerprint of the cluster's CA, so that its secret is told to nobody else, and is good for
//! one use. The new host then holds a certificate, a subnet and a discoverd that follows the others; the scheduler
//! does the rest.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use flynn_api::Digest;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::client::host::HostClient;
use flynn_api::discovery::{JoinRequest, SignedIdentity};
use flynn_api::host::{Job, NetworkConfig, label};
use flynn_api::tls::{Identity, KeyRequest, joining_client_config};

use super::{check_tools, images, local_host, own_address, say};
use crate::config::{HostConfig, Overrides};
use crate::{identities, leases};

/// `flynn-host join`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The address of a host of the cluster
    address: Ipv4Addr,
    /// What `flynn-host token` printed there
    token: String,
    /// Where images are, as `cargo xtask image` makes them; those that the host has unless given
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// The host's state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
}

/// `flynn-host renew`
#[derive(clap::Args, Debug)]
pub struct RenewArgs {
    /// For a host whose certificate has run out: the address of another host of the cluster, where those that this one
    /// knew are gone
    #[arg(long, value_name = "ADDRESS")]
    at: Option<Ipv4Addr>,
    /// The host's state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
}

/// `flynn-host token`
#[derive(clap::Args, Debug)]
pub struct TokenArgs {
    /// The host's state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
}

pub(super) fn discoverd_url(address: impl std::fmt::Display) -> String {
    format!("https://{address}:{}", flynn_api::discovery::PORT)
}

/// Prints the command that brings one host in, within the hour.
pub async fn token(args: &TokenArgs) -> anyhow::Result<()> {
    let address = own_address(&local_host()?).await?.1;
    let token = identities::discoverd(&args.state)?.join_token().await?.token;
    println!("flynn-host join {address} {token}");
    Ok(())
}

/// Has all certificates of this host renewed now, and not when they are due.
pub async fn renew(args: &RenewArgs) -> anyhow::Result<()> {
    let (state, now) = (&args.state, jiff::Timestamp::now());
    let (renewed, failed) = if args.at.is_some() || identities::is_over(state, now) {
        let host = HostConfig::load(state, &Overrides::default())?.id;
        let others = match args.at {
            Some(at) => vec![format!("{at}:{}", flynn_api::discovery::PORT)],
            None => identities::discoverds(state, &host),
        };
        match identities::renew_late(state, &others).await {
            Ok(renewed) => (renewed, Vec::new()),
            Err(error) => (Vec::new(), vec![error]),
        }
    } else {
        identities::renew(state, &identities::discoverd(state)?, |_| true).await
    };
    for name in renewed {
        println!("{name}");
    }
    match failed.into_iter().next() {
        Some(error) => Err(error).context("some certificates are as they were"),
        None => Ok(()),
    }
}

/// Brings this host into a cluster.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    check_tools()?;
    let host = local_host()?;
    let (host_id, address) = own_address(&host).await?;
    if let Some(images) = &args.images {
        say("bringing images in");
        images::import(&host, &args.state, images).await?;
    }
    let host_dir = identities::host_dir(&args.state);
    let known =
        Identity::load(&host_dir).is_ok() && !identities::is_over(&args.state, jiff::Timestamp::now());
    let peers = if known {
        // An earlier run came this far, and used the token up.
        vec![format!("{}:{}", args.address, flynn_api::discovery::PORT)]
    } else {
        say("asking for a certificate");
        let (key_pem, signed) = ask(args, &host_id, address).await?;
        Identity {
            ca_pem: signed.ca,
            cert_pem: signed.cert,
            key_pem,
        }
        .save(&host_dir)?;
        signed.peers
    };
    let identity = Identity::load(&host_dir)?;
    let remote = DiscoveryClient::new(Http::new(&discoverd_url(args.address))?.identity(&identity)?)
        .learning(&host_dir)
        .knowing(peers.iter().cloned());

    say("taking a subnet");
    let (leases, lease, _) = leases::take_in(&remote, None, &host_id, address)
        .await
        .context("cannot take a subnet")?;

    say("starting discoverd");
    // The host's own discoverd would have to sign it otherwise, and is not there yet.
    identities::ensure_app(&args.state, "discoverd", &remote).await?;
    // Those of a host that was away for too long and joins anew are of no use any more.
    let stale = |other: &Identity| other.ca_pem != identity.ca_pem;
    let (_, failed) = identities::renew(&args.state, &remote, stale).await;
    if let Some(error) = failed.into_iter().next() {
        return Err(error.into());
    }
    if !runs_discoverd(&host).await? {
        let first =
            Http::new(&format!("https://{}:{}", args.address, flynn_api::host::PORT))?.identity(&identity)?;
        let job = copy_of_discoverd(&HostClient::new(first), &host_id, &peers).await?;
        host.add_job(&job).await.context("cannot start discoverd")?;
    }
    let config = NetworkConfig {
        network: leases.network,
        subnet: lease.subnet,
        network6: leases.network6,
    };
    host.configure_network(&config)
        .await
        .context("cannot bring the host's network up")?;

    let own = DiscoveryClient::new(Http::new(&discoverd_url(address))?.identity(&identity)?);
    let deadline = tokio::time::Instant::now() + Duration::from_mins(1);
    while let Err(error) = own.ping().await {
        if tokio::time::Instant::now() > deadline {
            bail!(
                "this host's discoverd does not answer after 60 s ({error}); see `flynn-host ps` and `flynn-host log`"
            );
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    eprintln!(
        "\nThis host ({host_id}, {address}) belongs to the cluster, with the subnet {}.",
        config.subnet
    );
    Ok(())
}

async fn ask(args: &Args, host_id: &str, address: Ipv4Addr) -> anyhow::Result<(String, SignedIdentity)> {
    let form =
        "a token has the form SECRET.FINGERPRINT; get one with `flynn-host token` on a host of the cluster";
    let (secret, fingerprint) = args.token.split_once('.').context(form)?;
    let fingerprint: Digest = fingerprint.parse().context(form)?;
    let request = KeyRequest::generate()?;
    let http = Http::new(&discoverd_url(args.address))?.tls(joining_client_config(fingerprint));
    let join = JoinRequest {
        secret: secret.to_owned(),
        host_id: host_id.to_owned(),
        address,
        csr: request.csr_pem,
    };
    let signed = DiscoveryClient::new(http).join(&join).await.context(
        "the cluster did not let this host in: where its CA has another root by now, make a new token",
    )?;
    Ok((request.key_pem, signed))
}

fn is_discoverd(job: &Job) -> bool {
    job.metadata
        .get(label::APP_NAME)
        .is_some_and(|name| name == "discoverd")
}

async fn runs_discoverd(host: &HostClient) -> anyhow::Result<bool> {
    Ok(host
        .jobs()
        .await?
        .values()
        .any(|job| !job.status.is_terminal() && is_discoverd(&job.job)))
}

/// The job that runs discoverd on another host, for this one: same app, release and image.
async fn copy_of_discoverd(other: &HostClient, host_id: &str, peers: &[String]) -> anyhow::Result<Job> {
    let jobs = other
        .jobs()
        .await
        .context("cannot read the jobs of the cluster's host")?;
    let found = jobs
        .into_values()
        .find(|job| !job.status.is_terminal() && is_discoverd(&job.job));
    let mut job = found.context("the cluster's host runs no discoverd")?.job;
    job.id = format!("{host_id}-{}", uuid::Uuid::new_v4());
    let env = &mut job.config.env;
    env.insert("FLYNN_JOB_ID".into(), job.id.clone());
    env.remove("DISCOVERD_INIT");
    env.insert("DISCOVERD_JOIN".into(), peers.join(","));
    Ok(job)
}
