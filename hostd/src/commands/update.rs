//! `flynn-host update`: another program goes on with the daemon's work.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use flynn_api::client::host::HostClient;
use flynn_api::host::{Update, Updated};
use indicatif::{ProgressBar, ProgressStyle};

use super::{print_json, reach};
use crate::files;
use crate::repository::{Repository, Wanted};

/// The program's name in a release.
const PROGRAM: &str = "flynn-host";

/// `flynn-host update`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The new flynn-host, which takes the place of the one that runs; without it, that of a release
    #[arg(long, value_name = "FILE", conflicts_with_all = ["installed", "repository", "root", "channel", "release"])]
    binary: Option<PathBuf>,
    /// What was put in the place of the program that runs already
    #[arg(long, conflicts_with_all = ["repository", "root", "channel", "release"])]
    installed: bool,
    #[command(flatten)]
    repository: Wanted,
    /// The release; the channel's newest unless given
    #[arg(long, value_name = "VERSION")]
    release: Option<String>,
    /// The host's state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(host: &HostClient, args: Args) -> anyhow::Result<()> {
    if args.installed {
        return hand_over(host, None, args.json).await;
    }
    if let Some(file) = &args.binary {
        let path = fs::canonicalize(file);
        let path = path.with_context(|| format!("cannot find {}", file.display()))?;
        return hand_over(host, Some(&path), args.json).await;
    }
    let serving = reach(host.status().await)?;
    let serves = serving.version;
    // One at a time; what one left that was killed, the next writes over.
    let dir = args.state.join("update");
    files::private_dir(&dir)?;
    let lock = fs::File::create(dir.join("lock"))?;
    if lock.try_lock().is_err() {
        bail!("another update is under way; see it through, or end it and try again");
    }
    let program = dir.join(PROGRAM);
    let outcome = match fetch(&args, &serves, &program).await {
        Ok(true) => hand_over(host, Some(&program), args.json).await,
        Ok(false) if args.json => print_json(&Updated {
            from: serves.clone(),
            to: serves,
            pid: serving.pid,
        }),
        Ok(false) => {
            println!("{serves} serves already: it is the release");
            Ok(())
        }
        Err(error) => Err(error),
    };
    // The daemon has a copy. The lock stays: who waits for a file that is gone has it to himself.
    files::remove_all(&program)?;
    outcome
}

/// Brings the program of the release, unless that is what serves.
async fn fetch(args: &Args, serves: &str, program: &Path) -> anyhow::Result<bool> {
    let repository = Repository::open(&args.state, &args.repository).await?;
    let release = repository.release(args.release.as_deref()).await?;
    if release.version == serves {
        return Ok(false);
    }
    // It is not shown where nobody looks.
    let style = ProgressStyle::with_template("{prefix} {spinner} {bytes} {bytes_per_sec:.dim}")?;
    let bar = ProgressBar::new_spinner()
        .with_prefix(format!("{PROGRAM} {}", release.version))
        .with_style(style);
    let progress = |have| bar.set_position(have);
    repository
        .fetch_program(&release, PROGRAM, program, progress)
        .await?;
    bar.finish_and_clear();
    fs::set_permissions(program, Permissions::from_mode(0o755))?;
    Ok(true)
}

async fn hand_over(host: &HostClient, binary: Option<&Path>, json: bool) -> anyhow::Result<()> {
    let binary = binary.map(|path| path.to_string_lossy().into_owned());
    let updated = reach(host.update(&Update { binary }).await)
        .context("the daemon was not updated, and goes on as it was")?;
    if json {
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
