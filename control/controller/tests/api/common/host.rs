//! A discoverd with one host, and that host: its API over mutual TLS, with nothing behind it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Path, Query, Request, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use flynn_api::client::attach::{read_frame, write_frame};
use flynn_api::discovery::Instance;
use flynn_api::host::{
    AttachRequest, ExecRequest, FORWARD_PROTOCOL, ForwardRequest, Job, LogLine, LogStream, attach,
};
use flynn_api::server::{CancellationToken, Json, Listener, Peer, events, serve};
use flynn_api::tls::{Ca, ClientAuth, PeerIdentity};
use flynn_api::{Error, Result};
use futures::StreamExt as _;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

use super::controller::options;

/// What has been asked of the host, and what it says.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) jobs: BTreeMap<String, Job>,
    pub(crate) stopped: Vec<String>,
    pub(crate) callers: Vec<Option<PeerIdentity>>,
    pub(crate) refuse: Option<Error>,
    logs: BTreeMap<String, watch::Sender<Vec<LogLine>>>,
}

/// A host that only pretends.
#[derive(Clone)]
pub(crate) struct FakeHost {
    pub(crate) seen: Arc<Mutex<Seen>>,
    stop: CancellationToken,
    dir: Arc<tempfile::TempDir>,
}

impl Drop for FakeHost {
    fn drop(&mut self) {
        if Arc::strong_count(&self.dir) == 1 {
            self.stop.cancel();
        }
    }
}

/// One host named `host1`, a discoverd that knows it, and options for a controller that finds both.
pub(crate) async fn start() -> (FakeHost, flynn_controller::Options) {
    let ca = Ca::create("test").unwrap();
    let host = ca
        .issue(&PeerIdentity::Host("host1".into()), &["127.0.0.1".into()])
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    ca.issue(&PeerIdentity::Job("controller".into()), &[])
        .unwrap()
        .save(dir.path())
        .unwrap();
    let mut options = options().await;
    options.tls = dir.path().to_owned();
    let fake = FakeHost {
        seen: Arc::default(),
        stop: CancellationToken::new(),
        dir: Arc::new(dir),
    };

    let local = ([127, 0, 0, 1], 0).into();
    let listener = Listener::tls(local, host.server_config(ClientAuth::Required).unwrap())
        .await
        .unwrap();
    let meta = [("id".to_owned(), "host1".to_owned())].into();
    let instance = Instance::new("https", listener.local_addr().unwrap().to_string(), meta);
    let router = Router::new()
        .route("/host/jobs/{id}", put(add).delete(stop))
        .route("/host/jobs/{id}/log", get(log))
        .route("/host/jobs/{id}/exec", post(exec))
        .route("/host/jobs/{id}/forward", post(forward))
        .route("/attach", post(attach_to))
        .with_state(Arc::clone(&fake.seen));
    spawn(listener, router, &fake.stop);

    let discoverd = Listener::tcp(local).await.unwrap();
    options.discoverd = format!("http://{}", discoverd.local_addr().unwrap());
    let answer = Json(vec![instance]);
    let router = Router::new().route(
        "/services/flynn-host/instances",
        get(move || async move { answer }),
    );
    spawn(discoverd, router, &fake.stop);
    (fake, options)
}

fn spawn(listener: Listener, router: Router, stop: &CancellationToken) {
    let stop = stop.clone();
    tokio::spawn(async move { serve(listener, router, stop.cancelled_owned()).await });
}

type Shared = State<Arc<Mutex<Seen>>>;

async fn add(
    State(seen): Shared,
    axum::Extension(peer): axum::Extension<Peer>,
    Path(id): Path<String>,
    Json(job): Json<Job>,
) -> Result<Json<()>> {
    let mut seen = seen.lock().unwrap();
    seen.callers.push(peer.identity);
    if let Some(why) = &seen.refuse {
        return Err(why.clone());
    }
    seen.jobs.insert(id, job);
    Ok(Json(()))
}

async fn stop(State(seen): Shared, Path(id): Path<String>) -> Result<Json<()>> {
    seen.lock().unwrap().stopped.push(id);
    Ok(Json(()))
}

