//! `flynn-host limit`: what a running job may have.

use flynn_api::client::host::HostClient;
use flynn_api::resources::Resources;

use super::{find, print_json, reach};

/// `flynn-host limit`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The job's id, or the start of it
    job: String,
    /// What to change while it runs: memory=512MB swap=64MB cpu=1000 (thousandths of a core) cpu_weight=200 max_pids=100
    /// io_weight=50 io_read=10MB io_write=10MB (bytes a second, or unlimited); without any, the limits are shown
    #[arg(value_name = "NAME=VALUE")]
    limits: Vec<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(host: &HostClient, args: Args) -> anyhow::Result<()> {
    let id = find(host, &args.job).await?;
    if !args.limits.is_empty() {
        let changes = Resources::parse(args.limits.iter().map(String::as_str)).map_err(anyhow::Error::msg)?;
        host.update_limits(&id, &changes).await?;
    }
    let limits = reach(host.job(&id).await)?.job.resources;
    if args.json {
        return print_json(&limits);
    }
    for name in Resources::NAMES {
        println!("{name}={}", limits.show(name));
    }
    Ok(())
}
