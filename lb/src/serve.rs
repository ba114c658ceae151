//! Accepts clients' connections and serves them, until the end is called for; then what is under way may finish.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::activity::Activity;
use crate::body::Noted;
use crate::proxy::{self, Client};
use crate::router::Router;
use crate::upstream::Body;

/// How long a client may take for a request's head; also how long an idle connection is kept.
const HEAD_TIMEOUT: Duration = Duration::from_mins(1);
/// How long a client may take for the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest head of a request.
const MAX_HEAD: usize = 64 << 10;
/// Requests at a time in one HTTP/2 connection.
const MAX_STREAMS: u32 = 128;
/// How much of an answer is held for one of them that does not read it.
const MAX_UNREAD: usize = 32 << 10;
/// How long an HTTP/2 connection is kept without a request under way.
const IDLE: Duration = Duration::from_mins(3);
/// How long a client may take to leave once it has been told that its connection ends.
const GOODBYE: Duration = Duration::from_secs(10);
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
    let accepting = doors.into_iter().map(|door| accept(&router, door, &shutdown));
    futures::future::try_join_all(accepting).await?;
    router.tasks.close();
    if tokio::time::timeout(drain, router.tasks.wait()).await.is_err() {
        tracing::warn!(left = router.tasks.len(), "some requests did not finish in time");
    }
    router.stop.cancel();
    Ok(())
}

async fn accept(router: &Arc<Router>, door: Door, shutdown: &CancellationToken) -> io::Result<()> {
    let port = door.listener.local_addr()?.port();
    let tls = door.tls.map(TlsAcceptor::from);
    loop {
        // When all are taken, clients wait in the socket's backlog.
        let slot = tokio::select! {
            slot = router.slots.take() => slot?,
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
                    slot,
                };
                router
                    .tasks
                    .clone()
                    .spawn(connection(router, stream, client, tls, drain));
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
    let (stop, addr) = (router.stop.clone(), client.addr);
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
            http2(stream, service(router, client), drain).await
        } else {
            http1(router, stream, client, drain).await
        }
    };
    tokio::select! {
        result = serve => if let Err(error) = result {
            tracing::debug!(%error, client = %addr, "a connection ended early");
        },
        () = stop.cancelled() => {}
    }
}

fn service(
    router: Arc<Router>,
    client: Client,
) -> impl Service<
    Request<Incoming>,
    Response = Response<Body>,
    Error = Infallible,
    Future = impl Future<Output = Result<Response<Body>, Infallible>> + Send,
