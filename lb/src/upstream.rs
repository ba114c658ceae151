//! Connections to backends.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// How long a backend may take to accept a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest head of an answer.
const MAX_HEAD: usize = 64 << 10;

/// What goes through, streamed.
pub type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// A connection to a backend that carries one request at a time.
#[derive(Debug)]
pub struct Connection(SendRequest<Body>);

/// Why a request could not be sent or was not answered.
#[derive(Debug)]
pub struct Failure {
    /// The request, when nothing of it has left us.
    pub unsent: Option<Box<Request<Body>>>,
    /// What happened.
    pub error: hyper::Error,
}

impl Connection {
    /// Connects.
    pub async fn open(addr: SocketAddr) -> io::Result<Self> {
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(addr)).await;
        let stream = stream.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = Builder::new()
            .max_buf_size(MAX_HEAD)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        // It ends when the sender is dropped or the backend hangs up.
        tokio::spawn(connection.with_upgrades());
        Ok(Self(sender))
    }

    /// Whether the backend has hung up.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Sends a request and gives the answer's head.
    pub async fn send(&mut self, request: Request<Body>) -> Result<Response<Incoming>, Failure> {
        // After the last answer's end the connection needs a moment; one that has closed says so here, and the
        // request comes back unsent below.
        let _ = self.0.ready().await;
        self.0
            .try_send_request(request)
            .await
            .map_err(|mut failure| Failure {
                unsent: failure.take_message().map(Box::new),
                error: failure.into_error(),
            })
    }
}
