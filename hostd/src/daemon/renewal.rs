//! Certificates are renewed a month after they were made, two months before they run out, and when the cluster's CA takes
//! another root.

use std::sync::Arc;
use std::time::Duration;

use flynn_api::Error;
use jiff::Timestamp;
use tokio::time::{Instant, sleep};

use super::Daemon;
use crate::identities::{self, Looked};

/// Between looks at them.
const LOOK: Duration = Duration::from_secs(5);
/// Between complaints about the same trouble.
const AGAIN: Duration = Duration::from_hours(1);

/// Looks after them, for ever. Whoever uses one notices by itself that it is another.
pub(super) async fn keep(daemon: Arc<Daemon>) {
    let mut said: Option<(Instant, Vec<String>)> = None;
    loop {
        let looked = look(&daemon).await;
        if !looked.renewed.is_empty() {
            tracing::info!(certificates = looked.renewed.join(", "), "renewed");
        }
        let trouble: Vec<String> = looked.failed.iter().map(|error| error.message.clone()).collect();
        let is_new = |(since, before): &(Instant, Vec<String>)| *before != trouble || since.elapsed() > AGAIN;
        if trouble.is_empty() {
            said = None;
        } else if said.as_ref().is_none_or(is_new) {
            for error in &trouble {
                tracing::error!(error, "a certificate runs out if this goes on");
            }
            said = Some((Instant::now(), trouble));
        }
        daemon.tell_held(looked.held);
        sleep(LOOK).await;
    }
}

async fn look(daemon: &Daemon) -> Looked {
    let state = daemon.paths.state();
    if identities::is_over(state, Timestamp::now()) {
        return match identities::renew_late(state, &identities::discoverds(state, &daemon.host_id)).await {
            Ok(renewed) => Looked {
                renewed,
                ..Looked::default()
            },
            Err(why) => Looked {
                failed: vec![Error {
                    message: format!(
                        "the certificate of this host has run out, and is not renewed: {}",
                        why.message
                    ),
                    ..why
                }],
                ..Looked::default()
            },
        };
    }
    let Some(discoverd) = daemon.discovery_at(daemon.config().address) else {
        return Looked::default();
    };
    let serving = daemon.serving().map(|live| live.current());
    identities::look(state, &discoverd, serving.as_ref().map(|it| &it.identity)).await
}
