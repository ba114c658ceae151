//! A router between fakes of discoverd and the controller and real backends, all on loopback.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::Path;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use bytes::Bytes;
use flynn_api::Meta;
use flynn_api::discovery::{Event, EventKind, Instance};
use flynn_api::route::Route;
use flynn_api::server::{CancellationToken, Json, Listener, events, serve};
use flynn_lb::{Options, Sockets};
use futures::StreamExt as _;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, broadcast};
use tokio::task::{JoinHandle, JoinSet};

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

/// discoverd and the controller.
pub(crate) struct Control {
    services: Mutex<BTreeMap<String, Vec<Instance>>>,
    routes: Mutex<Vec<Route>>,
    changes: broadcast::Sender<()>,
    pub(crate) discoverd: SocketAddr,
    pub(crate) away: CancellationToken,
}

impl Control {
    pub(crate) async fn start() -> Arc<Self> {
        flynn_api::tls::install_provider();
        let discovery = Listener::tcp(loopback()).await.unwrap();
        let controller = Listener::tcp(loopback()).await.unwrap();
        let controller_addr = controller.local_addr().unwrap().to_string();
        let control = Arc::new(Self {
            services: Mutex::default(),
            routes: Mutex::default(),
            changes: broadcast::channel(64).0,
            discoverd: discovery.local_addr().unwrap(),
            away: CancellationToken::new(),
        });
        control.set_instances(
            "controller",
            vec![Instance::new("http", controller_addr, Meta::new())],
        );
        let (own, other) = (Arc::clone(&control), Arc::clone(&control));
        let away = || control.away.clone().cancelled_owned();
        tokio::spawn(serve(discovery, own.discovery(), away()));
        tokio::spawn(serve(controller, other.controller(), away()));
        control
    }

    pub(crate) fn set_instances(&self, service: &str, instances: Vec<Instance>) {
        self.services.lock().unwrap().insert(service.into(), instances);
        let _ = self.changes.send(());
    }

    pub(crate) fn set_backends(&self, service: &str, backends: &[&Backend]) {
        let instance = |backend: &&Backend| Instance::new("http", backend.addr.to_string(), Meta::new());
        self.set_instances(service, backends.iter().map(instance).collect());
    }

    pub(crate) fn set_routes(&self, routes: Vec<Route>) {
        *self.routes.lock().unwrap() = routes;
        let _ = self.changes.send(());
    }

    /// The present state, `current`, and, for each change, what is gone and what is there.
    fn watch(&self, service: &str) -> Response {
        let event = |kind, instance: Option<Instance>| Event {
            instance,
            ..Event::new("", kind, 0)
        };
        // First, so that no change falls between it and what is there now.
        let receiver = self.changes.subscribe();
        let (services, name) = (self.services.lock().unwrap().clone(), service.to_owned());
        let now = services.get(&name).cloned().unwrap_or_default();
        let mut first: Vec<Event> = now
            .iter()
            .cloned()
            .map(|i| event(EventKind::Up, Some(i)))
            .collect();
        first.push(event(EventKind::Leader, now.first().cloned()));
        first.push(event(EventKind::Current, None));
        let first = futures::stream::iter(first).map(|event| (None, event));
        // A change ends the stream; whoever follows begins anew.
        let change = futures::stream::unfold(receiver, |mut receiver| async move {
            let _ = receiver.recv().await;
            None::<((Option<String>, Event), _)>
        });
        events(first.chain(change))
    }

    fn discovery(self: Arc<Self>) -> axum::Router {
        let list = Arc::clone(&self);
        axum::Router::new()
            .route(
                "/services/{service}",
                get(async move |Path(service): Path<String>| self.watch(&service)),
            )
            .route(
                "/services/{service}/instances",
                get(async move |Path(service): Path<String>| {
                    Json(
                        list.services
                            .lock()
                            .unwrap()
                            .get(&service)
                            .cloned()
                            .unwrap_or_default(),
                    )
                }),
            )
    }

