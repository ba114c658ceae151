//! The host API's `/storage`: volumes and where they are.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use flynn_api::host::{Job, label};
use flynn_api::server::{Json, StrictJson};
use flynn_api::volume::{Copy, Gc, NewProvider, NewVolume, Resize, Rollback};
use flynn_api::{Error, Meta, Result};
use serde::Serialize;
use tokio::task::spawn_blocking;

use super::api::answer;
use super::{Daemon, transfer};
use crate::volumes::{Users, Volumes};

/// The labels of a job that its volumes carry as well.
const LABELS: [&str; 3] = [label::APP_ID, label::APP_NAME, label::PROCESS_TYPE];

type Shared = State<Arc<Daemon>>;

/// The labels of a volume that is made for a job.
pub(super) fn labels(job: &Job) -> Meta {
    let has = |name: &str| Some((name.to_owned(), job.metadata.get(name)?.clone()));
    LABELS.into_iter().filter_map(has).collect()
}

/// The routes.
pub(super) fn router() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/storage/providers", get(providers).post(add_provider))
        .route("/storage/providers/{id}", delete(remove_provider))
        .route("/storage/providers/{id}/volumes", post(create))
        .route("/storage/volumes", get(list))
        .route("/storage/volumes/{id}", get(show).delete(remove))
        .route("/storage/volumes/{id}/snapshot", put(snapshot))
        .route("/storage/volumes/{id}/fork", put(fork))
        .route("/storage/volumes/{id}/rollback", put(rollback))
        .route("/storage/volumes/{id}/resize", put(resize))
        .route("/storage/volumes/{id}/decommission", put(decommission))
        .route("/storage/volumes/{id}/send", get(transfer::send))
        .route("/storage/providers/{id}/receive", post(transfer::receive))
        .route("/storage/gc", post(gc))
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
async fn work<T: Serialize + Send + 'static>(
    daemon: Arc<Daemon>,
    work: impl FnOnce(&Volumes, Users<'_>) -> Result<T> + Send + 'static,
) -> Result<Response> {
    let pass = daemon.gate.beside("work on a volume");
    let done = spawn_blocking(move || {
        let _pass = pass;
        work(&daemon.volumes, &|id| daemon.users(id))
    });
    let done = done.await;
    let done =
        done.unwrap_or_else(|error| Err(Error::internal(format!("a volume's work broke off: {error}"))));
    answer(done.map(|value| Json(value).into_response()))
}

fn nothing((): ()) -> serde_json::Value {
    serde_json::json!({})
}

async fn providers(State(daemon): Shared) -> Result<Response> {
    work(daemon, |volumes, _| Ok(volumes.providers())).await
}

async fn add_provider(State(daemon): Shared, StrictJson(new): StrictJson<NewProvider>) -> Result<Response> {
    work(daemon, move |volumes, _| volumes.add_provider(&new).map(nothing)).await
}

async fn remove_provider(State(daemon): Shared, Path(id): Path<String>) -> Result<Response> {
    work(daemon, move |volumes, _| {
        volumes.remove_provider(&id).map(nothing)
    })
    .await
}

async fn create(
    State(daemon): Shared,
    Path(provider): Path<String>,
    StrictJson(new): StrictJson<NewVolume>,
) -> Result<Response> {
    work(daemon, move |volumes, _| volumes.create(&provider, new)).await
}

async fn list(State(daemon): Shared) -> Result<Response> {
    work(daemon, |volumes, users| volumes.list(users)).await
}

async fn show(State(daemon): Shared, Path(id): Path<String>) -> Result<Response> {
    work(daemon, move |volumes, users| volumes.get(&id, users)).await
}

async fn remove(State(daemon): Shared, Path(id): Path<String>) -> Result<Response> {
    work(daemon, move |volumes, users| {
        volumes.remove(&id, users).map(nothing)
    })
    .await
}

async fn snapshot(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(copy): StrictJson<Copy>,
) -> Result<Response> {
    work(daemon, move |volumes, _| volumes.snapshot(&id, copy.id)).await
}

async fn fork(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(copy): StrictJson<Copy>,
) -> Result<Response> {
    work(daemon, move |volumes, _| volumes.fork(&id, copy.id)).await
}

async fn rollback(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(to): StrictJson<Rollback>,
) -> Result<Response> {
    work(daemon, move |volumes, users| {
        volumes.rollback(&id, &to.snapshot, users).map(nothing)
    })
    .await
}

async fn resize(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(to): StrictJson<Resize>,
) -> Result<Response> {
    work(daemon, move |volumes, users| volumes.resize(&id, to.limit, users)).await
}

async fn decommission(State(daemon): Shared, Path(id): Path<String>) -> Result<Response> {
    work(daemon, move |volumes, users| volumes.decommission(&id, users)).await
}

async fn gc(State(daemon): Shared, StrictJson(gc): StrictJson<Gc>) -> Result<Response> {
    work(daemon, move |volumes, users| volumes.gc(&gc, users)).await
}
