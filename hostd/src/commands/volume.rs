//! `flynn-host volume`: this host's volumes.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use anyhow::Context as _;
use flynn_api::ErrorCode;
use flynn_api::client::host::HostClient;
use flynn_api::volume::{
    Copy, DEFAULT_PROVIDER, Gc, NewProvider, NewVolume, Provider, ProviderKind, Resize, Rollback, Volume,
};
use futures::{StreamExt as _, TryStreamExt as _};
use http_body::Frame;
use http_body_util::{BodyExt, BodyStream, StreamBody};
use serde::Serialize;
use tokio::io::AsyncWriteExt as _;
use tokio_util::io::ReaderStream;
use uuid::Uuid;

use super::each::each;
use super::network::amount;
use super::show::{everything, table};
use super::{print_json, reach};

/// How much is read at once.
const PIECE: usize = 256 << 10;

/// `flynn-host volume`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    command: Command,
    /// As JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// List volumes
    List,
    /// Make a volume
    Create {
        /// Its id; made up unless given
        id: Option<String>,
        /// How much it may hold: 500MB, 2GiB, …
        #[arg(long, value_name = "SIZE", value_parser = size)]
        limit: Option<u64>,
        /// Where it is kept
        #[arg(long, default_value = DEFAULT_PROVIDER)]
        provider: String,
        /// A label
        #[arg(long = "meta", value_name = "NAME=VALUE", value_parser = label)]
        meta: Vec<(String, String)>,
    },
    /// Show all that is known of a volume
    Inspect {
        /// Its id, or the start of it
        volume: String,
    },
    /// Remove volumes that no job uses, and their data
    Delete {
        /// Their ids
        #[arg(required = true)]
        volumes: Vec<String>,
    },
    /// Keep what a volume is now (btrfs, zfs)
    Snapshot {
        /// The volume's id, or the start of it
        volume: String,
        /// The snapshot's id; made up unless given
        id: Option<String>,
    },
    /// Make a volume that begins as a copy of a snapshot, or of a volume as it is now (btrfs, zfs)
    Fork {
        /// The snapshot's or volume's id, or the start of it
        volume: String,
        /// The new volume's id; made up unless given
        id: Option<String>,
    },
    /// Make a volume that no job uses what it was when a snapshot was made; what came after is lost (btrfs, zfs)
    Rollback {
        /// The volume's id, or the start of it
        volume: String,
        /// The snapshot's id, or the start of it
        snapshot: String,
    },
    /// Write a snapshot to standard output, for `flynn-host volume receive` on another host (btrfs, zfs)
    Send {
        /// The snapshot's id, or the start of it
        snapshot: String,
        /// An earlier snapshot that the other host has: only what differs from it is written
        #[arg(long, value_name = "SNAPSHOT")]
        from: Option<String>,
    },
    /// Take in what `flynn-host volume send` wrote, from standard input (btrfs, zfs)
    Receive {
        /// Where it is kept
        #[arg(long, default_value = DEFAULT_PROVIDER)]
        provider: String,
    },
    /// Have a volume hold more, or less where it can: an ext4 in a file only grows
    Resize {
        /// The volume's id, or the start of it
        volume: String,
        /// How much it may hold: 500MB, 2GiB, …
        #[arg(value_name = "SIZE", value_parser = size)]
        limit: u64,
    },
    /// Set a volume aside that no job uses: the next job gets a new one, and gc removes this one
    Decommission {
        /// Its id, or the start of it
        volume: String,
    },
    /// Remove decommissioned volumes
    Gc {
        /// Only those decommissioned so many days ago or earlier
        #[arg(long, value_name = "DAYS", default_value_t = 0)]
        older_than: u32,
        /// Only say which
        #[arg(long)]
        dry_run: bool,
    },
    /// List the places where volumes are kept
    Providers,
    /// Keep volumes in another place as well: a btrfs, a ZFS, or a directory of another disk
    AddProvider {
        /// Its name on this host
        id: String,
        /// The directory
        path: PathBuf,
        /// How volumes are kept there: as subvolumes of a btrfs, datasets of a zfs, or directories (dir)
        #[arg(long, value_parser = kind, default_value = "btrfs")]
        kind: ProviderKind,
        /// Of a ZFS: the dataset to keep them in, which is made, and mounted at the directory
        #[arg(long, value_name = "POOL/NAME")]
        dataset: Option<String>,
        /// Of a ZFS, in place of a dataset: a disk, or a file, of which a pool is made
        #[arg(long, value_name = "PATH", conflicts_with = "dataset")]
        device: Option<String>,
        /// How large that file is, if it is to be made
        #[arg(long, requires = "device", value_parser = size)]
        size: Option<u64>,
        /// Make the volumes of jobs there from now on
        #[arg(long)]
        default: bool,
    },
    /// Take a place off the list: one without volumes, or one whose disk is gone
    RemoveProvider {
        /// Its name
        id: String,
    },
}

