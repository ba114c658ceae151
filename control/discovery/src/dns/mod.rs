//! DNS on the gateway address: our names from memory, all others by asking upstreams.
//!
//! - [`zone`]: what we answer (pure).
//! - [`forward`]: what others answer.
//!
//! Our own names are answered within the loop that receives, without waiting for anything. Forwarded queries run beside
//! it, so many at a time; one more is refused at once rather than queued.

pub mod forward;
pub mod zone;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use self::forward::Forwarder;
pub use self::forward::Upstreams;
use self::zone::{Reaction, Transport, react};
use crate::view::View;

/// Forwarded queries at a time.
const MAX_FORWARDED: usize = 256;
/// TCP connections at a time.
const MAX_CONNECTIONS: usize = 128;
/// How long a TCP connection may be silent, or take to take an answer.
const IDLE: Duration = Duration::from_secs(10);
/// The longest query over UDP that is read whole.
const MAX_UDP_QUERY: usize = 4096;

/// The DNS server of one gateway address. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Server {
    view: Arc<View>,
    forwarder: Arc<Forwarder>,
    slots: Arc<Semaphore>,
}

impl Server {
    /// Answers from `view`, or by `upstreams`.
    pub fn new(view: Arc<View>, upstreams: Upstreams) -> Self {
        Self {
            view,
            forwarder: Arc::new(Forwarder::new(upstreams)),
            slots: Arc::new(Semaphore::new(MAX_FORWARDED)),
        }
    }

    fn react(&self, query: &[u8], transport: Transport) -> Reaction {
        let index = self.view.applied();
        self.view
            .read(|state| react(query, transport, state, index, &mut rand::rng()))
    }

    /// Answers on a UDP socket, for ever.
    pub async fn serve_udp(self, socket: UdpSocket) {
        let socket = Arc::new(socket);
        let mut buffer = vec![0; MAX_UDP_QUERY];
        loop {
            let (length, client) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                Err(error) => {
                    // An ICMP error for an earlier answer, most likely.
                    tracing::debug!(%error, "cannot receive a DNS query");
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    continue;
                }
            };
            let query = &buffer[..length];
            match self.react(query, Transport::Udp) {
                Reaction::Drop => {}
                Reaction::Answer(answer) => send(&socket, &answer, client).await,
                Reaction::Forward => match Arc::clone(&self.slots).try_acquire_owned() {
                    Ok(slot) => {
                        let (socket, forwarder) = (Arc::clone(&socket), Arc::clone(&self.forwarder));
                        let query = query.to_vec();
                        tokio::spawn(async move {
                            let _slot = slot;
                            let answer = forwarder.answer(&query, Transport::Udp).await;
                            send(&socket, &answer, client).await;
                        });
                    }
                    Err(_) => send(&socket, &zone::failure(query), client).await,
                },
            }
        }
    }

    /// Answers on TCP connections, for ever.
    pub async fn serve_tcp(self, listener: TcpListener) {
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(connection) = Arc::clone(&connections).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = self.clone();
                    tokio::spawn(async move {
                        let _connection = connection;
                        if let Err(error) = server.serve_connection(stream).await {
                            tracing::debug!(%error, "a DNS connection ended early");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a DNS connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn serve_connection(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        loop {
            let Some(query) = tokio::time::timeout(IDLE, read_framed(&mut stream)).await?? else {
                return Ok(());
            };
            let answer = match self.react(&query, Transport::Tcp) {
                Reaction::Drop => return Ok(()),
                Reaction::Answer(answer) => answer,
                Reaction::Forward => match self.slots.try_acquire() {
                    Ok(_slot) => self.forwarder.answer(&query, Transport::Tcp).await,
                    Err(_) => zone::failure(&query),
                },
            };
            tokio::time::timeout(IDLE, write_framed(&mut stream, &answer)).await??;
        }
    }
}

async fn send(socket: &UdpSocket, answer: &[u8], client: SocketAddr) {
    if let Err(error) = socket.send_to(answer, client).await {
        tracing::debug!(%client, %error, "a DNS answer cannot be sent");
    }
}

/// Reads one message of a TCP connection; `None` at its end.
pub async fn read_framed(stream: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => length,
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0; length.into()];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

/// Writes one message to a TCP connection.
pub async fn write_framed(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    let length = u16::try_from(message.len()).map_err(std::io::Error::other)?;
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}
