//! `flynn-host floating`.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::PathBuf;

use anyhow::Context as _;
use base64::Engine as _;
use flynn_api::ErrorCode;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{FLOATING_SERVICE, FloatingAddresses, HOST_SERVICE, ServiceConfig, ServiceMeta};
use serde::Serialize;

use super::{Address, core};
use crate::identities;

/// The name in the host's own instance under which it says what it holds.
pub(crate) const META: &str = "floating";

/// What to do with the floating addresses.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
    /// The state directory
    #[arg(long, default_value = "/var/lib/flynn", global = true)]
    state: PathBuf,
    /// As JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(clap::Subcommand, Debug)]
enum Action {
    /// Have one of the hosts hold an address
    Add {
        /// The address with its network's length: 192.0.2.10/24
        address: Address,
    },
    /// Have no host hold an address any more
    Remove {
        /// The address with its network's length
        address: Address,
    },
    /// List the addresses with the hosts that hold them
    List,
}

/// One line of the list.
#[derive(Serialize)]
struct Line {
    address: String,
    /// The hosts that say so: one, and for a moment two or none.
    hosts: Vec<String>,
}

/// Does it.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    let client = identities::discoverd(&args.state)?;
    match args.action {
        Action::Add { address } => change(&client, |there| add(there, address)).await?,
        Action::Remove { address } => change(&client, |there| remove(there, address)).await?,
        Action::List => {}
    }
    let lines = list(&client).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&lines)?);
    } else if lines.is_empty() {
        println!("there are no floating addresses: flynn-host floating add ADDRESS/LENGTH makes one");
    }
    for line in lines.iter().filter(|_| !args.json) {
        let hosts = if line.hosts.is_empty() {
            "nobody yet".to_owned()
        } else {
            line.hosts.join(", ")
        };
        println!("{:<40} {hosts}", line.address);
    }
    Ok(())
}

/// Changes the document by compare-and-swap, again when somebody else was faster.
async fn change(
    client: &DiscoveryClient,
    change: impl Fn(&mut FloatingAddresses) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    client
        .ensure_service(FLOATING_SERVICE, &ServiceConfig::default())
        .await?;
    for _ in 0..10 {
        let there = client.find_meta(FLOATING_SERVICE).await?;
        let index = there.as_ref().map_or(0, |meta| meta.index);
        let mut document: FloatingAddresses = match there {
            Some(meta) => serde_json::from_value(meta.data)?,
            None => FloatingAddresses::default(),
        };
        change(&mut document)?;
        let meta = ServiceMeta {
            data: serde_json::to_value(&document)?,
            index,
            leader_id: None,
        };
        match client.set_meta(FLOATING_SERVICE, &meta).await {
            Err(error) if matches!(error.code, ErrorCode::Conflict | ErrorCode::PreconditionFailed) => {}
            result => return result.map(drop).map_err(Into::into),
        }
    }
    anyhow::bail!("others change the floating addresses all the time: try again")
}

fn add(there: &mut FloatingAddresses, address: Address) -> anyhow::Result<()> {
    let same = |text: &String| text.parse::<Address>().is_ok_and(|other| other.ip == address.ip);
    if let Some(text) = there.addresses.iter().find(|text| same(text)) {
        anyhow::ensure!(
            *text == address.to_string(),
            "there is {text} already: remove it first"
        );
    }
    anyhow::ensure!(
        there.addresses.len() < core::MAX_ADDRESSES,
        "there are {} floating addresses, which is as many as there can be",
        core::MAX_ADDRESSES
    );
    if there.key.is_empty() {
        there.key = key()?;
    }
    there.addresses.insert(address.to_string());
    Ok(())
}

fn remove(there: &mut FloatingAddresses, address: Address) -> anyhow::Result<()> {
    anyhow::ensure!(
        there.addresses.remove(&address.to_string()),
        "{address} is no floating address: flynn-host floating list shows those there are"
    );
    Ok(())
}

fn key() -> anyhow::Result<String> {
    let mut key = [0; super::packet::KEY];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut key))
        .context("cannot make a key")?;
    Ok(base64::engine::general_purpose::STANDARD.encode(key))
}

async fn list(client: &DiscoveryClient) -> anyhow::Result<Vec<Line>> {
    let Some(meta) = client.find_meta(FLOATING_SERVICE).await? else {
        return Ok(Vec::new());
    };
    let document: FloatingAddresses = serde_json::from_value(meta.data)?;
    let mut holders: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for host in client.instances(HOST_SERVICE).await? {
        let held = host.meta.get(META).map(String::as_str).unwrap_or_default();
        for ip in held.split_terminator(',') {
            let id = host.meta.get("id").unwrap_or(&host.addr);
            holders.entry(ip.to_owned()).or_default().push(id.clone());
        }
    }
    let line = |address: String| {
        let ip = address.split('/').next().unwrap_or_default();
        Line {
            hosts: holders.get(ip).cloned().unwrap_or_default(),
            address,
        }
    };
    Ok(document.addresses.into_iter().map(line).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_and_go() {
        let mut document = FloatingAddresses::default();
        let address: Address = "192.0.2.10/24".parse().unwrap();
        add(&mut document, address).unwrap();
        let key = document.key.clone();
        assert_eq!(
            base64::engine::general_purpose::STANDARD
                .decode(&key)
                .unwrap()
                .len(),
            32
        );
        assert!(!format!("{document:?}").contains(&key), "it is a secret");
        add(&mut document, address).unwrap();
        assert_eq!((document.addresses.len(), &document.key), (1, &key));
        let other = "192.0.2.10/16".parse().unwrap();
        assert!(
            add(&mut document, other)
                .unwrap_err()
                .to_string()
                .contains("192.0.2.10/24")
        );
        assert!(remove(&mut document, other).is_err());
        remove(&mut document, address).unwrap();
        assert!(document.addresses.is_empty());
    }
}