    fn controller(self: Arc<Self>) -> axum::Router {
        let list = Arc::clone(&self);
        axum::Router::new()
            .route(
                "/routes",
                get(async move || Json(list.routes.lock().unwrap().clone())),
            )
            .route(
                "/events",
                get(async move || {
                    let receiver = self.changes.subscribe();
                    let stream = futures::stream::unfold(receiver, |mut receiver| async {
                        let _ = receiver.recv().await;
                        let event = serde_json::json!({
                            "id": 1, "object_type": "route", "object_id": "r", "data": {},
                            "created_at": "2026-01-01T00:00:00Z",
                        });
                        Some(((None, event), receiver))
                    });
                    events(stream).into_response()
                }),
            )
    }
}

/// How long a test waits for what must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until it is so.
pub(crate) async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let look = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let seen = tokio::time::timeout(PATIENCE, look).await;
    seen.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"));
}

/// A route to `web`.
pub(crate) fn route(domain: &str) -> Route {
    Route {
        id: format!("http/{domain}"),
        domain: domain.into(),
        path: "/".into(),
        service: "web".into(),
        ..Route::default()
    }
}

/// A running router.
pub(crate) struct Running {
    pub(crate) http: SocketAddr,
    pub(crate) https: SocketAddr,
    pub(crate) api: SocketAddr,
    pub(crate) stop: CancellationToken,
    pub(crate) task: JoinHandle<anyhow::Result<()>>,
    pub(crate) data: Arc<tempfile::TempDir>,
}

impl Running {
    pub(crate) async fn start(control: &Control) -> Self {
        Self::with_data(control, Arc::new(tempfile::tempdir().unwrap())).await
    }

    pub(crate) async fn with_data(control: &Control, data: Arc<tempfile::TempDir>) -> Self {
        Self::with(control, data, None).await
    }

    pub(crate) async fn with(
        control: &Control,
        data: Arc<tempfile::TempDir>,
        pins: Option<&std::path::Path>,
    ) -> Self {
        let bind = || TcpListener::bind(loopback());
        let sockets = Sockets {
            http: bind().await.unwrap(),
            https: bind().await.unwrap(),
            api: bind().await.unwrap(),
        };
        let addr = |listener: &TcpListener| listener.local_addr().unwrap();
        let (http, https, api) = (addr(&sockets.http), addr(&sockets.https), addr(&sockets.api));
        let options = Options {
            http_port: http.port(),
            https_port: https.port(),
            api,
            discoverd: format!("http://{}", control.discoverd),
            tls: "/nonexistent".into(),
            controller_key: "key".into(),
            data: data.path().to_owned(),
            pins: pins.map(std::path::Path::to_owned),
            domain: Some("flynn.test".into()),
            certificate: None,
            l4: flynn_lb::l4::Options {
                host: std::net::Ipv4Addr::LOCALHOST,
                mode: flynn_dataplane::lb::Mode::Auto,
                first_host: false,
            },
        };
        let stop = CancellationToken::new();
        let task = tokio::spawn(flynn_lb::serve_on(
            options,
            sockets,
            stop.clone().cancelled_owned(),
        ));
        Self {
            http,
            https,
            api,
            stop,
            task,
            data,
        }
    }

    /// Waits until a request for this host has this status.
    pub(crate) async fn until(&self, host: &str, status: u16) {
        until(&format!("{host} answers with {status}"), async || {
            let answer = self.get(host, "/").await;
            answer.is_ok_and(|answer| answer.status == status)
        })
        .await;
    }

