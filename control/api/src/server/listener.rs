//! Accepts connections over TCP, TLS and Unix sockets and serves a router on them.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use http::Version;
use http::header::{CONNECTION, HeaderValue};
use hyper::body::{Body as _, Incoming};
use hyper::rt::{Read, Write};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt as _;

use super::places::{Place, Places};
use crate::tcp::tune;
use crate::tls::{Live, PeerIdentity};

/// Connections at a time.
const MAX_CONNECTIONS: usize = 4096;
/// How long a client may take to send a request's head, or to shake hands.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// The longest body of a request that is read to its end though the request is refused.
const MAX_UNREAD: u64 = 8 << 10;

/// Who is at the other end. Every request carries it as an extension.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Its address, over TCP.
    pub addr: Option<SocketAddr>,
    /// Who it is, over mutual TLS with a certificate.
    pub identity: Option<PeerIdentity>,
    /// Over a Unix socket: whoever may open it.
    pub unix: bool,
}

/// Where connections come from.
pub struct Listener {
    kind: Kind,
    /// Of each other machine.
    each: usize,
}

enum Kind {
    Tcp(TcpListener),
    Tls(TcpListener, Configuration),
    Unix(UnixListener),
}

/// What the next connection is taken with.
type Configuration = Box<dyn Fn() -> Arc<rustls::ServerConfig> + Send + Sync>;

impl Listener {
    fn of(kind: Kind) -> Self {
        Self {
            kind,
            each: MAX_CONNECTIONS,
        }
    }

    /// With no more than so many connections at a time from one address, so that none of many clients takes them from the others:
    /// more are closed at once. This machine's own are not counted, nor, over TLS, those whose certificate tells who they are.
    #[must_use]
    pub fn each(self, each: usize) -> Self {
        Self { each, ..self }
    }

    /// Plain TCP.
    pub async fn tcp(addr: SocketAddr) -> io::Result<Self> {
        Ok(Self::from_tcp(TcpListener::bind(addr).await?))
    }

    /// Plain TCP on a socket that is listening already.
    pub fn from_tcp(listener: TcpListener) -> Self {
        Self::of(Kind::Tcp(listener))
    }

    /// TLS.
    pub async fn tls(addr: SocketAddr, config: Arc<rustls::ServerConfig>) -> io::Result<Self> {
        let config: Configuration = Box::new(move || Arc::clone(&config));
        Ok(Self::of(Kind::Tls(TcpListener::bind(addr).await?, config)))
    }

    /// TLS with an identity that is renewed: each connection is taken with what is in use then.
    pub async fn tls_live(addr: SocketAddr, live: Arc<Live>) -> io::Result<Self> {
        Ok(Self::from_tls_live(TcpListener::bind(addr).await?, live))
    }

    /// [`Listener::tls_live`] on a socket that is listening already.
    pub fn from_tls_live(listener: TcpListener, live: Arc<Live>) -> Self {
        let config: Configuration = Box::new(move || Arc::clone(&live.current().server));
        Self::of(Kind::Tls(listener, config))
    }

    /// A Unix socket that only its owner may open; one that is there from an earlier process is replaced.
    pub fn unix(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self::of(Kind::Unix(listener)))
    }

    /// A Unix socket that is listening already.
    pub fn from_unix(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self::of(Kind::Unix(UnixListener::from_std(listener)?)))
    }

    /// The address that it listens on, over TCP.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match &self.kind {
            Kind::Tcp(listener) | Kind::Tls(listener, _) => listener.local_addr().ok(),
            Kind::Unix(_) => None,
        }
    }
}

/// How connections end once a service takes no new ones.
#[derive(Clone, Copy, Debug)]
pub struct Farewell {
    /// How long those may remain that nobody uses. Whoever uses one in the very moment of its end has to ask again.
    pub idle: Duration,
    /// How long requests under way may take from then on. Event streams never end by themselves.
    pub busy: Duration,
}

impl Default for Farewell {
    /// Of a service that stops.
    fn default() -> Self {
        Self {
            idle: Duration::ZERO,
            busy: Duration::from_secs(3),
        }
    }
}

/// Serves until `shutdown`, then lets requests under way finish for a few seconds.
pub async fn serve(listener: Listener, router: Router, shutdown: impl Future<Output = ()>) -> io::Result<()> {
    let shutdown = async {
        shutdown.await;
        Farewell::default()
    };
    serve_until(listener, router, shutdown).await
}

