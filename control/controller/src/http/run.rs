//! `POST /apps/{app}/jobs`: one-off jobs. They bypass the scheduler: the controller picks a host and starts them.

use std::sync::Arc;

use axum::extract::{FromRequest as _, Path, Request};
use axum::response::{IntoResponse as _, Response};
use flynn_api::client::Upgraded;
use flynn_api::client::attach::{read_frame, write_frame};
use flynn_api::client::host::HostClient;
use flynn_api::controller::{Job, JobState, NewJob};
use flynn_api::host::{ATTACH_PROTOCOL, AttachRequest, attach};
use flynn_api::server::{Json, StrictJson};
use flynn_api::{Error, ErrorCode, Result};
use http::header::{CONNECTION, HeaderMap, HeaderValue, UPGRADE};
use http::{HeaderName, StatusCode};
use hyper_util::rt::TokioIo;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use uuid::Uuid;

use super::State;
use super::releases::usable;
use crate::data::{Change, apps, artifacts, jobs, releases};
use crate::hosts::Host;
use crate::rules;
use crate::service::Shared;

/// The header of a 101 answer that names the job.
const JOB_ID: HeaderName = HeaderName::from_static("flynn-job-id");
/// How long a host may take to know a job that it has accepted.
const ATTACH_WAIT: Duration = Duration::from_secs(10);
/// Hosts that are tried before giving up.
const TRIES: usize = 3;

/// `POST /apps/{app}/jobs`.
pub(crate) async fn run(state: State, Path(app): Path<String>, mut request: Request) -> Result<Response> {
    let attached = wants(request.headers(), ATTACH_PROTOCOL)?;
    // Taken before the body is: the connection goes over to the job once the answer is sent.
    let upgrade = attached.then(|| hyper::upgrade::on(&mut request));
    let StrictJson(new) = StrictJson::<NewJob>::from_request(request, &()).await?;
    let (found, release, images) = {
        let client = state.database.client().await?;
        let found = apps::find(&client, &app).await?;
        rules::job::check_new(&new, found.app.is_system())?;
        let missing = |why: Error| match why.code {
            ErrorCode::NotFound => Error::invalid_field("release", why.message),
            _ => why,
        };
        let release = usable(&client, &found, &new.release_id).await.map_err(missing)?;
        let images = artifacts::of_release(&client, &release.release.id).await?;
        (found, release, images)
    };
    if images.is_empty() {
        return Err(Error::invalid_field(
            "release",
            "has no image, so there is nothing to run",
        ));
    }
    let (host, job, client) = start(&state, &found, &release, &images, &new, attached).await?;
    tracing::info!(app = %found.app.name, job = %job.id, host = %host.id, "a one-off job was started");
    let Some(upgrade) = upgrade else {
        return Ok(Json(job).into_response());
    };
    let stream = match attach_to(&client, &job, &new).await {
        Ok(stream) => stream,
        Err(why) => {
            // Nobody would ever see it, and its output waits for somebody who does.
            let _ = client.stop_job(&job.id).await;
            return Err(why);
        }
    };
    let answer = switching(&job.id, ATTACH_PROTOCOL)?;
    let shared = Arc::clone(&state);
    tokio::spawn(async move {
        let end = match upgrade.await {
            Ok(caller) => pipe(TokioIo::new(caller), stream).await,
            Err(why) => {
                tracing::warn!(%why, job = %job.id, "the caller of an attached job went away");
                End::CallerGone
            }
        };
        settle(&shared, &found, &release, &client, job, end).await;
    });
    Ok(answer)
}

