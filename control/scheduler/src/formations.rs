//! Follows the controller's formations, and tells it of jobs.
//!
//! Events are a wake-up, nothing more: the list is read anew, so that no order of events can mislead.

use std::sync::Arc;
use std::time::Duration;

use flynn_api::client::Retry;
use flynn_api::client::controller::ControllerClient;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::controller::Job;
use flynn_api::{Error, ErrorCode, Result};
use futures::StreamExt as _;
use jiff::Timestamp;

use crate::plan::Desired;
use crate::report;
use crate::shared::Shared;

/// Between lists when nothing happens.
const LIST: Duration = Duration::from_secs(30);
/// How long events are gathered before the list is read.
const GATHER: Duration = Duration::from_millis(30);
/// Between comparisons of the jobs that the controller believes in with those that there are.
const COMPARE: Duration = Duration::from_mins(1);

/// Finds the controller.
#[derive(Clone, Debug)]
pub(crate) struct Controller {
    pub(crate) discovery: DiscoveryClient,
    pub(crate) key: String,
}

impl Controller {
    pub(crate) async fn client(&self, attempt: &mut usize) -> Result<ControllerClient> {
        *attempt += 1;
        ControllerClient::discover(&self.discovery, &self.key, *attempt).await
    }
}

/// Keeps [`Desired`] up to date, for ever.
pub(crate) async fn follow(shared: Arc<Shared>, controller: Controller) {
    let (mut attempt, mut retry) = (0, Retry::default());
    loop {
        if let Err(error) = follow_one(&shared, &controller, &mut attempt, &mut retry).await {
            tracing::warn!(%error, "the controller's formations cannot be followed; counts are kept as they are");
        }
        shared.want(|desired| desired.fresh = false);
        retry.wait().await;
    }
}

/// Follows one instance of the controller until it goes.
async fn follow_one(
    shared: &Shared,
    controller: &Controller,
    attempt: &mut usize,
    retry: &mut Retry,
) -> Result<()> {
    let client = controller.client(attempt).await?;
    let mut events = client.formation_events().await?;
    loop {
        let asked = Timestamp::now();
        let formations = client.active_formations().await?;
        shared.want(|desired| *desired = Desired::new(formations, asked));
        retry.reset();
        match tokio::time::timeout(LIST, events.next()).await {
            Ok(Some(event)) => drop(event?),
            Ok(None) => return Ok(()),
            Err(_) => continue,
        }
        let gather = tokio::time::sleep(GATHER);
        tokio::pin!(gather);
        loop {
            tokio::select! {
                () = &mut gather => break,
                event = events.next() => match event {
                    Some(event) => drop(event?),
                    None => return Ok(()),
                },
            }
        }
    }
}

/// Sends reports to the controller until it has taken them, for ever.
pub(crate) async fn tell(shared: Arc<Shared>, controller: Controller) {
    let (mut attempt, mut retry, mut client) = (0, Retry::default(), None);
    loop {
        let Some(report) = shared.outbox(|outbox| outbox.first().cloned()) else {
            shared.reports.notified().await;
            continue;
        };
        let result = match client.take() {
            Some(client) => put(client, &report).await,
            None => match controller.client(&mut attempt).await {
                Ok(client) => put(client, &report).await,
                Err(error) => Err(error),
            },
        };
        match result {
            Ok(answered) => {
                client = Some(answered);
                retry.reset();
                shared.outbox(|outbox| outbox.taken(report));
            }
            Err(error) if may_pass(&error) => {
                tracing::debug!(%error, job = report.id, "a report has to wait");
                shared.outbox(report::Outbox::postpone);
                retry.wait().await;
            }
            Err(error) => {
                tracing::warn!(%error, job = report.id, state = ?report.state, "the controller refuses a report");
                shared.outbox(|outbox| outbox.refused(report));
            }
        }
    }
}

/// Whether another try may succeed. One who does not take our key is no controller, or not yet ours: after a host
/// went down, another job may have the address that discoverd still knows the controller by.
fn may_pass(error: &Error) -> bool {
    let stranger = matches!(error.code, ErrorCode::Unauthorized | ErrorCode::Forbidden);
    error.retry || stranger || error.code.status().is_server_error()
}

async fn put(client: ControllerClient, report: &Job) -> Result<ControllerClient> {
    client.put_job(report).await.map(|()| client)
}

/// Looks for jobs that the controller believes in and no host knows, for ever.
pub(crate) async fn compare(shared: Arc<Shared>, controller: Controller) {
    let mut attempt = 0;
    loop {
        let wait = match active_jobs(&controller, &mut attempt).await {
            Ok(active) => {
                let gone = shared.view(|view| report::unknown(active, view, Timestamp::now()));
                if !gone.is_empty() {
                    tracing::info!(
                        jobs = gone.len(),
                        "the controller believes in jobs that no host knows"
                    );
                    shared.outbox(|outbox| gone.into_iter().for_each(|report| outbox.queue(report)));
                    shared.reports.notify_one();
                }
                COMPARE
            }
            Err(_) => COMPARE / 10,
        };
        tokio::time::sleep(wait).await;
    }
}

async fn active_jobs(controller: &Controller, attempt: &mut usize) -> Result<Vec<Job>> {
    controller.client(attempt).await?.active_jobs().await
}
