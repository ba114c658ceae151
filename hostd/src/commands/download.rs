//! `flynn-host download`: images for this host, from a repository or a directory.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use flynn_api::Digest;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::bootstrap;
use crate::repository::download::{Event, download};
use crate::repository::{Release, Wanted};

/// `flynn-host download`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The images; all of the release unless named
    images: Vec<String>,
    #[command(flatten)]
    repository: Wanted,
    /// The release; the channel's newest unless given
    #[arg(long, value_name = "VERSION")]
    release: Option<String>,
    /// Not from a repository: where images are, as `cargo xtask image` makes them
    #[arg(long, value_name = "DIR", conflicts_with_all = ["repository", "root", "channel", "release", "images"])]
    from: Option<PathBuf>,
    /// The host's state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
    /// Say what happens as lines of JSON
    #[arg(long)]
    json: bool,
}

/// Brings images into this host's store.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(from) = &args.from {
        let names = bootstrap::import_here(&args.state, from).await?;
        if args.json {
            super::print_json(&names)?;
        } else {
            println!("{}", names.join("\n"));
        }
        return Ok(());
    }
    let version = args.release.as_deref();
    let fetch = async |tell: &dyn Fn(Event<'_>)| -> anyhow::Result<Release> {
        download(&args.state, &args.repository, version, &args.images, tell).await
    };
    if args.json {
        let said = Mutex::new(HashMap::new());
        fetch(&|event| say(&said, event)).await?;
    } else if std::io::stderr().is_terminal() {
        let bars = Bars::default();
        fetch(&|event| bars.show(event)).await?;
    } else {
        fetch(&|event| {
            if let Event::Image { name, .. } = event {
                println!("{name}");
            }
        })
        .await?;
    }
    Ok(())
}

/// A line of JSON for each event; of a layer for each further twentieth.
fn say(said: &Mutex<HashMap<Digest, u64>>, event: Event<'_>) {
    if let Event::Layer { id, have, length } = event {
        let step = have * 20 / length.max(1);
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.insert(id, step) == Some(step) {
            return;
        }
    }
    // It has no maps but those with names.
    println!("{}", serde_json::to_string(&event).unwrap_or_default());
}

/// A bar for each layer that comes.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    layers: Mutex<HashMap<Digest, ProgressBar>>,
}

impl Bars {
    fn show(&self, event: Event<'_>) {
        match event {
            Event::Release { version, .. } => {
                let _ = self.all.println(format!("release {version}"));
            }
            Event::Layer { id, have, length } => {
                let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
                if have == length {
                    if let Some(bar) = layers.remove(&id) {
                        bar.finish_and_clear();
                    }
                    return;
                }
                let bar = layers.entry(id).or_insert_with(|| self.bar(id, length));
                bar.set_position(have);
            }
            Event::Image { name, .. } => {
                let _ = self.all.println(format!("{name} is here"));
            }
        }
    }

    fn bar(&self, id: Digest, length: u64) -> ProgressBar {
        let bar = self.all.add(ProgressBar::new(length));
        let style = "{prefix:.dim} {bar:32} {bytes:>10} of {total_bytes:>10}  {bytes_per_sec:>12}  {eta:>4}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.set_prefix(id.to_string().chars().take(12).collect::<String>());
        bar
    }
}