/// The answer after which the connection is the job's.
pub(super) fn switching(job: &str, protocol: &'static str) -> Result<Response> {
    let id = HeaderValue::from_str(job).map_err(|_| Error::internal("a job's id is no header value"))?;
    let headers = [
        (CONNECTION, HeaderValue::from_static("Upgrade")),
        (UPGRADE, HeaderValue::from_static(protocol)),
        (JOB_ID, id),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Whether a request asks for its connection to be taken over.
pub(super) fn wants(headers: &HeaderMap, protocol: &str) -> Result<bool> {
    match headers.get(UPGRADE) {
        None => Ok(false),
        Some(asked) if asked == protocol => Ok(true),
        Some(_) => Err(Error::validation(format!(
            "Upgrade: the only protocol here is {protocol}"
        ))),
    }
}

/// Starts a job on any host, and records it.
async fn start(
    shared: &Shared,
    app: &apps::Found,
    release: &releases::Found,
    images: &[flynn_api::image::Artifact],
    new: &NewJob,
    attached: bool,
) -> Result<(Host, Job, HostClient)> {
    let mut hosts = shared.hosts.list().await?;
    hosts.retain(|host| !host.leaving);
    let mut last = Error::unavailable("there is no host to run the job on: none is registered in discoverd");
    for _ in 0..TRIES.min(hosts.len()) {
        let uuid = Uuid::new_v4();
        // Any will do; the id's random bits choose.
        let at = usize::from(uuid.as_bytes()[0]) % hosts.len();
        let host = hosts.swap_remove(at);
        let id = format!("{}-{uuid}", host.id);
        let wanted = rules::job::one_off(&app.app, &release.release, images.to_vec(), new, &id, attached);
        // Recorded first: whatever becomes of this controller, the job is known.
        let job = Job {
            id: id.clone(),
            uuid: uuid.to_string(),
            host_id: host.id.clone(),
            app_id: app.app.id.clone(),
            release_id: release.release.id.clone(),
            args: new.args.clone(),
            meta: new.meta.clone(),
            state: JobState::Starting,
            ..Job::default()
        };
        let client = shared.hosts.client(&host)?;
        let job = record(shared, app, release, &job).await?;
        match client.add_job(&wanted).await {
            Ok(()) => return Ok((host, job, client)),
            Err(why) => {
                tracing::warn!(host = %host.id, %why, "a host did not take a one-off job");
                let message = format!("the host {} did not take the job: {}", host.id, why.message);
                // It may have been taken although the answer was lost.
                if why.retry {
                    let _ = client.stop_job(&id).await;
                }
                let failed = Job {
                    state: JobState::Down,
                    host_error: Some(message.clone()),
                    ..job
                };
                record(shared, app, release, &failed).await?;
                last = Error { message, ..why };
                if last.code != ErrorCode::Unavailable {
                    break;
                }
            }
        }
    }
    Err(last)
}

async fn record(shared: &Shared, app: &apps::Found, release: &releases::Found, job: &Job) -> Result<Job> {
    let mut client = shared.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let job = jobs::put(change.tx(), app.id, release.id, job).await?;
    super::jobs::tell(&mut change, app, &job).await?;
    change.commit().await?;
    Ok(job)
}

/// Attaches to a job just started. Its output waits for that, so none is lost however late it comes.
async fn attach_to(client: &HostClient, job: &Job, new: &NewJob) -> Result<Upgraded> {
    let flags = ["stdin", "stdout", "stderr"].map(str::to_owned).to_vec();
    let request = AttachRequest {
        job_id: job.id.clone(),
        flags,
        tty_size: new.tty_size,
        lines: 0,
    };
    let attach = async {
        loop {
            match client.attach(&request).await {
                Err(why) if why.code == ErrorCode::NotFound || why.retry => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                result => return result,
            }
        }
    };
    tokio::time::timeout(ATTACH_WAIT, attach)
        .await
        .unwrap_or_else(|_| {
            let message = format!(
                "the job {} started, but its host did not let us attach to it in time",
                job.id
            );
            Err(Error::new(ErrorCode::Timeout, message))
        })
}

/// How an attached job's connection came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The job ended with this status, if it is known.
    Job(Option<i32>),
    /// The caller went away while the job ran.
    CallerGone,
    /// The host went away.
    HostGone,
}

/// Pipes both ways until the job's last frame, or until the caller closes their side: the end of the job's input is a frame.
/// Each direction holds one piece at a time.
pub(super) async fn pipe(caller: TokioIo<hyper::upgrade::Upgraded>, host: Upgraded) -> End {
    let (mut from_caller, mut to_caller) = tokio::io::split(caller);
    let (mut from_host, mut to_host) = tokio::io::split(host);
    let input = async {
        let mut piece = vec![0; 16 * 1024];
        loop {
            match from_caller.read(&mut piece).await {
                Ok(n @ 1..) => {
                    if to_host.write_all(&piece[..n]).await.is_err() || to_host.flush().await.is_err() {
                        // The host says why on the other half, or breaks off there too.
                        return std::future::pending::<End>().await;
                    }
                }
                Ok(0) | Err(_) => return End::CallerGone,
            }
        }
    };
    let output = async {
        loop {
            let Ok(Some(frame)) = read_frame(&mut from_host).await else {
                let why =
                    b"the connection to the job's host broke off; `flynn ps` says whether the job runs on";
                let _ = write_frame(&mut to_caller, attach::ERROR, why).await;
                return End::HostGone;
            };
            if write_frame(&mut to_caller, frame.kind, &frame.payload)
                .await
                .is_err()
            {
                return End::CallerGone;
            }
            match frame.kind {
                attach::EXIT => {
                    let status = frame.payload.as_slice().try_into().ok().map(i32::from_be_bytes);
                    return End::Job(status);
                }
                attach::ERROR => return End::Job(None),
                _ => {}
            }
        }
    };
    let end = tokio::select! {
        end = output => end,
        end = input => end,
    };
    let _ = to_caller.shutdown().await;
    end
}

/// Records how an attached job ended. One whose caller is gone is stopped: nobody could ever reach it again.
async fn settle(
    shared: &Shared,
    app: &apps::Found,
    release: &releases::Found,
    client: &HostClient,
    job: Job,
    end: End,
) {
    let result = match end {
        End::Job(exit_status) => {
            let down = Job {
                state: JobState::Down,
                exit_status,
                ..job
            };
            record(shared, app, release, &down).await.map(drop)
        }
        End::CallerGone => client.stop_job(&job.id).await,
        End::HostGone => Ok(()),
    };
    if let Err(why) = result {
        tracing::warn!(%why, ?end, "the end of an attached job could not be dealt with");
    }
}
