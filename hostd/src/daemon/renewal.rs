//! Certificates are renewed a month after they were made, two months before they run out.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::sleep;

use super::Daemon;
use crate::identities;

/// Between looks at their age.
const LOOK: Duration = Duration::from_hours(1);

/// Looks after them, for ever. Whoever uses one notices by itself that it is another.
pub(super) async fn keep(daemon: Arc<Daemon>) {
    loop {
        if let Some(discoverd) = daemon.discovery() {
            let now = Timestamp::now();
            let (renewed, failed) =
                identities::renew(daemon.paths.state(), &discoverd, |identity| identity.is_due(now)).await;
            if !renewed.is_empty() {
                tracing::info!(certificates = renewed.join(", "), "renewed");
            }
            for error in failed {
                tracing::error!(%error, "a certificate runs out if this goes on");
            }
        }
        sleep(LOOK).await;
    }
}
