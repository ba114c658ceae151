//! `flynn-host destroy-volumes`: empties this host of volumes.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use flynn_api::client::host::HostClient;
use flynn_api::volume::Volume;
use serde::Serialize;

use super::{print_json, reach};

/// `flynn-host destroy-volumes`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Remove all volumes, and what they hold; without it only those that were decommissioned
    #[arg(long)]
    include_data: bool,
    /// Remove no images, which this command does in no case: Flynn's scripts may say so
    #[arg(long, hide = true)]
    keep_system_images: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// What was removed, and what was not.
#[derive(Serialize)]
struct Destroyed {
    removed: Vec<String>,
    /// With what the host said.
    kept: Vec<(String, String)>,
}

/// Does it.
pub(super) async fn run(host: &HostClient, args: &Args) -> anyhow::Result<()> {
    let mut volumes = reach(host.volumes().await)?;
    volumes.retain(|volume| args.include_data || volume.decommissioned_at.is_some());
    // All or none: half a host's data is nobody's wish.
    let used: Vec<String> = volumes.iter().filter_map(in_use).collect();
    anyhow::ensure!(
        used.is_empty(),
        "volumes are in use, and none was removed: {}. Stop these jobs first (flynn-host stop)",
        used.join(", ")
    );
    if !volumes.is_empty() && !args.yes {
        confirm(&reach(host.status().await)?.id, &volumes)?;
    }
    let mut done = Destroyed {
        removed: Vec::new(),
        kept: Vec::new(),
    };
    for volume in volumes {
        match host.delete_volume(&volume.id).await {
            Ok(()) => done.removed.push(volume.id),
            Err(error) => done.kept.push((volume.id, error.message)),
        }
    }
    if args.json {
        print_json(&done)?;
    } else {
        for id in &done.removed {
            println!("{id}");
        }
    }
    let kept: Vec<&str> = done.kept.iter().map(|(_, why)| why.as_str()).collect();
    anyhow::ensure!(kept.is_empty(), "not all could be removed: {}", kept.join("; "));
    Ok(())
}

fn in_use(volume: &Volume) -> Option<String> {
    let job = volume.jobs.first()?;
    Some(format!("{} by {job}", volume.id))
}

fn confirm(host: &str, volumes: &[Volume]) -> anyhow::Result<()> {
    anyhow::ensure!(
        std::io::stdin().is_terminal(),
        "this removes {} volumes of the host {host}, and what they hold, for good: say --yes",
        volumes.len()
    );
    for volume in volumes {
        eprintln!("{} {}", volume.id, volume.kind.name());
    }
    eprint!(
        "This removes these {} volumes, and what they hold, for good. Write the host's id, {host}, to go on: ",
        volumes.len()
    );
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    anyhow::ensure!(answer.trim() == host, "nothing was removed");
    Ok(())
}
