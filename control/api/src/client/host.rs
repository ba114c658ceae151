//! Client of the host API ([`crate::host`]).

use std::collections::BTreeMap;
use std::time::Duration;

use hyper::body::Incoming;

use super::{Body, EventStream, Http, Upgraded, encode};
use crate::host::{
    ATTACH_PROTOCOL, ActiveJob, AttachRequest, ExecRequest, FORWARD_PROTOCOL, Flow, ForwardRequest,
    HostStatus, Job, JobEvent, LogLine, NetworkConfig, NetworkStatus, ServiceStatus, Update, Updated,
};
use crate::image::{CollectedLayers, LayerGc, StoredLayer, VerifiedLayers};
use crate::resources::Resources;
use crate::sink::{Sink, SinkStatus};
use crate::volume::{Copy, Gc, NewProvider, NewVolume, Provider, Resize, Rollback, Volume};
use crate::{Meta, Result};

/// How long a volume may be on its way, or all layers be read.
const LONG: Duration = Duration::from_hours(24);

/// How long another program may take to go on with a daemon's work.
const UPDATE: Duration = Duration::from_mins(5);

/// How long work on a volume may take: making a large filesystem takes minutes, and so does waiting for what somebody
/// else does with the same volume.
const WORK: Duration = Duration::from_mins(30);

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

    /// Changes limits of a running job, those that are named.
    pub async fn update_limits(&self, id: &str, limits: &Resources) -> Result<()> {
        self.http
            .put(&format!("/host/jobs/{}/limits", encode(id)), limits)
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
                ATTACH_PROTOCOL,
                request,
            )
            .await
    }

    /// Connects to a port of a job; the connection's bytes follow.
    pub async fn forward(&self, id: &str, request: &ForwardRequest) -> Result<Upgraded> {
        self.http
            .upgrade(
                &format!("/host/jobs/{}/forward", encode(id)),
                FORWARD_PROTOCOL,
                request,
            )
            .await
    }

    /// Attaches to a job; frames of [`super::attach`] follow.
    pub async fn attach(&self, request: &AttachRequest) -> Result<Upgraded> {
        self.http.upgrade("/attach", ATTACH_PROTOCOL, request).await
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

    /// Sets the tags for placement, all of them.
    pub async fn set_tags(&self, tags: &Meta) -> Result<()> {
        self.http.put("/host/tags", tags).await
    }

    /// Has the host's jobs go to other hosts, or no longer.
    pub async fn drain(&self, draining: bool) -> Result<()> {
        if draining {
            self.http.put("/host/drain", &()).await
        } else {
            self.http.delete("/host/drain").await
        }
    }

    /// Has another program go on with the daemon's work.
    pub async fn update(&self, update: &Update) -> Result<Updated> {
        self.http
            .clone()
            .timeout(UPDATE)
            .post("/host/update", update)
            .await
    }

    /// The layers in the host's store.
    pub async fn layers(&self) -> Result<Vec<StoredLayer>> {
        self.http.get("/host/layers").await
    }

    /// Removes layers that nobody needs.
    pub async fn collect_layers(&self, gc: &LayerGc) -> Result<CollectedLayers> {
        self.http.post("/host/layers/gc", gc).await
    }

    /// Reads all layers; damaged ones are set aside, and fetched again where a job says from where.
    pub async fn verify_layers(&self) -> Result<VerifiedLayers> {
        self.http
            .clone()
            .timeout(LONG)
            .post("/host/layers/verify", &())
            .await
    }

    /// Where the host's jobs' logs are sent.
    pub async fn sinks(&self) -> Result<Vec<SinkStatus>> {
        self.http.get("/sinks").await
    }

    /// Has logs sent to a sink, or changes how. Repeated it does nothing.
    pub async fn put_sink(&self, sink: &Sink) -> Result<Sink> {
        self.http.put(&format!("/sinks/{}", encode(&sink.id)), sink).await
    }

    /// Has logs sent to a sink no more.
    pub async fn remove_sink(&self, id: &str) -> Result<()> {
        self.http.delete(&format!("/sinks/{}", encode(id))).await
    }

    /// The host's volumes.
    pub async fn volumes(&self) -> Result<Vec<Volume>> {
        self.http.get("/storage/volumes").await
    }

    /// One volume, and how full it is.
    pub async fn volume(&self, id: &str) -> Result<Volume> {
        self.http.get(&volume(id, "")).await
    }

    /// Makes a volume at one of the host's providers.
    pub async fn create_volume(&self, provider: &str, new: &NewVolume) -> Result<Volume> {
        let path = format!("/storage/providers/{}/volumes", encode(provider));
        self.working().post(&path, new).await
    }

    /// Removes a volume that no job uses, and its data.
    pub async fn delete_volume(&self, id: &str) -> Result<()> {
        self.working().delete(&volume(id, "")).await
    }

    /// Makes a snapshot of a volume.
    pub async fn snapshot_volume(&self, id: &str, copy: &Copy) -> Result<Volume> {
        self.working().put(&volume(id, "/snapshot"), copy).await
    }

    /// Makes a volume that begins as a copy of a snapshot or of another volume.
    pub async fn fork_volume(&self, id: &str, copy: &Copy) -> Result<Volume> {
        self.working().put(&volume(id, "/fork"), copy).await
    }

    /// Makes a volume that no job uses what it was when a snapshot of it was made.
    pub async fn roll_volume_back(&self, id: &str, to: &Rollback) -> Result<()> {
        self.working().put(&volume(id, "/rollback"), to).await
    }

    /// Has a volume hold more from now on, or less.
    pub async fn resize_volume(&self, id: &str, to: &Resize) -> Result<Volume> {
        self.working().put(&volume(id, "/resize"), to).await
    }

    /// Sets a volume aside that no job uses. Gives it by its other id.
    pub async fn decommission_volume(&self, id: &str) -> Result<Volume> {
        self.working().put(&volume(id, "/decommission"), &()).await
    }

    /// Removes decommissioned volumes; gives their ids.
    pub async fn collect_volumes(&self, gc: &Gc) -> Result<Vec<String>> {
        self.working().post("/storage/gc", gc).await
    }

    /// A snapshot as a stream, or what differs from an earlier one.
    pub async fn send_volume(&self, id: &str, from: Option<&str>) -> Result<Incoming> {
        let from = from.map_or(String::new(), |from| format!("?from={}", encode(from)));
        let request = http::Request::get(format!("{}{from}", volume(id, "/send"))).body(super::full(""));
        let request =
            request.map_err(|why| crate::Error::validation(format!("{id:?} is no volume: {why}")))?;
        Ok(self.http.send(request).await?.into_body())
    }

    /// Takes such a stream in.
    pub async fn receive_volume(&self, provider: &str, body: Body) -> Result<Volume> {
        let path = format!("/storage/providers/{}/receive", encode(provider));
        self.http.clone().timeout(LONG).post_body(&path, body).await
    }

    /// Where the host keeps volumes.
    pub async fn providers(&self) -> Result<Vec<Provider>> {
        self.http.get("/storage/providers").await
    }

    /// Adds a provider. Repeated it does nothing.
    pub async fn add_provider(&self, new: &NewProvider) -> Result<()> {
        self.http.post("/storage/providers", new).await
    }

    /// Takes a provider without volumes off the list.
    pub async fn remove_provider(&self, id: &str) -> Result<()> {
        let path = format!("/storage/providers/{}", encode(id));
        self.http.delete(&path).await
    }

    /// The transport, for what takes its time.
    fn working(&self) -> Http {
        self.http.clone().timeout(WORK)
    }

    /// The transport, for what has no method here.
    pub fn http(&self) -> &Http {
        &self.http
    }
}

fn volume(id: &str, action: &str) -> String {
    format!("/storage/volumes/{}{action}", encode(id))
}
