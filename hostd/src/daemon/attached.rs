//! Connections of the host API that are taken over: a job's streams, another program's in its container, one of its
//! ports.

mod within;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Path, Request as HttpRequest, State};
use axum::http::StatusCode;
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use flynn_api::client::attach::write_frame;
use flynn_api::host::{
    ATTACH_PROTOCOL, AttachRequest, ExecRequest, FORWARD_PROTOCOL, ForwardRequest, attach,
};
use flynn_api::server::openapi::{Input, Operation, Output};
use flynn_api::{Error, Result};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
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

/// What a client wishes that wants its connection upgraded.
pub(super) trait Wish: DeserializeOwned + Serialize + JsonSchema {
    /// To what.
    const PROTOCOL: &'static str;
}

impl Wish for AttachRequest {
    const PROTOCOL: &'static str = ATTACH_PROTOCOL;
}

impl Wish for ExecRequest {
    const PROTOCOL: &'static str = ATTACH_PROTOCOL;
}

impl Wish for ForwardRequest {
    const PROTOCOL: &'static str = FORWARD_PROTOCOL;
}

/// A connection that is to be upgraded, and what for.
pub(super) struct Upgrading<W> {
    parts: Parts,
    wish: W,
}

impl<S: Send + Sync, W: Wish> FromRequest<S> for Upgrading<W> {
    type Rejection = Error;

    async fn from_request(request: HttpRequest, _: &S) -> Result<Self> {
        let protocol = W::PROTOCOL;
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
        Ok(Self { parts, wish })
    }
}

impl<W: Wish> Input for Upgrading<W> {
    fn describe(call: &mut Operation<'_>) {
        call.parameter("header", "Upgrade", true, json!({ "const": W::PROTOCOL }));
        let content = call.json::<W>();
        call.body("application/json", content);
    }
}

/// The answer after which a connection speaks another protocol.
pub(super) struct SwitchingProtocols(Response);

impl IntoResponse for SwitchingProtocols {
    fn into_response(self) -> Response {
        self.0
    }
}

impl Output for SwitchingProtocols {
    fn describe(call: &mut Operation<'_>) {
        call.answer("101", "Switching Protocols: the connection is taken over");
    }
}

/// Answers with the upgrade, and then has `carry` serve the connection.
fn upgrade<W: Wish, F>(
    daemon: &Daemon,
    parts: Parts,
    carry: impl FnOnce(TokioIo<Upgraded>) -> F + Send + 'static,
) -> SwitchingProtocols
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
    let headers = [(CONNECTION, "Upgrade"), (UPGRADE, W::PROTOCOL)];
    SwitchingProtocols((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Has the daemon that acts by now take the connection over.
async fn pass_on<W: Wish>(daemon: &Daemon, parts: Parts, wish: &W) -> Result<SwitchingProtocols> {
    let mut successor = pass_on::upgrade(&parts, W::PROTOCOL, wish).await?;
    Ok(upgrade::<W, _>(daemon, parts, async move |mut client| {
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
    Upgrading { parts, wish }: Upgrading<ExecRequest>,
) -> Result<SwitchingProtocols> {
    if wish.args.first().is_none_or(String::is_empty) {
        return Err(Error::invalid_field("args", "names no program"));
    }
    if daemon.gate.is_left() {
        return pass_on(&daemon, parts, &wish).await;
    }
    let entry = going_on(&daemon, &id)?;
    let request = Request::Exec(wish);
    entry.understands(&request)?;
    let failed = |error| Error::conflict(format!("cannot start it in the job {id}: {error}"));
    let mut supervisor = Connection::open(&Paths::socket(&id)).await.map_err(failed)?;
    supervisor.call(&request).await.map_err(failed)?;
    Ok(upgrade::<ExecRequest, _>(
        &daemon,
        parts,
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
    Upgrading { parts, wish }: Upgrading<ForwardRequest>,
) -> Result<SwitchingProtocols> {
    if daemon.gate.is_left() {
        return pass_on(&daemon, parts, &wish).await;
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
    Ok(upgrade::<ForwardRequest, _>(
        &daemon,
        parts,
        async move |mut client| copy_bidirectional(&mut client, &mut port).await.map(drop),
    ))
}

pub(super) async fn attach(
    State(daemon): Shared,
    Upgrading { parts, wish }: Upgrading<AttachRequest>,
) -> Result<SwitchingProtocols> {
    let entry = tokio::select! {
        entry = wait_for(&daemon, &wish.job_id) => entry?,
        () = daemon.gate.left() => return pass_on(&daemon, parts, &wish).await,
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
    Ok(upgrade::<AttachRequest, _>(
        &daemon,
        parts,
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
