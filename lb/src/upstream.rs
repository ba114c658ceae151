//! Connections to backends.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use flynn_api::tcp::keep_alive;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use rustix::io::Errno;
use tokio::net::TcpStream;
use tokio::sync::oneshot;

/// How long a backend may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest head of an answer.
const MAX_HEAD: usize = 64 << 10;

/// What goes through, streamed.
pub type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// A connection to a backend that carries one request at a time.
#[derive(Debug)]
pub struct Connection {
    sender: SendRequest<Body>,
    /// Resolves, to an error, when the connection has ended.
    ended: oneshot::Receiver<Infallible>,
}

/// Why a request could not be sent or was not answered.
#[derive(Debug)]
pub struct Failure {
    /// The request, when nothing of it has left us.
    pub unsent: Option<Box<Request<Body>>>,
    /// What happened.
    pub error: hyper::Error,
}

/// Connects to a backend.
pub async fn connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(addr)).await;
    let stream = stream.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    stream.set_nodelay(true)?;
    keep_alive(&stream)?;
    Ok(stream)
}

/// Whether a connection was not made for want of our own files: no fault of the backend's.
pub fn is_our_own(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

impl Connection {
    /// Connects.
    pub async fn open(addr: SocketAddr) -> io::Result<Self> {
        let stream = connect(addr).await?;
        let (sender, connection) = Builder::new()
            .max_buf_size(MAX_HEAD)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        let (running, ended) = oneshot::channel();
        // It ends when the sender is dropped or the backend hangs up.
        tokio::spawn(async move {
            let _ = connection.with_upgrades().await;
            drop(running);
        });
        Ok(Self { sender, ended })
    }

    /// Whether the backend has hung up.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Whether it can take a request at once: the last one has been sent to its end, and answered.
    pub fn is_ready(&self) -> bool {
        self.sender.is_ready()
    }

    /// Waits until it can take a request; whether it ever will.
    pub async fn ready(&mut self) -> bool {
        self.sender.ready().await.is_ok()
    }

    /// Sends a request and gives the answer's head, and the connection for the next request unless it has ended.
    pub async fn send(self, request: Request<Body>) -> Result<(Response<Incoming>, Option<Self>), Failure> {
        let Self {
            mut sender,
            mut ended,
        } = self;
        // A new connection needs a moment; one that has closed says so here, and the request comes back unsent below.
        let _ = sender.ready().await;
        let mut answer = pin!(sender.try_send_request(request));
        let answered = tokio::select! {
            biased;
            answered = &mut answer => answered.map(|response| (response, Some(Self { sender, ended }))),
            _ = &mut ended => {
                // A request that was handed over just as the connection ended lies in the channel between them until
                // that goes too: nobody is there any more to find it, and the answer would be waited for in vain.
                drop(sender);
                answer.await.map(|response| (response, None))
            }
        };
        answered.map_err(|mut failure| Failure {
            unsent: failure.take_message().map(Box::new),
            error: failure.into_error(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt as _, Empty};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;

    /// Clients, and how often each meets a hang-up: without care, one of ten thousand is never heard of again.
    const CLIENTS: usize = 4;
    const ROUNDS: usize = 10_000;

    /// A backend that answers one request on each connection, and hangs up at any time after.
    async fn backend() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let _ = stream.read(&mut [0; 1024]).await;
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                    let _ = stream.write_all(answer).await;
                    for _ in 0..rand::random_range(0..3000) {
                        std::hint::spin_loop();
                    }
                });
            }
        });
        addr
    }

    #[test]
    fn want_of_files_is_our_own() {
        let of = |errno: Errno| is_our_own(&errno.into());
        assert!(of(Errno::MFILE) && of(Errno::NFILE));
        assert!(!of(Errno::CONNREFUSED) && !is_our_own(&io::ErrorKind::TimedOut.into()));
    }

    fn request() -> Request<Body> {
        let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
        Request::get("/").header("host", "a.test").body(body).unwrap()
    }

    async fn ask_twice(addr: SocketAddr) {
        let connection = Connection::open(addr).await.unwrap();
        let (_, connection) = connection.send(request()).await.unwrap();
        if let Some(connection) = connection {
            let _ = connection.send(request()).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn requests_that_meet_a_hang_up_are_heard_of() {
        let addr = backend().await;
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            clients.spawn(async move {
                for _ in 0..ROUNDS {
                    let asked = tokio::time::timeout(Duration::from_secs(30), ask_twice(addr));
                    asked.await.expect("the request is waited for in vain");
                }
            });
        }
        while let Some(client) = clients.join_next().await {
            client.unwrap();
        }
    }
}
