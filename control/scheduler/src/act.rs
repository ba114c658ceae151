//! Carries plans out: puts jobs to hosts and stops them, again and again until the host has answered.

use std::sync::Arc;
use std::time::Duration;

use flynn_api::ErrorCode;
use flynn_api::client::Retry;
use flynn_api::host::Job as Spec;
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::plan::{Plan, Start, Stop};
use crate::shared::Shared;
use crate::start::spec_of;
use crate::view::{Job, State};

/// Calls to hosts at a time.
const CALLS: usize = 32;
/// How often a host that answers may fail to take a job before another attempt, with backoff, is made elsewhere.
const ATTEMPTS: u32 = 8;
/// How long a host may take to take a job's instances out of discoverd before the job is stopped all the same.
const DEREGISTER: Duration = Duration::from_secs(2);

/// Carries plans out.
#[derive(Clone, Debug)]
pub(crate) struct Actor {
    shared: Arc<Shared>,
    calls: Arc<Semaphore>,
}

impl Actor {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            calls: Arc::new(Semaphore::new(CALLS)),
        }
    }

    /// Begins with everything in the plan. What has begun is in the view at once, so that the next plan knows.
    pub(crate) fn carry_out(&self, plan: &Plan) {
        for stop in &plan.stops {
            tracing::info!(job = stop.id, reason = stop.reason, "stopping a job");
            self.shared.change(|view, now| view.stopping(&stop.id, now));
            tokio::spawn(self.clone().stop(stop.clone()));
        }
        for start in &plan.starts {
            let Some(spec) = self.spec(start) else { continue };
            let (app, kind) = (&start.key.app, &start.key.process_type);
            tracing::info!(
                job = spec.id,
                app,
                kind,
                restarts = start.restarts,
                "starting a job"
            );
            self.shared
                .change(|view, now| view.starting(&start.host, &spec, now));
            tokio::spawn(self.clone().start(start.host.clone(), spec));
        }
    }

    fn spec(&self, start: &Start) -> Option<Spec> {
        let id = format!("{}-{}", start.host, Uuid::new_v4());
        let key = (start.key.app.clone(), start.key.release.clone());
        self.shared
            .desired(|desired| spec_of(desired.formations.get(&key)?, start, &id))
    }

    /// Puts a job to its host until the host has taken or refused it, or nobody wants it any more. The same job may
    /// be put twice, so that an answer that was lost does no harm.
    async fn start(self, host: String, spec: Spec) {
        let mut retry = Retry::default();
        let mut failures = 0;
        loop {
            let wanted = |job: &Job| job.state == State::Pending && job.asked_to_stop.is_none();
            if !self.shared.view(|view| view.job(&spec.id).is_some_and(wanted)) {
                return;
            }
            let Some(client) = self.shared.client(&host) else {
                retry.wait().await;
                continue;
            };
            let result = {
                let _call = self.calls.acquire().await;
                client.add_job(&spec).await
            };
            let error = match result {
                Ok(()) => {
                    let given_up = self.shared.change(|view, _| {
                        view.taken(&spec.id);
                        view.job(&spec.id).is_none_or(|job| job.state == State::Down)
                    });
                    if given_up {
                        // It was stopped while the host did not know it yet.
                        let _ = client.stop_job(&spec.id).await;
                    }
                    return;
                }
                Err(error) => error,
            };
            failures += 1;
            let passing = error.retry || error.code.status().is_server_error();
            if !passing || failures >= ATTEMPTS {
                // After an answer that was lost the host may have it.
                let off = client.stop_job(&spec.id).await;
                if off.is_ok() || off.is_err_and(|error| error.code == ErrorCode::NotFound) {
                    tracing::warn!(%error, job = spec.id, "the host does not take a job");
                    return self
                        .shared
                        .change(|view, now| view.refused(&spec.id, &error.message, now));
                }
            }
            tracing::info!(%error, job = spec.id, "a host has not taken a job; trying again");
            retry.wait().await;
        }
    }

    /// Takes a job out of discoverd, then stops it.
    async fn stop(self, stop: Stop) {
        let Some(client) = self.shared.client(&stop.host) else {
            return self.not_stopped(&stop).await;
        };
        let _call = self.calls.acquire().await;
        // A service that nobody is sent to any more can go without a request lost.
        let deregister = tokio::time::timeout(DEREGISTER, client.deregister_job(&stop.id)).await;
        if !matches!(deregister, Ok(Ok(()))) {
            tracing::debug!(
                job = stop.id,
                "its instances could not be deregistered ahead of its stop"
            );
        }
        match client.stop_job(&stop.id).await {
            Ok(()) => {}
            Err(error) if error.code == ErrorCode::NotFound => {
                self.shared.change(|view, now| view.gone(&stop.id, now));
            }
            Err(error) => {
                tracing::warn!(%error, job = stop.id, "a job could not be stopped; trying again");
                self.not_stopped(&stop).await;
            }
        }
    }

    async fn not_stopped(&self, stop: &Stop) {
        Retry::default().wait().await;
        self.shared.change(|view, _| view.not_stopping(&stop.id));
    }
}
