//! Accepts clients' connections and serves them, until the end is called for; then what is under way may finish.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::proxy::{self, Client};
use crate::router::Router;

/// Clients' connections at a time. Each may need a second descriptor for its backend.
const MAX_CONNECTIONS: usize = 8192;
/// How long a client may take for a request's head; also how long an idle connection is kept.
const HEAD_TIMEOUT: Duration = Duration::from_mins(1);
/// How long a client may take for the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest head of a request.
const MAX_HEAD: usize = 64 << 10;
/// Requests at a time in one HTTP/2 connection.
const MAX_STREAMS: u32 = 128;
/// How much of a body HTTP/2 clients may send ahead, per stream and per connection.
const WINDOWS: (u32, u32) = (64 << 10, 256 << 10);

/// A listening socket and how it is served.
#[derive(Debug)]
pub struct Door {
    /// Where clients come in.
    pub listener: TcpListener,
    /// With TLS, if so.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

/// Serves all doors until `shutdown`, then lets what is under way finish for as long as `drain`.
pub async fn serve(
    router: Arc<Router>,
    doors: Vec<Door>,
    shutdown: CancellationToken,
    drain: Duration,
) -> io::Result<()> {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accepting = doors
        .into_iter()
        .map(|door| accept(&router, door, &slots, &shutdown));
    futures::future::try_join_all(accepting).await?;
    router.tasks.close();
    if tokio::time::timeout(drain, router.tasks.wait()).await.is_err() {
        tracing::warn!(left = router.tasks.len(), "some requests did not finish in time");
    }
    router.stop.cancel();
    Ok(())
}

async fn accept(
    router: &Arc<Router>,
    door: Door,
    slots: &Arc<Semaphore>,
    shutdown: &CancellationToken,
) -> io::Result<()> {
    let port = door.listener.local_addr()?.port();
    let tls = door.tls.map(TlsAcceptor::from);
    loop {
        // When all are taken, clients wait in the socket's backlog.
        let slot = tokio::select! {
            slot = Arc::clone(slots).acquire_owned() => slot.map_err(io::Error::other)?,
            () = shutdown.cancelled() => return Ok(()),
        };
        let accepted = tokio::select! {
            accepted = door.listener.accept() => accepted,
            () = shutdown.cancelled() => return Ok(()),
        };
        match accepted {
            Ok((stream, addr)) => {
                let (router, tls, drain) = (Arc::clone(router), tls.clone(), shutdown.clone());
                let client = Client {
                    addr,
                    tls: tls.is_some(),
                    port,
                };
                router.tasks.clone().spawn(async move {
                    let _slot = slot;
                    connection(router, stream, client, tls, drain).await;
                });
            }
            Err(error) => {
                // Out of descriptors, most likely: others will close some.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(
    router: Arc<Router>,
    stream: TcpStream,
    client: Client,
    tls: Option<TlsAcceptor>,
    drain: CancellationToken,
) {
    let _counted = router.metrics.connection();
    let stop = router.stop.clone();
    let serve = async {
        let _ = stream.set_nodelay(true);
        let Some(tls) = tls else {
            return http1(router, stream, client, drain).await;
        };
        let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await else {
            router.metrics.handshake_failed();
            return Ok(());
        };
        if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
            http2(router, stream, client, drain).await
        } else {
            http1(router, stream, client, drain).await
        }
    };
    tokio::select! {
        result = serve => if let Err(error) = result {
            tracing::debug!(%error, client = %client.addr, "a connection ended early");
        },
        () = stop.cancelled() => {}
    }
}

fn service(
    router: Arc<Router>,
    client: Client,
) -> impl hyper::service::Service<
    Request<Incoming>,
    Response = http::Response<crate::upstream::Body>,
    Error = std::convert::Infallible,
    Future = impl Future<Output = Result<http::Response<crate::upstream::Body>, std::convert::Infallible>> + Send,
> {
    service_fn(move |request| proxy::handle(Arc::clone(&router), client, request))
}

async fn http1(
    router: Arc<Router>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    client: Client,
    drain: CancellationToken,
) -> hyper::Result<()> {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service(router, client))
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        result = connection.as_mut() => return result,
        () = drain.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    // What is under way is finished, and nothing more is begun.
    connection.await
}

async fn http2(
    router: Arc<Router>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    client: Client,
    drain: CancellationToken,
) -> hyper::Result<()> {
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(HEAD_TIMEOUT)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
        .initial_stream_window_size(WINDOWS.0)
        .initial_connection_window_size(WINDOWS.1)
        .serve_connection(TokioIo::new(stream), service(router, client));
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        result = connection.as_mut() => return result,
        () = drain.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    // What is under way is finished, and nothing more is begun.
    connection.await
}
