//! `flynn-host bootstrap`: makes a cluster of this host.
//!
//! In: a manifest of the platform's apps, and images. Out: a running platform of which each component is an app.
//! Each step finds out what is done, so that a bootstrap that was killed goes on where it stopped; secrets and ids
//! that were made up are kept in the host's state directory from before their first use.

mod images;
pub mod join;
mod manifest;
pub mod remove;
mod state;
mod steps;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::client::{Http, host::HostClient};
use flynn_api::discovery::{NetworkLeases, VirtualNetworks};
use ipnet::{Ipv4Net, Ipv6Net};

use manifest::{Manifest, Start};
use state::State;

use crate::leases::Networks;

pub use images::import;

/// `flynn-host bootstrap`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The platform's apps; a built-in list unless given
    manifest: Option<PathBuf>,
    /// The domain under which apps get their names; *.DOMAIN must lead to this host
    #[arg(long, env = "CLUSTER_DOMAIN")]
    domain: Option<String>,
    /// Where images are, as `cargo xtask image` makes them; those that the host has unless given
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// The cluster's own network, of which each host gets a part
    #[arg(long, default_value = "100.100.0.0/16")]
    network: Ipv4Net,
    /// The prefix length of each host's part: 24 has room for 253 containers on a host
    #[arg(long, value_name = "LENGTH", default_value_t = NetworkLeases::DEFAULT_SUBNET_LENGTH)]
    subnet_length: u8,
    /// The IPv6 network beside it, /96 or larger
    #[arg(long, default_value = NetworkLeases::DEFAULT_NETWORK6)]
    network6: Ipv6Net,
    /// Do not encapsulate packets between hosts that share a link; the network between them must let through packets
    /// from and to the cluster's network
    #[arg(long)]
    direct: bool,
    /// The network that services' virtual addresses are from, two for each service
    #[arg(long, default_value = "100.101.0.0/16")]
    services_network: Ipv4Net,
    /// The same for IPv6, 64 bits
    #[arg(long, default_value = "fd66:6c79:6e73::/64")]
    services_network6: Ipv6Net,
    /// The host's state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
    /// Seconds that a step may take
    #[arg(long, default_value_t = 60)]
    step_timeout: u64,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// A bootstrap under way.
struct Bootstrap {
    host: HostClient,
    host_id: String,
    address: Ipv4Addr,
    dir: PathBuf,
    networks: Networks,
    virtual_networks: VirtualNetworks,
    step_timeout: Duration,
    state: State,
    /// Discoverd as the host's containers see it, once the network is up.
    gateway: Option<DiscoveryClient>,
}

fn local_host() -> anyhow::Result<HostClient> {
    Ok(HostClient::new(Http::new(&format!(
        "unix:{}",
        flynn_api::host::SOCKET
    ))?))
}

/// Sees that virtual addresses can be told from all others.
fn virtual_networks(args: &Args) -> anyhow::Result<VirtualNetworks> {
    let networks = VirtualNetworks {
        ipv4: args.services_network,
        ipv6: args.services_network6,
    };
    networks.check().map_err(anyhow::Error::msg)?;
    anyhow::ensure!(
        !networks.ipv4.contains(&args.network) && !args.network.contains(&networks.ipv4),
        "--services-network {} and --network {} share addresses: choose two networks apart",
        networks.ipv4,
        args.network
    );
    anyhow::ensure!(
        !networks.ipv6.contains(&args.network6) && !args.network6.contains(&networks.ipv6),
        "--services-network6 {} and --network6 {} share addresses: choose two networks apart",
        networks.ipv6,
        args.network6
    );
    Ok(networks)
}

/// Sees that this host has what a cluster's host needs, before anything is begun.
fn check_tools() -> anyhow::Result<()> {
    flynn_overlay::check_tool().context("nothing was changed")
}