> {
    service_fn(move |request| proxy::handle(Arc::clone(&router), client.clone(), request))
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

async fn http2<S>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: S,
    drain: CancellationToken,
) -> hyper::Result<()>
where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    let activity = Activity::default();
    let counted = service_fn(|request| {
        let under_way = activity.begin();
        let answer = service.call(request);
        async move {
            answer
                .await
                // The request is under way until its answer is gone, sent or not.
                .map(|answer| {
                    answer.map(|body| {
                        Noted::new(body, move || {
                            let _ = &under_way;
                        })
                    })
                })
        }
    });
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(HEAD_TIMEOUT)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
        .max_send_buf_size(MAX_UNREAD)
        .initial_stream_window_size(WINDOWS.0)
        .initial_connection_window_size(WINDOWS.1)
        .serve_connection(TokioIo::new(stream), counted);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        result = connection.as_mut() => return result,
        () = drain.cancelled() => {
            connection.as_mut().graceful_shutdown();
            // What is under way is finished, and nothing more is begun.
            return connection.await;
        }
        // A client that answers pings would stay for ever, and one that says nothing at all gets none.
        () = activity.ceased(HEAD_TIMEOUT, IDLE) => connection.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        result = connection.as_mut() => result,
        () = activity.ceased(GOODBYE, GOODBYE) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slots::Slots;
    use crate::tls;
    use bytes::Bytes;
    use flynn_api::Meta;
    use flynn_api::discovery::Instance;
    use flynn_api::route::Route;
    use http_body::Frame;
    use http_body_util::{BodyExt as _, Empty, StreamBody};
    use hyper::client::conn::http2::SendRequest;
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::io::{AsyncWriteExt as _, DuplexStream};
    use tokio::task::JoinHandle;

    /// Longer than any of a connection's limits.
    const LONG: Duration = Duration::from_mins(20);

    /// A connection that is served; its requests are answered after a while. Time passes as soon as nobody works.
    fn served(after: Duration) -> (DuplexStream, JoinHandle<hyper::Result<()>>) {
        let service = service_fn(move |_| async move {
            tokio::time::sleep(after).await;
            Ok(Response::new(
                Empty::new().map_err(|never| match never {}).boxed_unsync(),
            ))
        });
        let (client, server) = tokio::io::duplex(1 << 10);
        let served = tokio::spawn(http2(server, service, CancellationToken::new()));
        (client, served)
    }

    async fn ask(client: DuplexStream) -> SendRequest<Empty<Bytes>> {
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(client))
                .await
                .unwrap();
        tokio::spawn(connection);
        let request = Request::get("https://a.test/").body(Empty::new()).unwrap();
        assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
        sender
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_does_not_stay() {
        let (_client, served) = served(Duration::ZERO);
        let _ = tokio::time::timeout(LONG, served).await.expect("it stays");
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_nothing_more_does_not_stay() {
        let (client, served) = served(Duration::ZERO);
        let _sender = ask(client).await;
        let _ = tokio::time::timeout(LONG, served).await.expect("it stays");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_an_answer_stays() {
        let (client, _served) = served(LONG);
        ask(client).await;
    }

    /// A backend that changes the protocol of whatever it is asked, and then says nothing.
    async fn switching(listener: TcpListener) {
        let mut kept = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";
            stream.write_all(answer).await.unwrap();
            kept.push(stream);
        }
    }

    fn router(slots: usize) -> Arc<Router> {
        let dir = tempfile::tempdir().unwrap();
        let certificate = tls::default_certificate(dir.path(), None).unwrap();
        let certificates = Arc::new(tls::Certificates::new(&certificate).unwrap());
        let mut router = Router::new(certificates, "key".into());
        router.slots = Slots::new(slots);
        Arc::new(router)
    }

    async fn until(what: &str, condition: impl Fn() -> bool) {
        let look = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let seen = tokio::time::timeout(Duration::from_secs(20), look).await;
        seen.unwrap_or_else(|_| panic!("never: {what}"));
    }

    #[tokio::test]
    async fn a_tunnel_keeps_its_slot() {
        // One for the client, one for whom the router waits.
        let router = router(2);
        let bind = || TcpListener::bind("127.0.0.1:0");
        let (listener, backend) = (bind().await.unwrap(), bind().await.unwrap());
        router.set_routes(vec![Route {
            domain: "a.test".into(),
            path: "/".into(),
            service: "web".into(),
            ..Route::default()
        }]);
        let instance = Instance::new("http", backend.local_addr().unwrap().to_string(), Meta::new());
        router.set_instances(&router.services()[0], vec![instance], None, BTreeSet::new());
        tokio::spawn(switching(backend));
        let addr = listener.local_addr().unwrap();
        let doors = vec![Door { listener, tls: None }];
        let (stop, drain) = (CancellationToken::new(), Duration::from_secs(1));
        tokio::spawn(serve(Arc::clone(&router), doors, stop, drain));

        let mut client = TcpStream::connect(addr).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nhost: a.test\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";
        client.write_all(request).await.unwrap();
        let says = |line: &'static str| {
            let router = Arc::clone(&router);
            move || router.metrics.text().contains(line)
        };
        until("a tunnel", says("flynn_router_tunnels 1")).await;
        until("no HTTP", says("flynn_router_connections 0")).await;
        assert_eq!(router.slots.free(), 0);
        drop(client);
        router.stop.cancel();
        until("the slot is free again", || router.slots.free() == 1).await;
    }

    /// A client that lets everything come, as far as HTTP/2 is asked, and then reads nothing.
    const DEAF: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\
        \x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04\x7f\xff\xff\xff\
        \x00\x00\x04\x08\x00\x00\x00\x00\x00\x7f\xff\x00\x00\
        \x00\x00\x06\x01\x05\x00\x00\x00\x01\x82\x87\x84\x41\x01a";

    #[tokio::test]
    async fn little_is_held_for_who_reads_nothing() {
        const FRAME: usize = 1 << 10;
        let taken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&taken);
        let service = service_fn(move |_| {
            let count = Arc::clone(&count);
            let frames = futures::stream::repeat_with(move || {
                count.fetch_add(FRAME, Ordering::SeqCst);
                Ok(Frame::data(Bytes::from_static(&[0; FRAME])))
            });
            async { Ok(Response::new(StreamBody::new(frames).boxed_unsync())) }
        });
        let (mut client, server) = tokio::io::duplex(FRAME);
        tokio::spawn(http2(server, service, CancellationToken::new()));
        client.write_all(DEAF).await.unwrap();
        // It takes what it takes at once: nothing here waits for anything outside.
        for _ in 0..10_000 {
            tokio::task::yield_now().await;
        }
        let taken = taken.load(Ordering::SeqCst);
        assert!((MAX_UNREAD / 2..MAX_UNREAD * 3).contains(&taken), "{taken} bytes");
    }
}
