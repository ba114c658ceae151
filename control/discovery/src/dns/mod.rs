//! DNS on the gateway address: our names from memory, all others by asking upstreams.
//!
//! - [`zone`]: what we answer (pure).
//! - [`plain`], [`ready`]: the short way to the same answers, for queries as nearly all clients send them.
//! - [`udp`]: the thread that takes them by the batch; [`limit`]: how many a client may ask.
//! - [`forward`]: what others answer, and [`cache`], what they have answered.
//!
//! Our own names are answered within the loop that receives, without waiting for anything. Forwarded queries run beside
//! it, so many at a time; one more is refused at once rather than queued.

mod cache;
pub mod forward;
mod limit;
pub mod plain;
pub mod ready;
mod udp;
pub mod zone;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flynn_api::server::Places;
use hickory_proto::rr::Name;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use self::forward::Forwarder;
pub use self::forward::Upstreams;
use self::zone::{Reaction, Transport, react};
use crate::metrics::Codes;
use crate::state::State;
use crate::view::View;

/// Forwarded queries at a time, in all and of one client.
const MAX_FORWARDED: [usize; 2] = [256, 64];
/// TCP connections at a time, in all and of one client.
const MAX_CONNECTIONS: [usize; 2] = [256, 16];
/// How long a TCP connection may be silent, or take to take an answer.
const IDLE: Duration = Duration::from_secs(10);
/// Queries a second that one client may ask over UDP: more than any resolver of a busy app does, and few enough for one
/// client not to take the server from the others.
pub const CLIENT_RATE: u64 = 50_000;

/// How many times as long as it took to make the names by address they are good for, whatever changes.
const NAMES_REST: u32 = 20;

/// The DNS server of one gateway address. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Server {
    view: Arc<View>,
    forwarder: Arc<Forwarder>,
    forwarded: Arc<Places>,
    rate: u64,
    names: Arc<Mutex<Names>>,
    codes: Arc<Codes>,
}

/// The names of instances by their addresses, as of an index of the registry: made when asked for.
#[derive(Debug, Default)]
struct Names {
    index: u64,
    by_address: HashMap<IpAddr, Vec<Name>>,
    /// When they were made, and how long that took.
    made: Option<(Instant, Duration)>,
}

impl Names {
    fn of(state: &State, index: u64) -> Self {
        let mut by_address: HashMap<IpAddr, Vec<Name>> = HashMap::new();
        for (service, of) in state.services() {
            for instance in of.instances.values() {
                let name = zone::instance_name(service, &instance.id);
                if let (Some(name), Ok(addr)) = (name, instance.addr.parse::<SocketAddr>()) {
                    by_address.entry(addr.ip().to_canonical()).or_default().push(name);
                }
            }
        }
        Self {
            index,
            by_address,
            made: None,
        }
    }

    /// Makes them anew where they are of another time. Whoever keeps asking while somebody keeps changing the registry has no
    /// more than a part of the time go into that.
    fn keep_to(&mut self, view: &View, index: u64) {
        let rests = |(made, took): (Instant, Duration)| made.elapsed() < took * NAMES_REST;
        if self.index == index || self.made.is_some_and(rests) {
            return;
        }
        let began = Instant::now();
        *self = view.read(|state| Self::of(state, index));
        self.made = Some((Instant::now(), began.elapsed()));
    }
}

impl Server {
    /// Answers from `view`, or by `upstreams`.
    pub fn new(view: Arc<View>, upstreams: Upstreams) -> Self {
        Self {
            view,
            forwarder: Arc::new(Forwarder::new(upstreams)),
            forwarded: Places::new(MAX_FORWARDED[0], MAX_FORWARDED[1]),
            rate: CLIENT_RATE,
            names: Arc::default(),
            codes: Arc::default(),
        }
    }

    /// Counts its answers there.
    #[must_use]
    pub fn count(self, codes: Arc<Codes>) -> Self {
        Self { codes, ..self }
    }

    /// Lets one client ask so many queries a second over UDP.
    #[must_use]
    pub fn client_rate(self, rate: u64) -> Self {
        Self { rate, ..self }
    }

    fn react(&self, query: &[u8], transport: Transport) -> Reaction {
        let index = self.view.applied();
        let reaction = self
            .view
            .read(|state| react(query, transport, state, index, &mut rand::rng()));
        let Reaction::Reverse(address) = reaction else {
            return reaction;
        };
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.keep_to(&self.view, index);
        match names.by_address.get(&address) {
            Some(names) => Reaction::Answer(zone::reverse(query, transport, names)),
            None => Reaction::Forward,
        }
    }

    /// Answers on an IPv4 UDP socket, until dropped.
    pub async fn serve_udp(self, socket: UdpSocket) {
        udp::serve(self, socket).await;
    }

    /// Answers on TCP connections, for ever.
    pub async fn serve_tcp(self, listener: TcpListener) {
        let connections = Places::new(MAX_CONNECTIONS[0], MAX_CONNECTIONS[1]);
        loop {
            match listener.accept().await {
                Ok((stream, client)) => {
                    // One more is closed at once.
                    let Some(place) = connections.take(client.ip().to_canonical()) else {
                        continue;
                    };
                    let server = self.clone();
                    tokio::spawn(async move {
                        let _place = place;
                        if let Err(error) = server.serve_connection(stream, client.ip().to_canonical()).await
                        {
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

    async fn serve_connection(&self, mut stream: TcpStream, client: IpAddr) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        loop {
            let Some(query) = tokio::time::timeout(IDLE, read_framed(&mut stream)).await?? else {
                return Ok(());
            };
            let answer = match self.react(&query, Transport::Tcp) {
                Reaction::Drop | Reaction::Reverse(_) => return Ok(()),
                Reaction::Answer(answer) => answer,
                Reaction::Forward => match self.forwarder.kept(&query, Transport::Tcp) {
                    Some(answer) => answer,
                    None => match self.forwarded.take(client) {
                        Some(_place) => self.forwarder.answer(&query, Transport::Tcp).await,
                        None => zone::failure(&query),
                    },
                },
            };
            self.codes.add([answer.as_slice()]);
            tokio::time::timeout(IDLE, write_framed(&mut stream, &answer)).await??;
        }
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
