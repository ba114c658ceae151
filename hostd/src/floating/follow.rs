//! What the cluster wants, as discoverd has it, and on the disk for the time when discoverd is away.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{FLOATING_SERVICE, FloatingAddresses, HOST_SERVICE, NetworkLeases};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::sleep;

use super::Settings;
use crate::files;

/// The file of what was known last, in the state directory.
const FILE: &str = "floating.json";
/// Between looks.
const LOOK: Duration = Duration::from_secs(2);

#[derive(Default, PartialEq, Serialize, Deserialize)]
struct Known {
    version: u32,
    hosts: BTreeMap<String, std::net::Ipv4Addr>,
    floating: FloatingAddresses,
}

impl Known {
    /// As the thread wants it; nothing without a key.
    fn settings(&self) -> Option<Settings> {
        let key = base64::engine::general_purpose::STANDARD
            .decode(&self.floating.key)
            .ok()?;
        let addresses = self.floating.addresses.iter();
        Some(Settings {
            key: key.try_into().ok()?,
            hosts: self.hosts.clone(),
            // What a newer version may write there is not for this one.
            addresses: addresses.filter_map(|address| address.parse().ok()).collect(),
        })
    }
}

/// Looks after the settings for ever, with whatever client there is at the time.
pub(crate) async fn follow(
    state: &Path,
    client: impl Fn() -> Option<DiscoveryClient>,
    settings: &watch::Sender<Option<Settings>>,
) {
    let path = state.join(FILE);
    let mut known: Known = match files::read_json(&path) {
        Ok(known) => known.unwrap_or_default(),
        Err(error) => {
            tracing::warn!(%error, "the floating addresses that were known cannot be read");
            Known::default()
        }
    };
    settings.send_replace(known.settings());
    loop {
        if let Some(client) = client() {
            match look(&client).await {
                Ok(now) if now != known => {
                    known = now;
                    // A cluster without floating addresses leaves no file.
                    let kept = path.exists() || !known.floating.addresses.is_empty();
                    if kept && let Err(error) = files::write_json(&path, &known) {
                        tracing::warn!(%error, "the floating addresses cannot be kept for a restart");
                    }
                    settings.send_replace(known.settings());
                }
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "floating addresses stay as they are"),
            }
        }
        sleep(LOOK).await;
    }
}

async fn look(client: &DiscoveryClient) -> flynn_api::Result<Known> {
    let floating = client.find_meta(FLOATING_SERVICE).await?;
    let leases = client.find_meta(HOST_SERVICE).await?;
    let unreadable = |error: serde_json::Error| flynn_api::Error::internal(error.to_string());
    let leases: NetworkLeases = leases
        .map(|meta| serde_json::from_value(meta.data))
        .transpose()
        .map_err(unreadable)?
        .unwrap_or_default();
    Ok(Known {
        version: 1,
        hosts: leases
            .leases
            .into_iter()
            .map(|(id, lease)| (id, lease.address))
            .collect(),
        floating: floating
            .map(|meta| serde_json::from_value(meta.data))
            .transpose()
            .map_err(unreadable)?
            .unwrap_or_default(),
    })
}
