//! A member of a cluster as the platform runs it, with what the benchmark needs to hand over.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use flynn_discovery::Options;

/// Threads that discoverd has on a host.
const THREADS: usize = 2;

/// Which member.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where `tls` is and its data go
    #[arg(long)]
    dir: PathBuf,
    /// Its address
    #[arg(long)]
    ip: Ipv4Addr,
    /// Members of the cluster; without, it makes one
    #[arg(long)]
    join: Option<String>,
}

/// Serves until killed.
pub(crate) fn serve(args: &Args) -> anyhow::Result<()> {
    flynn_api::tls::install_provider();
    let mut options = Options::from_lookup(|name| match name {
        "HOST_ID" => Some(args.ip.to_string().replace('.', "-")),
        "HOST_IP" => Some(args.ip.to_string()),
        "DISCOVERD_DATA" => Some(args.dir.join("data").display().to_string()),
        "DISCOVERD_INIT" => args.join.is_none().then(|| "true".to_owned()),
        "DISCOVERD_JOIN" => args.join.clone(),
        _ => None,
    })?;
    options.tls = args.dir.join("tls");
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()?
        .block_on(flynn_discovery::run(
            options,
            flynn_api::server::CancellationToken::new(),
        ))
}
