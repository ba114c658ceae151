//! `POST /apps/{app}/jobs/{id}/exec`: another program in a running job's container. The controller finds the host and passes
//! the connection on.

use axum::extract::{FromRequest as _, Path, Request};
use axum::response::Response;
use flynn_api::host::ExecRequest;
use flynn_api::server::StrictJson;
use flynn_api::{Error, Result};
use hyper_util::rt::TokioIo;

use super::State;
use super::jobs::find;
use super::run::{pipe, switching, wants_attach};
use crate::data::apps;

/// `POST /apps/{app}/jobs/{id}/exec`.
pub(crate) async fn exec(
    state: State,
    Path((app, id)): Path<(String, String)>,
    mut request: Request,
) -> Result<Response> {
    let attached = wants_attach(request.headers())?;
    // Taken before the body is: the connection goes over once the answer is sent.
    let upgrade = hyper::upgrade::on(&mut request);
    let StrictJson(wish) = StrictJson::<ExecRequest>::from_request(request, &()).await?;
    if !attached {
        return Err(Error::validation(
            "the connection goes over to the program: send Connection: Upgrade and Upgrade: flynn-attach/0",
        ));
    }
    let job = {
        let client = state.database.client().await?;
        let app = apps::find_any(&client, &app).await?;
        find(&client, &app, &id).await?
    };
    if job.id.is_empty() {
        return Err(Error::conflict("the job has no host yet: wait until it is up"));
    }
    let host = state.hosts.find(&job.host_id).await?;
    let stream = state.hosts.client(&host)?.exec(&job.id, &wish).await?;
    tracing::info!(job = %job.id, program = wish.args.first(), "a program is run beside a job's own");
    let answer = switching(&job.id)?;
    tokio::spawn(async move {
        match upgrade.await {
            // The host ends the program with its client.
            Ok(caller) => drop(pipe(TokioIo::new(caller), stream).await),
            Err(why) => tracing::warn!(%why, job = %job.id, "the caller of a program went away"),
        }
    });
    Ok(answer)
}
