//! `flynn-host image`: the layers in this host's store.

use flynn_api::client::host::HostClient;
use flynn_api::image::{LayerGc, StoredLayer};
use jiff::Timestamp;

use super::network::amount;
use super::show::{age, table};
use super::{print_json, reach};

/// `flynn-host image`
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
    /// List the layers in this host's store, and who needs them
    List,
    /// Remove layers that no job and no image of this host needs; before the disk is full that is done by itself
    Gc {
        /// Only those that were not used for so many hours
        #[arg(long, value_name = "HOURS", default_value_t = 0)]
        older_than: u32,
        /// Only say which
        #[arg(long)]
        dry_run: bool,
    },
    /// Read all layers; damaged ones are set aside, and fetched again where a job says from where
    Verify,
}

/// Does it.
pub(super) async fn run(host: &HostClient, args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::List => {
            let layers = reach(host.layers().await)?;
            if args.json {
                return print_json(&layers);
            }
            println!("{}", list(&layers, Timestamp::now()));
        }
        Command::Gc { older_than, dry_run } => {
            let gc = LayerGc {
                older_than: u64::from(older_than) * 3600,
                bytes: None,
                dry_run,
            };
            let collected = reach(host.collect_layers(&gc).await)?;
            if args.json {
                return print_json(&collected);
            }
            for layer in &collected.layers {
                println!("{layer}");
            }
            let would = if dry_run { "would be" } else { "are" };
            eprintln!("{} {would} made free", amount(collected.bytes));
        }
        Command::Verify => {
            let verified = reach(host.verify_layers().await)?;
            if args.json {
                print_json(&verified)?;
            } else {
                println!("{} layers were read, {}", verified.layers, amount(verified.bytes));
                for layer in &verified.damaged {
                    let again = if verified.fetched.contains(layer) {
                        "damaged, and fetched again"
                    } else {
                        "damaged, and set aside"
                    };
                    println!("{layer}: {again}");
                }
            }
            anyhow::ensure!(
                verified.damaged.len() == verified.fetched.len(),
                "{} damaged layers were set aside and did not come again: bring those of the platform's images in with \
                 `flynn-host download`; others come when a job needs them. Look at the disk",
                verified.damaged.len() - verified.fetched.len()
            );
        }
    }
    Ok(())
}

fn list(layers: &[StoredLayer], now: Timestamp) -> String {
    let mut table = table(&["LAYER", "SIZE", "USED", "IMAGES", "JOBS"]);
    for layer in layers {
        let jobs = match layer.jobs.as_slice() {
            [] => String::new(),
            [one] => one.clone(),
            [one, rest @ ..] => format!("{one} and {} more", rest.len()),
        };
        table.add_row([
            layer.id.to_string(),
            amount(layer.length),
            age(layer.used_at, now),
            layer.images.join(", "),
            jobs,
        ]);
    }
    table.trim_fmt()
}