fn kind(text: &str) -> Result<ProviderKind, String> {
    serde_json::from_value(text.into()).map_err(|_| "btrfs, zfs or dir is wanted".into())
}

fn label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("NAME=VALUE is wanted")?;
    Ok((name.into(), value.into()))
}

fn size(text: &str) -> Result<u64, String> {
    flynn_api::resources::amount(text)
        .ok_or_else(|| format!("{text:?} is no size: 500MB, 2GiB or a number of bytes is wanted"))
}

/// Does it.
pub(super) async fn run(host: &HostClient, args: Args) -> anyhow::Result<()> {
    let json = args.json;
    match args.command {
        Command::List => {
            let volumes = reach(host.volumes().await)?;
            show(json, &volumes, || list(&volumes))
        }
        Command::Create {
            id,
            limit,
            provider,
            meta,
        } => {
            let meta = meta.into_iter().collect();
            // Made up here: whoever does not hear the answer knows what to look for, and does not make two.
            let id = id.unwrap_or_else(|| Uuid::new_v4().to_string());
            let new = NewVolume {
                id: Some(id.clone()),
                limit,
                meta,
            };
            let mut made = host.create_volume(&provider, &new).await;
            if let Err(error) = &mut made
                && error.code == ErrorCode::Unavailable
            {
                let unsure = format!("; volume {id} may be there all the same: see flynn-host volume list");
                error.message.push_str(&unsure);
            }
            made_one(json, &reach(made)?)
        }
        Command::Inspect { volume } => {
            let id = find(host, &volume).await?;
            let volume = host.volume(&id).await?;
            let lines = everything(&volume)?;
            show(json, &volume, || lines)
        }
        Command::Delete { volumes } => {
            let delete = async |id: &str| {
                reach(host.delete_volume(id).await)?;
                Ok(id.to_owned())
            };
            each(&volumes, json, str::to_owned, delete).await
        }
        Command::Snapshot { volume, id } => {
            let volume = find(host, &volume).await?;
            made_one(json, &host.snapshot_volume(&volume, &Copy { id }).await?)
        }
        Command::Fork { volume, id } => {
            let volume = find(host, &volume).await?;
            made_one(json, &host.fork_volume(&volume, &Copy { id }).await?)
        }
        Command::Rollback { volume, snapshot } => {
            let volume = find(host, &volume).await?;
            let snapshot = find(host, &snapshot).await?;
            let to = Rollback { snapshot };
            host.roll_volume_back(&volume, &to).await?;
            show(json, &host.volume(&volume).await?, || {
                format!("{volume} is what {} is", to.snapshot)
            })
        }
        Command::Send { snapshot, from } => {
            let snapshot = find(host, &snapshot).await?;
            let from = match from {
                Some(from) => Some(find(host, &from).await?),
                None => None,
            };
            send(host, &snapshot, from.as_deref()).await
        }
        Command::Receive { provider } => {
            let pieces = ReaderStream::with_capacity(tokio::io::stdin(), PIECE);
            let body = StreamBody::new(pieces.map_ok(Frame::data));
            let body = BodyExt::map_err(body, Into::into).boxed_unsync();
            made_one(json, &reach(host.receive_volume(&provider, body).await)?)
        }
        Command::Resize { volume, limit } => {
            let volume = find(host, &volume).await?;
            made_one(json, &host.resize_volume(&volume, &Resize { limit }).await?)
        }
        Command::Decommission { volume } => {
            let volume = find(host, &volume).await?;
            made_one(json, &host.decommission_volume(&volume).await?)
        }
        Command::Gc { older_than, dry_run } => {
            let gc = Gc {
                older_than: u64::from(older_than) * 86_400,
                dry_run,
            };
            let gone = reach(host.collect_volumes(&gc).await)?;
            show(json, &gone, || gone.join("\n"))
        }
        Command::Providers => {
            let all = reach(host.providers().await)?;
            show(json, &all, || providers(&all))
        }
        Command::AddProvider {
            id,
            path,
            kind,
            dataset,
            device,
            size,
            default,
        } => {
            let path = std::path::absolute(&path)?;
            let path = path.to_str().context("the path is no text")?.to_owned();
            let new = NewProvider {
                id,
                kind,
                path,
                dataset,
                device,
                size,
                default,
            };
            reach(host.add_provider(&new).await)?;
            show(json, &new, || new.id.clone())
        }
        Command::RemoveProvider { id } => {
            reach(host.remove_provider(&id).await)?;
            show(json, &id, || id.clone())
        }
    }
}