    pub(crate) async fn get(&self, host: &str, target: &str) -> anyhow::Result<Answer> {
        let request = format!("GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        self.raw(request.as_bytes()).await
    }

    /// Sends bytes and reads until the router closes.
    pub(crate) async fn raw(&self, bytes: &[u8]) -> anyhow::Result<Answer> {
        let mut stream = TcpStream::connect(self.http).await?;
        stream.write_all(bytes).await?;
        let mut read = Vec::new();
        tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut read)).await??;
        Answer::parse(&read)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let (head, body) = text
            .split_once("\r\n\r\n")
            .ok_or_else(|| anyhow::anyhow!("no head: {text:?}"))?;
        let status = head.split(' ').nth(1).unwrap_or_default().parse()?;
        Ok(Self {
            status,
            head: head.to_ascii_lowercase(),
            body: body.to_owned(),
        })
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// A backend that says what it got, and can be killed with all its connections.
pub(crate) struct Backend {
    pub(crate) addr: SocketAddr,
    pub(crate) served: Arc<AtomicUsize>,
    /// Has it answer one request for `/slow`.
    pub(crate) release: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Backend {
    pub(crate) async fn start(name: &'static str) -> Self {
        let listener = TcpListener::bind(loopback()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let served = Arc::new(AtomicUsize::new(0));
        let release = Arc::new(Notify::new());
        let (count, released) = (Arc::clone(&served), Arc::clone(&release));
        let task = tokio::spawn(async move {
            // Its connections end with it.
            let mut connections = JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    return;
                };
                let (count, released) = (Arc::clone(&count), Arc::clone(&released));
                connections.spawn(async move {
                    let service = hyper::service::service_fn(move |request| {
                        count.fetch_add(1, Ordering::Relaxed);
                        answer(name, Arc::clone(&released), request)
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades()
                        .await;
                });
            }
        });
        Self {
            addr,
            served,
            release,
            task,
        }
    }

    pub(crate) fn kill(&self) {
        self.task.abort();
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.kill();
    }
}

type Answered = http::Response<http_body_util::combinators::UnsyncBoxBody<Bytes, hyper::Error>>;

/// What a request says in its path decides what happens to it.
async fn answer(
    name: &str,
    released: Arc<Notify>,
    mut request: Request<Incoming>,
) -> Result<Answered, Infallible> {
    let text = |text: String| {
        Full::new(Bytes::from(text))
            .map_err(|never| match never {})
            .boxed_unsync()
    };
    let path = request.uri().path().to_owned();
    let mut response = http::Response::new(text(String::new()));
    if request.headers().contains_key("upgrade") {
        let upgrade = hyper::upgrade::on(&mut request);
        let body = request
            .into_body()
            .collect()
            .await
            .map(http_body_util::Collected::to_bytes);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgrade.await.unwrap());
            stream.write_all(&body.unwrap_or_default()).await.unwrap();
            let mut buffer = [0; 1024];
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                stream.write_all(&buffer[..length]).await.unwrap();
            }
        });
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response
            .headers_mut()
            .insert("connection", "upgrade".parse().unwrap());
        response.headers_mut().insert("upgrade", "echo".parse().unwrap());
        return Ok(response);
    }
    match path.as_str() {
        "/echo" => {
            *response.body_mut() = request.into_body().boxed_unsync();
        }
        "/slow" => {
            released.notified().await;
            *response.body_mut() = text("at last".into());
        }
        "/hops" => {
            response
                .headers_mut()
                .insert("connection", "x-hop".parse().unwrap());
            response.headers_mut().insert("x-hop", "1".parse().unwrap());
            response.headers_mut().insert("x-kept", "1".parse().unwrap());
        }
        _ => {
            let headers: BTreeMap<String, Vec<String>> = request
                .headers()
                .keys()
                .map(|key| {
                    let values = request.headers().get_all(key).iter();
                    (
                        key.to_string(),
                        values.map(|value| value.to_str().unwrap().to_owned()).collect(),
                    )
                })
                .collect();
            let said = serde_json::json!({
                "name": name,
                "method": request.method().as_str(),
                "uri": request.uri().to_string(),
                "headers": headers,
            });
            *response.body_mut() = text(said.to_string());
        }
    }
    Ok(response)
}
