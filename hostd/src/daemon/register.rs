//! The host's own instance in discoverd.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{self, HOST_SERVICE, Instance, ServiceConfig};
use flynn_api::host;
use tokio::time::sleep;

use super::Daemon;
use super::serve::CERTIFICATE_CHECK;
use crate::{floating, identities};

/// Keeps the host registered as an instance of its service, for ever. It is not taken out at the end: a daemon that is
/// started anew is the same host, and one that is not runs out.
pub(super) async fn run(daemon: Arc<Daemon>) {
    loop {
        let pause = match daemon.discovery() {
            Some(client) => match beat(&daemon, &client).await {
                Ok(()) => Duration::from_secs(discovery::HEARTBEAT_SECS),
                Err(error) => {
                    tracing::debug!(%error, "cannot register this host");
                    Duration::from_millis(500)
                }
            },
            None => CERTIFICATE_CHECK,
        };
        sleep(pause).await;
    }
}

async fn beat(daemon: &Daemon, client: &DiscoveryClient) -> flynn_api::Result<()> {
    let config = daemon.config();
    let mut meta = config.tags;
    meta.insert("id".into(), config.id);
    let held: Vec<String> = daemon.floating.get().iter().map(ToString::to_string).collect();
    if !held.is_empty() {
        meta.insert(floating::command::META.into(), held.join(","));
    }
    let address = format!("{}:{}", config.address, host::PORT);
    let instance = Instance::new("https", address.clone(), meta);
    let registered = match client.register(HOST_SERVICE, &instance).await {
        Err(error) if error.code == flynn_api::ErrorCode::NotFound => {
            client
                .ensure_service(HOST_SERVICE, &ServiceConfig::default())
                .await?;
            client.register(HOST_SERVICE, &instance).await
        }
        result => result,
    };
    let held = daemon.held.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(held) = held
        && let Err(error) = identities::tell(client, &daemon.host_id, &address, &held).await
    {
        tracing::debug!(%error, "cannot say which certificates are held here");
    }
    registered
}
