//! The host API's `/storage`: volumes and where they are.

use std::sync::Arc;

use axum::extract::{Path, State};
use flynn_api::host::{Job, label};
use flynn_api::server::openapi::{Calls, Done};
use flynn_api::server::{Json, StrictJson};
use flynn_api::volume::{Copy, Gc, NewProvider, NewVolume, Provider, Resize, Rollback, Volume};
use flynn_api::{Error, Meta, Result};
use tokio::task::spawn_blocking;

use super::Daemon;
use super::api::Shared;
use super::transfer::{receive_volume, send_volume};
use crate::volumes::{Users, Volumes};

/// The labels of a job that its volumes carry as well.
const LABELS: [&str; 3] = [label::APP_ID, label::APP_NAME, label::PROCESS_TYPE];

/// The labels of a volume that is made for a job.
pub(super) fn labels(job: &Job) -> Meta {
    let has = |name: &str| Some((name.to_owned(), job.metadata.get(name)?.clone()));
    LABELS.into_iter().filter_map(has).collect()
}

/// Adds the calls.
pub(super) fn add(calls: Calls<Arc<Daemon>>) -> Calls<Arc<Daemon>> {
    flynn_api::calls! { calls;
        get "/storage/providers" => providers: "Where the host keeps volumes";
        post "/storage/providers" => add_provider: "Adds a place for volumes";
        delete "/storage/providers/{id}" => remove_provider: "Takes a provider without volumes off the list";
        post "/storage/providers/{id}/volumes" => create_volume: "Makes a volume";
        post "/storage/providers/{id}/receive" => receive_volume: "Takes in a snapshot as it is sent";
        get "/storage/volumes" => volumes: "All volumes";
        get "/storage/volumes/{id}" => volume: "A volume, and how many bytes it holds";
        delete "/storage/volumes/{id}" => delete_volume: "Removes a volume for good";
        put "/storage/volumes/{id}/snapshot" => snapshot_volume: "Makes a snapshot of a volume";
        put "/storage/volumes/{id}/fork" => fork_volume: "Makes a volume that begins as a copy of this one";
        put "/storage/volumes/{id}/rollback" => roll_volume_back: "Makes a volume what it was";
        put "/storage/volumes/{id}/resize" => resize_volume: "Has a volume hold more, or less";
        put "/storage/volumes/{id}/decommission" => decommission_volume: "Sets a volume aside, under another id";
        get "/storage/volumes/{id}/send" => send_volume: "A snapshot, or what differs from an earlier one";
        post "/storage/gc" => collect_volumes: "Removes decommissioned volumes, and gives their ids";
    }
}

impl Daemon {
    /// The jobs that have a volume mounted.
    pub(super) fn users(&self, id: &str) -> Vec<String> {
        let mut jobs = self.table.all();
        jobs.retain(|entry| {
            let mut volumes = entry.job.config.volumes.iter();
            !entry.status.state.is_terminal() && volumes.any(|volume| volume.volume_id == id)
        });
        jobs.into_iter().map(|entry| entry.job.id.clone()).collect()
    }
}

/// Answers with what `work` gives, which is told whose jobs use what. It may wait for disks, and is done whether the
/// caller waits or not.
async fn work<T: Send + 'static>(
    daemon: Arc<Daemon>,
    work: impl FnOnce(&Volumes, Users<'_>) -> Result<T> + Send + 'static,
) -> Result<Json<T>> {
    let pass = daemon.gate.beside("work on a volume");
    let done = spawn_blocking(move || {
        let _pass = pass;
        work(&daemon.volumes, &|id| daemon.users(id))
    });
    let done = done.await;
    let done =
        done.unwrap_or_else(|error| Err(Error::internal(format!("a volume's work broke off: {error}"))));
    done.map(Json)
}

fn nothing((): ()) -> Done {
    Done {}
}

async fn providers(State(daemon): Shared) -> Result<Json<Vec<Provider>>> {
    work(daemon, |volumes, _| Ok(volumes.providers())).await
}

async fn add_provider(State(daemon): Shared, StrictJson(new): StrictJson<NewProvider>) -> Result<Json<Done>> {
    work(daemon, move |volumes, _| volumes.add_provider(&new).map(nothing)).await
}

async fn remove_provider(State(daemon): Shared, Path(id): Path<String>) -> Result<Json<Done>> {
    work(daemon, move |volumes, _| {
        volumes.remove_provider(&id).map(nothing)
    })
    .await
}

async fn create_volume(
    State(daemon): Shared,
    Path(provider): Path<String>,
    StrictJson(new): StrictJson<NewVolume>,
) -> Result<Json<Volume>> {
    work(daemon, move |volumes, _| volumes.create(&provider, new)).await
}

async fn volumes(State(daemon): Shared) -> Result<Json<Vec<Volume>>> {
    work(daemon, |volumes, users| volumes.list(users)).await
}

async fn volume(State(daemon): Shared, Path(id): Path<String>) -> Result<Json<Volume>> {
    work(daemon, move |volumes, users| volumes.get(&id, users)).await
}

async fn delete_volume(State(daemon): Shared, Path(id): Path<String>) -> Result<Json<Done>> {
    work(daemon, move |volumes, users| {
        volumes.remove(&id, users).map(nothing)
    })
    .await
}

async fn snapshot_volume(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(copy): StrictJson<Copy>,
) -> Result<Json<Volume>> {
    work(daemon, move |volumes, _| volumes.snapshot(&id, copy.id)).await
}

async fn fork_volume(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(copy): StrictJson<Copy>,
) -> Result<Json<Volume>> {
    work(daemon, move |volumes, _| volumes.fork(&id, copy.id)).await
}

async fn roll_volume_back(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(to): StrictJson<Rollback>,
) -> Result<Json<Done>> {
    work(daemon, move |volumes, users| {
        volumes.rollback(&id, &to.snapshot, users).map(nothing)
    })
    .await
}

async fn resize_volume(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(to): StrictJson<Resize>,
) -> Result<Json<Volume>> {
    work(daemon, move |volumes, users| volumes.resize(&id, to.limit, users)).await
}

async fn decommission_volume(State(daemon): Shared, Path(id): Path<String>) -> Result<Json<Volume>> {
    work(daemon, move |volumes, users| volumes.decommission(&id, users)).await
}

async fn collect_volumes(State(daemon): Shared, StrictJson(gc): StrictJson<Gc>) -> Result<Json<Vec<String>>> {
    work(daemon, move |volumes, users| volumes.gc(&gc, users)).await
}