/// A program beside the job's: it says its name and what it reads, and ends with 3.
async fn exec(State(seen): Shared, Path(id): Path<String>, mut request: Request) -> Result<Response> {
    let upgrade = hyper::upgrade::on(&mut request);
    let Json(wanted) =
        <Json<ExecRequest> as axum::extract::FromRequest<()>>::from_request(request, &()).await?;
    if !seen.lock().unwrap().jobs.contains_key(&id) {
        return Err(Error::not_found("job", id));
    }
    tokio::spawn(async move {
        let Ok(mut stream) = upgrade.await.map(TokioIo::new) else {
            return;
        };
        let frame = read_frame(&mut stream).await.unwrap().unwrap();
        let said = [wanted.args[0].as_bytes(), &frame.payload].concat();
        let _ = write_frame(&mut stream, attach::STDOUT, &said).await;
        let _ = write_frame(&mut stream, attach::EXIT, &3i32.to_be_bytes()).await;
    });
    let headers = [("connection", "Upgrade"), ("upgrade", "flynn-attach/0")];
    Ok((http::StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// A port of a job's: it says its number and what it reads.
async fn forward(State(seen): Shared, Path(id): Path<String>, mut request: Request) -> Result<Response> {
    let upgrade = hyper::upgrade::on(&mut request);
    let Json(wanted) =
        <Json<ForwardRequest> as axum::extract::FromRequest<()>>::from_request(request, &()).await?;
    if !seen.lock().unwrap().jobs.contains_key(&id) {
        return Err(Error::not_found("job", id));
    }
    tokio::spawn(async move {
        let Ok(mut stream) = upgrade.await.map(TokioIo::new) else {
            return;
        };
        let mut read = Vec::new();
        stream.read_to_end(&mut read).await.unwrap();
        stream
            .write_all(&[wanted.port.to_string().as_bytes(), &read].concat())
            .await
            .unwrap();
        stream.shutdown().await.unwrap();
    });
    let headers = [("connection", "Upgrade"), ("upgrade", FORWARD_PROTOCOL)];
    Ok((http::StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// The job's program: says hello, repeats what it reads, and exits with 7 at the end of its input.
async fn attach_to(State(seen): Shared, mut request: Request) -> Result<Response> {
    let upgrade = hyper::upgrade::on(&mut request);
    let Json(wanted) =
        <Json<AttachRequest> as axum::extract::FromRequest<()>>::from_request(request, &()).await?;
    if !seen.lock().unwrap().jobs.contains_key(&wanted.job_id) {
        return Err(Error::not_found("job", wanted.job_id));
    }
    tokio::spawn(async move {
        let Ok(stream) = upgrade.await.map(TokioIo::new) else {
            return;
        };
        let (mut input, mut output) = tokio::io::split(stream);
        let _ = write_frame(&mut output, attach::STDOUT, b"hello").await;
        loop {
            match read_frame(&mut input).await {
                Ok(Some(frame)) if frame.kind == attach::STDIN && !frame.payload.is_empty() => {
                    let _ = write_frame(&mut output, attach::STDOUT, &frame.payload).await;
                }
                Ok(Some(frame)) if frame.kind != attach::STDIN => {}
                _ => break,
            }
        }
        let _ = write_frame(&mut output, attach::STDERR, b"bye").await;
        let _ = write_frame(&mut output, attach::EXIT, &7i32.to_be_bytes()).await;
    });
    let headers = [("connection", "Upgrade"), ("upgrade", "flynn-attach/0")];
    Ok((http::StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

async fn log(
    State(seen): Shared,
    Path(id): Path<String>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Result<Response> {
    let lines = seen.lock().unwrap().logs.get(&id).map(watch::Sender::subscribe);
    let mut lines = lines.ok_or_else(|| Error::not_found("log of the job", &id))?;
    let follow = query.get("follow").is_some_and(|follow| follow == "true");
    let count: usize = query
        .get("lines")
        .map_or(usize::MAX, |count| count.parse().unwrap());
    let past = lines.borrow_and_update().clone();
    let sent = past.len();
    let past = past[sent.saturating_sub(count)..].to_vec();
    let live = futures::stream::unfold((lines, sent), |(mut lines, mut sent)| async move {
        loop {
            let next = lines.borrow().get(sent).cloned();
            if let Some(line) = next {
                sent += 1;
                return Some((line, (lines, sent)));
            }
            lines.changed().await.ok()?;
        }
    });
    let live = if follow {
        live.boxed()
    } else {
        futures::stream::empty().boxed()
    };
    Ok(events(
        futures::stream::iter(past).chain(live).map(|line| (None, line)),
    ))
}

impl FakeHost {
    /// A job writes a line.
    pub(crate) fn say(&self, job: &str, second: i64, msg: &str) {
        let line = LogLine {
            timestamp: jiff::Timestamp::from_second(second).unwrap(),
            stream: LogStream::Stdout,
            msg: msg.into(),
            job_id: String::new(),
            process_type: String::new(),
        };
        let mut seen = self.seen.lock().unwrap();
        let log = seen
            .logs
            .entry(job.to_owned())
            .or_insert_with(|| watch::channel(Vec::new()).0);
        log.send_modify(|lines| lines.push(line));
    }
}
