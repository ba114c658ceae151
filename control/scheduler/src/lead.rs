//! Whether this scheduler is the one that acts: the leader of its service in discoverd.
//!
//! The word of discoverd is good for as long as another could not have been elected; then it is asked again, and
//! without an answer this scheduler stops acting.

use std::time::Duration;

use flynn_api::client::Retry;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::TTL_SECS;
use futures::StreamExt as _;
use tokio::sync::watch;
use tokio::time::Instant;

/// The service that schedulers are registered as.
pub const SERVICE: &str = "scheduler";

/// Between questions when nothing happens.
const ASK: Duration = Duration::from_secs(3);

/// The lead of this instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lead {
    /// The Raft index of its registration: the fencing token.
    pub(crate) index: u64,
    /// It is over then, unless it is renewed.
    pub(crate) until: Instant,
}

/// The lead, if this instance has it now.
pub(crate) fn current(lead: &watch::Receiver<Option<Lead>>) -> Option<Lead> {
    lead.borrow().filter(|lead| Instant::now() < lead.until)
}

/// Keeps asking who leads, for ever. `own` is this instance's `address:port`.
pub(crate) async fn follow(discovery: DiscoveryClient, own: String, lead: watch::Sender<Option<Lead>>) {
    let mut retry = Retry::default();
    loop {
        if let Err(error) = follow_service(&discovery, &own, &lead, &mut retry).await {
            tracing::debug!(%error, "discoverd cannot be asked who leads");
        }
        retry.wait().await;
    }
}

async fn follow_service(
    discovery: &DiscoveryClient,
    own: &str,
    lead: &watch::Sender<Option<Lead>>,
    retry: &mut Retry,
) -> flynn_api::Result<()> {
    let mut events = discovery.watch(SERVICE).await?;
    loop {
        let until = Instant::now() + Duration::from_secs(TTL_SECS);
        let leader = discovery.leader(SERVICE).await?;
        let new = (leader.addr == own).then_some(Lead {
            index: leader.index,
            until,
        });
        let old = lead.send_replace(new);
        if old.is_some() != new.is_some() {
            tracing::info!(
                leader = leader.addr,
                index = leader.index,
                acts = new.is_some(),
                "the lead"
            );
        }
        retry.reset();
        match tokio::time::timeout(ASK, events.next()).await {
            Ok(Some(event)) => drop(event?),
            Ok(None) => return Ok(()),
            Err(_) => {}
        }
    }
}
