//! Client of the host API ([`crate::host`]).

use std::collections::BTreeMap;

use super::{EventStream, Http, Upgraded, encode};
use crate::Result;
use crate::host::{
    ActiveJob, AttachRequest, ExecRequest, Flow, HostStatus, Job, JobEvent, LogLine, NetworkConfig,
    NetworkStatus, ServiceStatus, Volume,
};

/// Talks to one host.
#[derive(Clone, Debug)]
pub struct HostClient {
    http: Http,
}

impl HostClient {
    /// Over this transport.
    pub fn new(http: Http) -> Self {
        Self { http }
    }

    /// What the host is and how it does.
    pub async fn status(&self) -> Result<HostStatus> {
        self.http.get("/host/status").await
    }

    /// All jobs that it knows, by id.
    pub async fn jobs(&self) -> Result<BTreeMap<String, ActiveJob>> {
        self.http.get("/host/jobs").await
    }

    /// All jobs, then what happens to them.
    pub async fn job_events(&self) -> Result<EventStream<JobEvent>> {
        self.http.events("/host/jobs").await
    }

    /// One job.
    pub async fn job(&self, id: &str) -> Result<ActiveJob> {
        self.http.get(&format!("/host/jobs/{}", encode(id))).await
    }

    /// Starts a job. Repeated with the same job it does nothing.
    pub async fn add_job(&self, job: &Job) -> Result<()> {
        self.http
            .put(&format!("/host/jobs/{}", encode(&job.id)), job)
            .await
    }

    /// Stops a job.
    pub async fn stop_job(&self, id: &str) -> Result<()> {
        self.http.delete(&format!("/host/jobs/{}", encode(id))).await
    }

    /// Sends a signal to a job's process.
    pub async fn signal_job(&self, id: &str, signal: i32) -> Result<()> {
        self.http
            .put(&format!("/host/jobs/{}/signal/{signal}", encode(id)), &())
            .await
    }

    /// Has every process of a job stand still. Its services are taken out of discoverd before.
    pub async fn pause_job(&self, id: &str) -> Result<()> {
        self.http
            .put(&format!("/host/jobs/{}/pause", encode(id)), &())
            .await
    }

    /// Has a paused job go on.
    pub async fn resume_job(&self, id: &str) -> Result<()> {
        self.http
            .put(&format!("/host/jobs/{}/resume", encode(id)), &())
            .await
    }

    /// Takes a job's instances out of discoverd.
    pub async fn deregister_job(&self, id: &str) -> Result<()> {
        self.http
            .put(&format!("/host/jobs/{}/discoverd-deregister", encode(id)), &())
            .await
    }

    /// A job's last `lines` lines of output, and with `follow` what comes after.
    pub async fn log(&self, id: &str, lines: Option<u32>, follow: bool) -> Result<EventStream<LogLine>> {
        let lines = lines.map_or(String::new(), |lines| format!("&lines={lines}"));
        self.http
            .events(&format!("/host/jobs/{}/log?follow={follow}{lines}", encode(id)))
            .await
    }

    /// Starts another program in a job's container; frames of [`super::attach`] follow.
    pub async fn exec(&self, id: &str, request: &ExecRequest) -> Result<Upgraded> {
        self.http
            .upgrade(
                &format!("/host/jobs/{}/exec", encode(id)),
                "flynn-attach/0",
                request,
            )
            .await
    }

    /// Attaches to a job; frames of [`super::attach`] follow.
    pub async fn attach(&self, request: &AttachRequest) -> Result<Upgraded> {
        self.http.upgrade("/attach", "flynn-attach/0", request).await
    }

    /// The host's network.
    pub async fn network(&self) -> Result<NetworkStatus> {
        self.http.get("/host/network").await
    }

    /// The TCP connections of its containers.
    pub async fn flows(&self) -> Result<Vec<Flow>> {
        self.http.get("/host/network/flows").await
    }

    /// Services by their virtual addresses, as its data plane has them.
    pub async fn services(&self) -> Result<Vec<ServiceStatus>> {
        self.http.get("/host/network/services").await
    }

    /// Brings the host's network up.
    pub async fn configure_network(&self, config: &NetworkConfig) -> Result<()> {
        self.http.put("/host/network", config).await
    }

    /// The host's volumes.
    pub async fn volumes(&self) -> Result<Vec<Volume>> {
        self.http.get("/host/volumes").await
    }

    /// The transport, for what has no method here.
    pub fn http(&self) -> &Http {
        &self.http
    }
}
