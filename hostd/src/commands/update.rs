//! `flynn-host update`: another program goes on with the daemon's work.

use std::path::PathBuf;

use anyhow::Context as _;
use flynn_api::client::host::HostClient;
use flynn_api::host::Update;

use super::{print_json, reach};

/// `flynn-host update`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The new flynn-host, which takes the place of the one that runs; without it, what was put in that place already
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(host: &HostClient, args: Args) -> anyhow::Result<()> {
    let binary = args.binary.map(|file| {
        let path = std::fs::canonicalize(&file);
        path.with_context(|| format!("cannot find {}", file.display()))
    });
    let binary = binary
        .transpose()?
        .map(|path| path.to_string_lossy().into_owned());
    let updated = reach(host.update(&Update { binary }).await)
        .context("the daemon was not updated, and goes on as it was")?;
    if args.json {
        return print_json(&updated);
    }
    if updated.from == updated.to {
        println!(
            "another daemon serves, pid {}, of the same version {}",
            updated.pid, updated.to
        );
    } else {
        println!(
            "{} serves in the place of {}, pid {}",
            updated.to, updated.from, updated.pid
        );
    }
    Ok(())
}
