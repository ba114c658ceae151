//! Connections of the host API that are taken over: a job's streams, another program's in its container, one of its
//! ports.

mod within;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request as HttpRequest, State};
use axum::http::StatusCode;
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::request::Parts;
use axum::response::{IntoResponse as _, Response};
use flynn_api::client::attach::write_frame;
use flynn_api::host::{
    ATTACH_PROTOCOL, AttachRequest, ExecRequest, FORWARD_PROTOCOL, ForwardRequest, attach,
};
use flynn_api::{Error, Result};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncWrite, AsyncWriteExt as _, copy_bidirectional};
use tokio::time::{sleep, timeout};

use super::api::Shared;
use super::table::Entry;
use super::{Daemon, pass_on};
use crate::control::{Connection, Request};
use crate::logs::Follower;
use crate::paths::Paths;
use crate::supervisor::frame_of;

/// How long an attached client waits for its job to come.
const ATTACH_WAIT: Duration = Duration::from_secs(10);

/// Reads what a client wishes that wants its connection upgraded.
async fn upgrading<T: DeserializeOwned>(request: HttpRequest, protocol: &str) -> Result<(Parts, T)> {
    if request
        .headers()
        .get(UPGRADE)
        .is_none_or(|asked| asked != protocol)
    {
        return Err(Error::validation(format!(
            "the connection is taken over: send Connection: Upgrade and Upgrade: {protocol}"
        )));
    }
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 64 << 10)
        .await
        .map_err(|_| Error::validation("the body is cut short or longer than 64 KiB"))?;
    let wish = serde_json::from_slice(&body)
        .map_err(|error| Error::validation(format!("the body cannot be read: {error}")))?;
    Ok((parts, wish))
}

/// Answers with the upgrade, and then has `carry` serve the connection.
fn upgrade<F>(
    daemon: &Daemon,
    parts: Parts,
    protocol: &'static str,
    carry: impl FnOnce(TokioIo<Upgraded>) -> F + Send + 'static,
) -> Response
where
    F: Future<Output = io::Result<()>> + Send,
{
    let mut request = HttpRequest::from_parts(parts, Body::empty());
    let upgrade = hyper::upgrade::on(&mut request);
    daemon.sessions.spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        if let Err(error) = carry(TokioIo::new(upgraded)).await {
            tracing::debug!(%error, "attached connection");
        }
    });
    let headers = [(CONNECTION, "Upgrade"), (UPGRADE, protocol)];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// Has the daemon that acts by now take the connection over.
async fn pass_on(
    daemon: &Daemon,
    parts: Parts,
    protocol: &'static str,
    wish: &impl Serialize,
) -> Result<Response> {
    let mut successor = pass_on::upgrade(&parts, protocol, wish).await?;
    Ok(upgrade(daemon, parts, protocol, async move |mut client| {
        copy_bidirectional(&mut client, &mut successor).await.map(drop)
    }))
}

/// A job that is not over.
fn going_on(daemon: &Daemon, id: &str) -> Result<Entry> {
    let entry = daemon.table.get(id).ok_or_else(|| Error::not_found("job", id))?;
    if entry.status.state.is_terminal() {
        return Err(Error::conflict(format!("the job {id} is over")));
    }
    Ok(entry)
}

pub(super) async fn exec(
    State(daemon): Shared,
    Path(id): Path<String>,
    request: HttpRequest,
) -> Result<Response> {
    let (parts, wish) = upgrading::<ExecRequest>(request, ATTACH_PROTOCOL).await?;
    if wish.args.first().is_none_or(String::is_empty) {
        return Err(Error::invalid_field("args", "names no program"));
    }
    if daemon.gate.is_left() {
        return pass_on(&daemon, parts, ATTACH_PROTOCOL, &wish).await;
    }
    let entry = going_on(&daemon, &id)?;
    let request = Request::Exec(wish);
    entry.understands(&request)?;
    let failed = |error| Error::conflict(format!("cannot start it in the job {id}: {error}"));
    let mut supervisor = Connection::open(&Paths::socket(&id)).await.map_err(failed)?;
    supervisor.call(&request).await.map_err(failed)?;
    Ok(upgrade(
        &daemon,
        parts,
        ATTACH_PROTOCOL,
        async move |mut client| {
            let mut supervisor = supervisor.into_stream();
            copy_bidirectional(&mut client, &mut supervisor).await.map(drop)
        },
    ))
}