/// This host's id and address, as its daemon knows them.
async fn own_address(host: &HostClient) -> anyhow::Result<(String, Ipv4Addr)> {
    let status = host.status().await.context(
        "the daemon does not answer; start it with `flynn-host daemon`, as root, and run this on the same host",
    )?;
    let address = status.url.trim_start_matches("https://");
    let address = address.rsplit_once(':').map_or(address, |(address, _)| address);
    let address = address
        .parse()
        .with_context(|| format!("the daemon says {:?} for its address", status.url))?;
    Ok((status.id, address))
}

/// Brings images of a directory into this host's store, over its daemon. Gives their names.
pub async fn import_here(state: &Path, from: &Path) -> anyhow::Result<Vec<String>> {
    import(&local_host()?, state, from).await
}

/// Makes a cluster of this host.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    check_tools()?;
    let networks = Networks {
        network: args.network,
        subnet_length: args.subnet_length,
        network6: args.network6,
        direct: args.direct,
    };
    networks.check()?;
    let virtual_networks = virtual_networks(args)?;
    let host = local_host()?;
    let (host_id, address) = own_address(&host).await?;
    let state = State::open(&args.state, args.domain.as_deref())?;
    let json = match &args.manifest {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => manifest::DEFAULT.to_owned(),
    };
    let manifest = Manifest::read(&json, &state.variables()).map_err(|why| {
        let name = args
            .manifest
            .as_deref()
            .unwrap_or(Path::new("the built-in manifest"));
        anyhow::anyhow!("{}: {why}", name.display())
    })?;
    let mut bootstrap = Bootstrap {
        host,
        host_id,
        address,
        dir: args.state.clone(),
        networks,
        virtual_networks,
        step_timeout: Duration::from_secs(args.step_timeout),
        state,
        gateway: None,
    };
    let begun = Instant::now();
    bootstrap.run(&manifest, args.images.as_deref()).await?;
    bootstrap.report(args.json, begun.elapsed())
}

/// Says on standard error what is being done; standard output is for the result.
fn say(what: &str) {
    eprintln!("  {what}");
}

impl Bootstrap {
    async fn run(&mut self, manifest: &Manifest, images: Option<&Path>) -> anyhow::Result<()> {
        if let Some(images) = images {
            say("bringing images in");
            import(&self.host, &self.dir, images).await?;
        }
        say("making certificates");
        self.certificates(&manifest.apps)?;
        let by_host = manifest.apps.iter().filter(|app| app.start == Start::Host);
        for app in by_host {
            say(&format!("starting {}", app.name));
            self.start(app).await?;
            if app.name == "discoverd" {
                self.hand_over_ca().await?;
                self.set_virtual_networks().await?;
                let gateway = self.network().await?;
                say(&format!("the network is up, its gateway is {gateway}"));
            }
            if let Some(service) = &app.wait_leader {
                self.wait_leader(service).await?;
            }
        }
        let controller = self.controller().await?;
        for app in &manifest.apps {
            say(&format!("making {} an app", app.name));
            self.adopt(&controller, app).await?;
        }
        for app in manifest.apps.iter().filter(|app| app.start == Start::Adopted) {
            say(&format!("starting {}", app.name));
            self.start(app).await?;
        }
        for app in &manifest.apps {
            say(&format!("waiting until {} is up", app.name));
            self.wait_up(&controller, app).await?;
        }
        self.state.done = true;
        self.state.save(&self.dir)?;
        Ok(())
    }

    fn report(&self, json: bool, took: Duration) -> anyhow::Result<()> {
        let pin = self.state.tls_pin()?;
        if json {
            let report = serde_json::json!({
                "domain": self.state.domain,
                "controller_key": self.state.secret("CONTROLLER_KEY"),
                "tls_pin": pin,
                "ca_fingerprint": self.state.ca_fingerprint()?,
                "seconds": took.as_secs_f64(),
            });
            println!("{report}");
        } else {
            eprintln!(
                "\nThe cluster is up after {:.1} s. To use it:\n",
                took.as_secs_f64()
            );
            println!("{}", self.state.cluster_add()?);
        }
        Ok(())
    }
}
