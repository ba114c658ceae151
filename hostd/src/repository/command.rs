//! `flynn-host repository`: what a repository's keeper does. None of it needs root, a host or a daemon.

use std::path::PathBuf;

use super::DEFAULT_CHANNEL;
use super::maker::{Beginning, Days, Maker, Publication};

/// `flynn-host repository`
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Make a repository without releases, and its keys
    Init {
        /// The directory; serve it with any HTTP server, or have hosts read it
        dir: PathBuf,
        /// Where the keys go. Those of root, targets and channels belong on a machine that is off the network
        #[arg(long, value_name = "DIR")]
        keys: PathBuf,
        /// The channels
        #[arg(long, value_delimiter = ',', default_value = DEFAULT_CHANNEL)]
        channels: Vec<String>,
        /// How many keys the root has
        #[arg(long, value_name = "N", default_value_t = 1)]
        root_keys: u64,
        /// How many of them must sign a new root
        #[arg(long, value_name = "N", default_value_t = 1)]
        root_threshold: u64,
    },
    /// Add a release to a channel, and make it the one that hosts take
    Publish {
        /// The repository
        dir: PathBuf,
        /// Where the keys of the channel, snapshot and timestamp are
        #[arg(long, value_name = "DIR", required = true)]
        keys: Vec<PathBuf>,
        /// The channel
        #[arg(long, default_value = DEFAULT_CHANNEL)]
        channel: String,
        /// The release's version
        #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
        release: String,
        /// Where images are, as `cargo xtask image` makes them
        #[arg(long, value_name = "DIR")]
        images: PathBuf,
        /// A program of the release: flynn-host, flynn
        #[arg(long = "program", value_name = "FILE")]
        programs: Vec<PathBuf>,
    },
    /// Sign the timestamp anew, and the snapshot where that is due: daily, by a timer
    Refresh {
        /// The repository
        dir: PathBuf,
        /// Where the keys of snapshot and timestamp are
        #[arg(long, value_name = "DIR", required = true)]
        keys: Vec<PathBuf>,
    },
    /// Replace keys, and sign anew what the old ones signed
    Rotate {
        /// The repository
        dir: PathBuf,
        /// Whose: root, targets, snapshot, timestamp, or a channel's
        #[arg(required = true)]
        roles: Vec<String>,
        /// Where the keys are; new ones go into the first of these
        #[arg(long, value_name = "DIR", required = true)]
        keys: Vec<PathBuf>,
    },
}

/// Does it.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Init {
            dir,
            keys,
            channels,
            root_keys,
            root_threshold,
        } => {
            let beginning = Beginning {
                channels,
                root_keys,
                threshold: root_threshold,
            };
            let root = Maker::init(&dir, &keys, &beginning, Days::default()).await?;
            println!("{}", root.display());
            eprintln!(
                "Give this file to whoever runs hosts, by a way that they trust: flynn-host download --repository URL \
                 --root FILE.\nKeep the keys of root and targets in {} off the network; the timestamp holds for {} days \
                 (flynn-host repository refresh).",
                keys.display(),
                Days::default().timestamp
            );
        }
        Command::Publish {
            dir,
            keys,
            channel,
            release,
            images,
            programs,
        } => {
            let maker = Maker::open(&dir, &keys)?;
            let publication = Publication {
                channel: &channel,
                version: &release,
                images: &images,
                programs: &programs,
            };
            let release = maker.publish(&publication).await?;
            println!("{channel} {}", release.version);
        }
        Command::Refresh { dir, keys } => {
            let ends = Maker::open(&dir, &keys)?.refresh().await?;
            println!("{ends}");
        }
        Command::Rotate { dir, roles, keys } => {
            let mut maker = Maker::open(&dir, &keys)?;
            if let Some(first) = keys.first() {
                maker.rotate(&roles, first).await?;
            }
            println!("{}", roles.join(" "));
        }
    }
    Ok(())
}
