//! `flynn-host tags`: by which jobs are placed.

use flynn_api::Meta;
use flynn_api::client::host::HostClient;

use super::{print_json, reach};

/// `flynn-host tags`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// What to do with them; without it they are shown
    #[command(subcommand)]
    change: Option<Change>,
    /// As JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(clap::Subcommand, Debug)]
enum Change {
    /// Set tags, beside those that there are
    Set {
        /// As NAME=VALUE
        #[arg(required = true, value_parser = tag)]
        tags: Vec<(String, String)>,
    },
    /// Remove tags
    #[command(alias = "del")]
    Remove {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// Reads a tag.
///
/// # Errors
/// It is not NAME=VALUE.
pub fn tag(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("NAME=VALUE is wanted".into()),
    }
}

pub(super) async fn run(host: &HostClient, args: Args) -> anyhow::Result<()> {
    let mut tags: Meta = reach(host.status().await)?.tags;
    match args.change {
        Some(Change::Set { tags: new }) => {
            tags.extend(new);
            host.set_tags(&tags).await?;
        }
        Some(Change::Remove { names }) => {
            if let Some(unknown) = names.iter().find(|name| !tags.contains_key(*name)) {
                anyhow::bail!("this host has no tag {unknown}; `flynn-host tags` lists those that it has");
            }
            tags.retain(|name, _| !names.contains(name));
            host.set_tags(&tags).await?;
        }
        None => {}
    }
    if args.json {
        return print_json(&tags);
    }
    for (name, value) in &tags {
        println!("{name}={value}");
    }
    Ok(())
}
