//! DNS over UDP: a thread of its own that takes queries by the batch, answers what it can at once, and has the runtime
//! ask for the rest.

use std::io::{IoSlice, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{self, MsgFlags, MultiHeaders, SockaddrIn};
use tokio::runtime::Handle;

use super::Server;
use super::limit::Limits;
use super::plain::Query;
use super::ready::Ready;
use super::zone::{Reaction, Transport, failure};

/// Queries that are taken at a time.
const BATCH: usize = 64;
/// The longest query that is read whole.
const MAX_QUERY: usize = 4096;
/// The thread looks this often whether it is to stop, though it is told so as well.
const LOOK: Duration = Duration::from_millis(500);
/// Room in the socket for bursts: what does not fit in is lost.
const BUFFER: usize = 4 << 20;

/// Answers on an IPv4 socket until dropped.
pub(super) async fn serve(server: Server, socket: UdpSocket) {
    let stop = Arc::new(AtomicBool::new(false));
    let socket = Arc::new(socket);
    let guard = Guard {
        stop: Arc::clone(&stop),
        socket: Arc::clone(&socket),
    };
    let (ended, end) = tokio::sync::oneshot::channel();
    let runtime = Handle::current();
    let thread = std::thread::Builder::new().name("dns".to_owned());
    let started = thread.spawn(move || {
        if let Err(error) = answer(&server, &socket, &stop, &runtime) {
            tracing::error!(%error, "DNS has ended");
        }
        let _ = ended.send(());
    });
    match started {
        Ok(_) => drop(end.await),
        Err(error) => tracing::error!(%error, "there is no thread for DNS"),
    }
    drop(guard);
}

/// Ends the thread when nobody waits for it any more.
struct Guard {
    stop: Arc<AtomicBool>,
    socket: Arc<UdpSocket>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes who receives, though it answers that there is no connection.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
    }
}

fn answer(server: &Server, socket: &Arc<UdpSocket>, stop: &AtomicBool, runtime: &Handle) -> nix::Result<()> {
    let io = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0));
    socket.set_nonblocking(false).map_err(io)?;
    socket.set_read_timeout(Some(LOOK)).map_err(io)?;
    // Less is no reason not to serve.
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&**socket, BUFFER);
    let mut batch = Batch::new(server.clone(), Arc::clone(socket), runtime.clone());
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    let mut room = vec![0; BATCH * MAX_QUERY];
    while !stop.load(Ordering::Relaxed) {
        let mut slices: Vec<[IoSliceMut<'_>; 1]> = room
            .chunks_mut(MAX_QUERY)
            .map(|chunk| [IoSliceMut::new(chunk)])
            .collect();
        let received = socket::recvmmsg(
            socket.as_raw_fd(),
            &mut headers,
            slices.iter_mut(),
            MsgFlags::MSG_WAITFORONE,
            None,
        );
        match received {
            Ok(messages) => {
                batch.begin();
                for message in messages {
                    if let (Some(query), Some(client)) = (message.iovs().next(), message.address) {
                        batch.take(query, client);
                    }
                }
                batch.send();
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // An ICMP error for an earlier answer.
            Err(error @ (Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH)) => {
                tracing::debug!(%error, "an earlier DNS answer did not arrive");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The answers to one batch of queries.
struct Batch {
    server: Server,
    socket: Arc<UdpSocket>,
    runtime: Handle,
    ready: Ready,
    limits: Limits,
    began: Instant,
    now: u64,
    /// Buffers, of which the first `clients.len()` hold answers.
    answers: Vec<Vec<u8>>,
    clients: Vec<Option<SockaddrIn>>,
    headers: MultiHeaders<SockaddrIn>,
}

impl Batch {
    fn new(server: Server, socket: Arc<UdpSocket>, runtime: Handle) -> Self {
        Self {
            limits: Limits::new(server.rate),
            server,
            socket,
            runtime,
            ready: Ready::default(),
            began: Instant::now(),
            now: 0,
            answers: vec![Vec::new(); BATCH],
            clients: Vec::with_capacity(BATCH),
            headers: MultiHeaders::preallocate(BATCH, None),
        }
    }

    fn begin(&mut self) {
        self.clients.clear();
        self.ready.keep_to(self.server.view.applied());
        self.now = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
    }

    fn take(&mut self, query: &[u8], client: SockaddrIn) {
        let at = SocketAddrV4::new(client.ip(), client.port());
        if !self.limits.allow(self.now, *at.ip()) {
            return;
        }
        if self.take_plain(query, client) {
            return;
        }
        match self.server.react(query, Transport::Udp) {
            Reaction::Drop | Reaction::Reverse(_) => {}
            Reaction::Answer(answer) => {
                let into = &mut self.answers[self.clients.len()];
                into.clear();
                into.extend_from_slice(&answer);
                self.clients.push(Some(client));
            }
            Reaction::Forward => self.forward(query, at.into()),
        }
    }

    fn take_plain(&mut self, query: &[u8], client: SockaddrIn) -> bool {
        let Some(query) = Query::read(query).filter(Query::may_be_ours) else {
            return false;
        };
        let key = query.key();
        let into = &mut self.answers[self.clients.len()];
        let mut rng = rand::rng();
        if !self.ready.answer(&query, &key, into, &mut rng) {
            let ready = &mut self.ready;
            let made = self.server.view.read(|state| ready.make(&query, &key, state));
            if !made || !self.ready.answer(&query, &key, into, &mut rng) {
                return false;
            }
        }
        self.clients.push(Some(client));
        true
    }

    fn forward(&self, query: &[u8], client: SocketAddr) {
        let told = |answer: Vec<u8>| {
            self.server.codes.add([answer.as_slice()]);
            let _ = self.socket.send_to(&answer, client);
        };
        if let Some(answer) = self.server.forwarder.kept(query, Transport::Udp) {
            return told(answer);
        }
        let Some(place) = self.server.forwarded.take(client.ip()) else {
            // One more is refused at once rather than queued.
            return told(failure(query));
        };
        let (socket, forwarder) = (Arc::clone(&self.socket), Arc::clone(&self.server.forwarder));
        let (query, codes) = (query.to_vec(), Arc::clone(&self.server.codes));
        self.runtime.spawn(async move {
            let _place = place;
            let answer = forwarder.answer(&query, Transport::Udp).await;
            codes.add([answer.as_slice()]);
            if let Err(error) = socket.send_to(&answer, client) {
                tracing::debug!(%client, %error, "a DNS answer cannot be sent");
            }
        });
    }

    fn send(&mut self) {
        let answers = self.answers[..self.clients.len()].iter();
        self.server.codes.add(answers.map(Vec::as_slice));
        let mut sent = 0;
        while sent < self.clients.len() {
            let slices: Vec<[IoSlice<'_>; 1]> = self.answers[sent..self.clients.len()]
                .iter()
                .map(|answer| [IoSlice::new(answer)])
                .collect();
            let outcome = socket::sendmmsg(
                self.socket.as_raw_fd(),
                &mut self.headers,
                slices.iter(),
                &self.clients[sent..],
                [],
                MsgFlags::empty(),
            );
            sent += match outcome {
                Ok(messages) => messages.count().max(1),
                Err(error) => {
                    tracing::debug!(%error, "a DNS answer cannot be sent");
                    1
                }
            };
        }
    }
}
