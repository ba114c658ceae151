//! Members of a cluster as the platform runs them, with what the benchmark needs to hand over.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use flynn_api::server::CancellationToken;
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
    /// So many, at this address and those behind it, each in a directory named after its address
    #[arg(long)]
    count: Option<u32>,
}

/// Serves until killed.
pub(crate) fn serve(args: &Args) -> anyhow::Result<()> {
    flynn_api::tls::install_provider();
    flynn_api::server::init_logging("discoverd");
    let members: Vec<Options> = match args.count {
        None => vec![options(args, args.ip, &args.dir)?],
        Some(count) => (0..count)
            .map(|at| {
                let ip = Ipv4Addr::from_bits(args.ip.to_bits() + at);
                options(args, ip, &args.dir.join(ip.to_string()))
            })
            .collect::<anyhow::Result<_>>()?,
    };
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()?
        .block_on(async {
            let members = members
                .into_iter()
                .map(|options| tokio::spawn(flynn_discovery::run(options, CancellationToken::new())));
            for ended in futures::future::join_all(members).await {
                ended??;
            }
            Ok(())
        })
}

fn options(args: &Args, ip: Ipv4Addr, dir: &Path) -> anyhow::Result<Options> {
    let mut options = Options::from_lookup(|name| match name {
        "HOST_ID" => Some(host_id(ip)),
        "HOST_IP" => Some(ip.to_string()),
        "DISCOVERD_DATA" => Some(dir.join("data").display().to_string()),
        "DISCOVERD_INIT" => args.join.is_none().then(|| "true".to_owned()),
        "DISCOVERD_JOIN" => args.join.clone(),
        _ => None,
    })?;
    options.tls = dir.join("tls");
    Ok(options)
}

/// The id of the host at an address.
pub(crate) fn host_id(ip: Ipv4Addr) -> String {
    ip.to_string().replace('.', "-")
}