/// Connects to a port in the job's network, which its supervisor is in as well.
pub(super) async fn forward(
    State(daemon): Shared,
    Path(id): Path<String>,
    request: HttpRequest,
) -> Result<Response> {
    let (parts, wish) = upgrading::<ForwardRequest>(request, FORWARD_PROTOCOL).await?;
    if daemon.gate.is_left() {
        return pass_on(&daemon, parts, FORWARD_PROTOCOL, &wish).await;
    }
    let status = going_on(&daemon, &id)?.status;
    // A supervisor may still be in the host's network before its job runs.
    let supervisor = status.supervisor.filter(|_| status.pid.is_some());
    let supervisor = supervisor.ok_or_else(|| Error::conflict(format!("the job {id} does not run yet")))?;
    let failed = |error: io::Error| {
        let why = match error.kind() {
            io::ErrorKind::ConnectionRefused => "nothing listens there".to_owned(),
            _ => error.to_string(),
        };
        Error::conflict(format!(
            "cannot connect to port {} of the job {id}: {why}",
            wish.port
        ))
    };
    let mut port = within::connect(supervisor, status.address, wish.port)
        .await
        .map_err(failed)?;
    Ok(upgrade(
        &daemon,
        parts,
        FORWARD_PROTOCOL,
        async move |mut client| copy_bidirectional(&mut client, &mut port).await.map(drop),
    ))
}

pub(super) async fn attach(State(daemon): Shared, request: HttpRequest) -> Result<Response> {
    let (parts, wish) = upgrading::<AttachRequest>(request, ATTACH_PROTOCOL).await?;
    let entry = tokio::select! {
        entry = wait_for(&daemon, &wish.job_id) => entry?,
        () = daemon.gate.left() => return pass_on(&daemon, parts, ATTACH_PROTOCOL, &wish).await,
    };
    let has = |stream: &str| wish.flags.iter().any(|flag| flag == stream);
    let streams = [has("stdout"), has("stderr")];
    let attach = Request::Attach {
        stdin: has("stdin"),
        stdout: streams[0],
        stderr: streams[1],
        tty_size: wish.tty_size,
        lines: wish.lines,
    };
    let supervisor = match Connection::open(&Paths::socket(&wish.job_id)).await {
        Ok(mut connection) => {
            connection
                .call(&attach)
                .await
                .map_err(|error| Error::unavailable(format!("cannot attach: {error}")))?;
            Some(connection)
        }
        Err(_) if entry.status.state.is_terminal() => None,
        Err(error) => {
            return Err(Error::unavailable(format!(
                "the job's supervisor does not answer: {error}"
            )));
        }
    };
    let replaying = Arc::clone(&daemon);
    Ok(upgrade(
        &daemon,
        parts,
        ATTACH_PROTOCOL,
        async move |mut client| match supervisor {
            Some(connection) => {
                let mut supervisor = connection.into_stream();
                copy_bidirectional(&mut client, &mut supervisor).await.map(drop)
            }
            None => replay(&replaying, &wish, streams, &mut client).await,
        },
    ))
}

/// The job once its supervisor can be attached to. Clients may attach before they ask for the job.
async fn wait_for(daemon: &Daemon, id: &str) -> Result<Entry> {
    let ready = |entry: &Entry| entry.status.state.is_terminal() || Paths::socket(id).exists();
    let waiting = async {
        loop {
            if let Some(entry) = daemon.table.get(id).filter(ready) {
                return entry;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(ATTACH_WAIT, waiting)
        .await
        .map_err(|_| Error::not_found("job", id))
}

/// What an attached client would have seen of a job that is over.
async fn replay(
    daemon: &Daemon,
    wish: &AttachRequest,
    streams: [bool; 2],
    client: &mut (impl AsyncWrite + Unpin),
) -> io::Result<()> {
    if wish.lines > 0 {
        let last = usize::try_from(wish.lines).ok();
        let lines = Follower::open(&daemon.paths.job(&wish.job_id).join("log"), last)?.read_all()?;
        for frame in lines.iter().filter_map(|line| frame_of(line, streams)) {
            write_frame(client, frame.kind, &frame.payload).await?;
        }
    }
    let status = daemon.table.get(&wish.job_id).map(|entry| entry.status);
    if let Some(exit) = status.as_ref().and_then(|status| status.exit_status) {
        write_frame(client, attach::EXIT, &exit.to_be_bytes()).await?;
    } else {
        let why = status.and_then(|status| status.error);
        let why = why.unwrap_or_else(|| "the job was stopped".into());
        write_frame(client, attach::ERROR, why.as_bytes()).await?;
    }
    client.shutdown().await
}
