//! Connections into a running job: another program in its container, one of its ports. The controller finds the host and
//! passes them on.

use axum::extract::{FromRequest as _, Path, Request};
use axum::response::Response;
use flynn_api::client::host::HostClient;
use flynn_api::controller::Job;
use flynn_api::host::{ATTACH_PROTOCOL, ExecRequest, FORWARD_PROTOCOL, ForwardRequest};
use flynn_api::server::StrictJson;
use flynn_api::{Error, Result};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::copy_bidirectional;

use super::State;
use super::jobs::find;
use super::run::{pipe, switching, wants};
use crate::data::apps;

/// `POST /apps/{app}/jobs/{id}/exec`.
pub(crate) async fn exec(
    state: State,
    Path((app, id)): Path<(String, String)>,
    request: Request,
) -> Result<Response> {
    let (upgrade, wish) = taken_over::<ExecRequest>(request, ATTACH_PROTOCOL).await?;
    let (job, host) = running(&state, &app, &id).await?;
    let stream = host.exec(&job.id, &wish).await?;
    tracing::info!(job = %job.id, program = wish.args.first(), "a program is run beside a job's own");
    let answer = switching(&job.id, ATTACH_PROTOCOL)?;
    tokio::spawn(async move {
        match upgrade.await {
            // The host ends the program with its client.
            Ok(caller) => drop(pipe(TokioIo::new(caller), stream).await),
            Err(why) => tracing::warn!(%why, job = %job.id, "the caller of a program went away"),
        }
    });
    Ok(answer)
}

/// `POST /apps/{app}/jobs/{id}/forward`.
pub(crate) async fn forward(
    state: State,
    Path((app, id)): Path<(String, String)>,
    request: Request,
) -> Result<Response> {
    let (upgrade, wish) = taken_over::<ForwardRequest>(request, FORWARD_PROTOCOL).await?;
    let (job, host) = running(&state, &app, &id).await?;
    let mut stream = host.forward(&job.id, &wish).await?;
    let answer = switching(&job.id, FORWARD_PROTOCOL)?;
    tokio::spawn(async move {
        if let Ok(caller) = upgrade.await {
            // One that is cut ends the other: there is nothing more to say.
            drop(copy_bidirectional(&mut TokioIo::new(caller), &mut stream).await);
        }
    });
    Ok(answer)
}

/// What a caller wishes that hands its connection over.
async fn taken_over<T: DeserializeOwned>(
    mut request: Request,
    protocol: &'static str,
) -> Result<(OnUpgrade, T)> {
    let asked = wants(request.headers(), protocol)?;
    // Taken before the body is: the connection goes over once the answer is sent.
    let upgrade = hyper::upgrade::on(&mut request);
    let StrictJson(wish) = StrictJson::<T>::from_request(request, &()).await?;
    if !asked {
        return Err(Error::validation(format!(
            "the connection goes over to the job: send Connection: Upgrade and Upgrade: {protocol}"
        )));
    }
    Ok((upgrade, wish))
}

/// A job of an app that has a host, and the way to that.
async fn running(state: &State, app: &str, id: &str) -> Result<(Job, HostClient)> {
    let job = {
        let client = state.database.client().await?;
        let app = apps::find_any(&client, app).await?;
        find(&client, &app, id).await?
    };
    if job.id.is_empty() {
        return Err(Error::conflict("the job has no host yet: wait until it is up"));
    }
    let host = state.hosts.find(&job.host_id).await?;
    let client = state.hosts.client(&host)?;
    Ok((job, client))
}