/// Serves until `shutdown`, which says how connections end.
pub async fn serve_until(
    listener: Listener,
    router: Router,
    shutdown: impl Future<Output = Farewell>,
) -> io::Result<()> {
    let (graceful, slots) = (GracefulShutdown::new(), Arc::new(Semaphore::new(MAX_CONNECTIONS)));
    let places = Places::new(MAX_CONNECTIONS, listener.each);
    // Those that have not ended when this ends are ended with it.
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    let farewell = loop {
        let slot = tokio::select! {
            slot = Arc::clone(&slots).acquire_owned() => slot.map_err(io::Error::other)?,
            farewell = &mut shutdown => break farewell,
        };
        tokio::select! {
            accepted = accept(&listener.kind) => match accepted {
                Ok(connection) => {
                    let place = connection.other().map(|other| places.take(other));
                    if matches!(place, Some(None)) {
                        continue;
                    }
                    let (router, watcher) = (router.clone(), graceful.watcher());
                    connections.spawn(keep(connection, router, watcher, slot, place.flatten()));
                    while connections.try_join_next().is_some() {}
                }
                Err(error) => {
                    // Out of descriptors, most likely: others will close some.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            farewell = &mut shutdown => break farewell,
        }
    };
    drop(listener);
    let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
    let _ = tokio::time::timeout(farewell.idle, slots.acquire_many(all)).await;
    let _ = tokio::time::timeout(farewell.busy, graceful.shutdown()).await;
    Ok(())
}

enum Accepted {
    Tcp(TcpStream, SocketAddr),
    Tls(TcpStream, SocketAddr, TlsAcceptor),
    Unix(tokio::net::UnixStream),
}

impl Accepted {
    /// The address of another machine that it comes from.
    fn other(&self) -> Option<IpAddr> {
        let (Self::Tcp(stream, addr) | Self::Tls(stream, addr, _)) = self else {
            return None;
        };
        let other = addr.ip().to_canonical();
        let own = stream
            .local_addr()
            .is_ok_and(|own| own.ip().to_canonical() == other);
        (!own).then_some(other)
    }
}

async fn accept(listener: &Kind) -> io::Result<Accepted> {
    Ok(match listener {
        Kind::Tcp(listener) => {
            let (stream, addr) = listener.accept().await?;
            Accepted::Tcp(stream, addr)
        }
        Kind::Tls(listener, config) => {
            let (stream, addr) = listener.accept().await?;
            Accepted::Tls(stream, addr, TlsAcceptor::from(config()))
        }
        Kind::Unix(listener) => Accepted::Unix(listener.accept().await?.0),
    })
}

/// Answers what comes by a connection until it ends.
async fn keep(
    connection: Accepted,
    router: Router,
    watcher: hyper_util::server::graceful::Watcher,
    _slot: OwnedSemaphorePermit,
    place: Option<Place>,
) {
    if let Err(error) = serve_accepted(connection, router, watcher, place).await {
        tracing::debug!(%error, "a connection failed");
    }
}

async fn serve_accepted(
    connection: Accepted,
    router: Router,
    watcher: hyper_util::server::graceful::Watcher,
    mut place: Option<Place>,
) -> io::Result<()> {
    match connection {
        Accepted::Tcp(stream, addr) => {
            tune(&stream)?;
            let peer = Peer {
                addr: Some(addr),
                ..Peer::default()
            };
            serve_connection(TokioIo::new(stream), peer, router, watcher).await;
        }
        Accepted::Tls(stream, addr, acceptor) => {
            tune(&stream)?;
            let stream = tokio::time::timeout(HEAD_TIMEOUT, acceptor.accept(stream)).await??;
            let certificate = stream
                .get_ref()
                .1
                .peer_certificates()
                .and_then(|chain| chain.first());
            let identity = certificate.and_then(PeerIdentity::of_certificate);
            if identity.is_some() {
                place = None;
            }
            let peer = Peer {
                addr: Some(addr),
                identity,
                unix: false,
            };
            serve_connection(TokioIo::new(stream), peer, router, watcher).await;
        }
        Accepted::Unix(stream) => {
            let peer = Peer {
                unix: true,
                ..Peer::default()
            };
            serve_connection(TokioIo::new(stream), peer, router, watcher).await;
        }
    }
    drop(place);
    Ok(())
}

async fn serve_connection(
    io: impl Read + Write + Unpin + Send + 'static,
    peer: Peer,
    router: Router,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let service = hyper::service::service_fn(move |mut request: http::Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        let hint = request.body().size_hint();
        let is_long = hint.upper().is_none_or(|length| length > MAX_UNREAD);
        let may_end = is_long && request.version() == Version::HTTP_11;
        let answer = router.clone().oneshot(request);
        async move {
            let mut response = answer.await?;
            // A body that was refused half way ends the connection: nobody may send another request by it.
            if may_end && (response.status().is_client_error() || response.status().is_server_error()) {
                response
                    .headers_mut()
                    .insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(HEAD_TIMEOUT);
    let connection = builder.serve_connection_with_upgrades(io, service);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(error, "a connection ended early");
    }
}