async fn send(host: &HostClient, snapshot: &str, from: Option<&str>) -> anyhow::Result<()> {
    anyhow::ensure!(
        !std::io::stdout().is_terminal(),
        "a snapshot is nothing to read: write it to a file (> FILE), or to another host (| ssh HOST flynn-host volume \
         receive)"
    );
    let mut body = BodyStream::new(host.send_volume(snapshot, from).await?);
    let mut output = tokio::io::stdout();
    while let Some(frame) = body.next().await {
        let frame = frame.context("the host did not send all of it; its daemon's log says why")?;
        if let Ok(data) = frame.into_data() {
            output.write_all(&data).await?;
        }
    }
    Ok(output.flush().await?)
}

fn show(json: bool, value: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
    if json {
        return print_json(value);
    }
    let text = text();
    if !text.is_empty() {
        println!("{text}");
    }
    Ok(())
}

/// What is made is named, for scripts, by its id alone.
fn made_one(json: bool, volume: &Volume) -> anyhow::Result<()> {
    show(json, volume, || volume.id.clone())
}

/// A volume by its id or the start of it.
async fn find(host: &HostClient, start: &str) -> anyhow::Result<String> {
    let ids = reach(host.volumes().await)?.into_iter().map(|volume| volume.id);
    let mut found: Vec<String> = ids.filter(|id| id.starts_with(start)).collect();
    if let Some(same) = found.iter().position(|id| id == start) {
        return Ok(found.swap_remove(same));
    }
    match found.as_slice() {
        [id] => Ok(id.clone()),
        [] => anyhow::bail!("there is no volume {start} on this host: `flynn-host volume list` shows all"),
        [one, other, ..] => anyhow::bail!("{start} may be {one} or {other}: give more of it"),
    }
}

fn list(volumes: &[Volume]) -> String {
    let mut table = table(&[
        "VOLUME", "TYPE", "PROVIDER", "LIMIT", "OF", "APP", "PROCESS", "MADE", "USED BY",
    ]);
    let meta = |volume: &Volume, name: &str| volume.meta.get(name).cloned().unwrap_or_default();
    for volume in volumes {
        let kind = match (volume.kind, volume.decommissioned_at) {
            (_, Some(_)) => "decommissioned",
            (kind, None) => kind.name(),
        };
        table.add_row([
            volume.id.clone(),
            kind.into(),
            volume.provider.clone(),
            volume.limit.map_or_else(|| "none".into(), amount),
            volume.source.clone().unwrap_or_default(),
            meta(volume, flynn_api::host::label::APP_NAME),
            meta(volume, flynn_api::host::label::PROCESS_TYPE),
            volume.created_at.strftime("%F %T").to_string(),
            volume.jobs.join(", "),
        ]);
    }
    table.trim_fmt()
}

fn providers(providers: &[Provider]) -> String {
    let mut table = table(&["PROVIDER", "KIND", "PATH", "FREE", "DEFAULT", "ERROR"]);
    for provider in providers {
        table.add_row([
            provider.id.clone(),
            provider.kind.name().into(),
            provider.path.clone(),
            provider.free.map(amount).unwrap_or_default(),
            if provider.default {
                "yes".into()
            } else {
                String::new()
            },
            provider.error.clone().unwrap_or_default(),
        ]);
    }
    table.trim_fmt()
}
