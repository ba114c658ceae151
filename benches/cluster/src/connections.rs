//! A client outside of the cluster: connections that live long, and datagrams, each with what it saw.
//!
//! The other end is [`ECHO`]. It says first whom it takes for the client, and who it is; then it echoes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

/// How long a connection may be without an answer before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long one datagram's answer may take, and how many are tried.
const WAIT: Duration = Duration::from_millis(500);
const TRIES: u32 = 10;

/// An app for Perl, which every Debian has: TCP and UDP on `$PORT`. Asked to end, it takes no more connections and
/// finishes those that it has.
pub const ECHO: &str = r#"
use strict; use warnings;
use Socket qw(getnameinfo NI_NUMERICHOST NI_NUMERICSERV);
use IO::Socket::IP; use IO::Select;
my %at = (LocalHost => "::", LocalPort => $ENV{PORT}, V6Only => 0);
my $tcp = IO::Socket::IP->new(%at, Proto => "tcp", Listen => 1024, ReuseAddr => 1) or die "TCP: $@";
my $udp = IO::Socket::IP->new(%at, Proto => "udp") or die "UDP: $@";
my $all = IO::Select->new($tcp, $udp);
my $over = 0;
$SIG{PIPE} = "IGNORE";
$SIG{TERM} = sub { $over = 1 };
sub who {
    my (undef, $host, $port) = getnameinfo($_[0], NI_NUMERICHOST | NI_NUMERICSERV);
    $host =~ s/^::ffff://;
    "$host $port $ENV{EXTERNAL_IP}\n"
}
until ($over && $all->count <= 1) {
    if ($over && $all->exists($tcp)) { $all->remove($tcp); close $tcp }
    for my $one ($all->can_read(1)) {
        if ($one == $tcp) {
            my $client = $tcp->accept or next;
            my $from = getpeername $client or next;
            $all->add($client);
            syswrite $client, who($from);
        } elsif ($one == $udp) {
            my $from = recv $udp, my $message, 65536, 0;
            send $udp, who($from) . $message, 0, $from if $from;
        } elsif (sysread $one, my $message, 65536) {
            syswrite $one, $message;
        } else {
            $all->remove($one); close $one;
        }
    }
}
"#;

/// What a connection, or a datagram, saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Whom it was sent to.
    pub to: SocketAddr,
    /// Whom it was sent from.
    pub own: SocketAddr,
    /// The same as the app sees it.
    pub client: SocketAddr,
    /// The container that answered.
    pub backend: Ipv4Addr,
    /// How often something came back as it was sent.
    pub echoed: u64,
    /// The longest that it took, in milliseconds.
    pub longest_ms: u64,
    /// Why nothing more comes back, if so.
    pub broken: Option<String>,
}

impl Seen {
    /// By what the app said of itself and of the client: `ADDRESS PORT OWN`.
    fn new(to: SocketAddr, own: SocketAddr, said: &str) -> Result<Self> {
        let words: Vec<&str> = said.split_whitespace().collect();
        let [client, port, backend] = words[..] else {
            bail!("the app says {said:?}")
        };
        Ok(Self {
            to,
            own,
            client: (client.parse::<IpAddr>()?, port.parse()?).into(),
            backend: backend.parse()?,
            echoed: 0,
            longest_ms: 0,
            broken: None,
        })
    }
}

/// Sends one datagram from each of so many sockets to each address: what was seen.
pub(crate) fn datagrams(count: usize, to: &[SocketAddr]) -> Result<Vec<Seen>> {
    let to = to.iter().flat_map(|to| std::iter::repeat_n(*to, count));
    to.map(datagram).collect()
}

fn datagram(to: SocketAddr) -> Result<Seen> {
    let any: IpAddr = if to.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0))?;
    // Answers of anybody else than whom it was sent to are not seen.
    socket.connect(to)?;
    socket.set_read_timeout(Some(WAIT))?;
    let mut buffer = [0; 256];
    for number in 0..TRIES {
        let sent = number.to_be_bytes();
        let answer = socket.send(&sent).and_then(|_| socket.recv(&mut buffer));
        let Ok(length) = answer else { continue };
        let (said, echo) = buffer[..length]
            .split_last_chunk::<4>()
            .context("an answer without what was sent")?;
        ensure!(
            u32::from_be_bytes(*echo) <= number,
            "{echo:?} came back, not {sent:?}"
        );
        let mut seen = Seen::new(to, socket.local_addr()?, std::str::from_utf8(said)?)?;
        seen.echoed = 1;
        return Ok(seen);
    }
    bail!("{to} answers none of {TRIES} datagrams")
}

/// Opens so many connections to each address and keeps them. Each line of standard input asks each for an exchange, and
/// what all have seen is said in one line; with an `interval`, each has one so often in between.
pub(crate) fn hold(interval: Option<Duration>, count: usize, to: &[SocketAddr]) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let all = to.iter().flat_map(|to| std::iter::repeat_n(*to, count));
        let opening: Vec<_> = all.map(|to| (to, tokio::spawn(Connection::open(to)))).collect();
        let (mut asks, mut failed) = (Vec::new(), Vec::new());
        for (to, opened) in opening {
            match opened.await? {
                Ok(connection) => {
                    let (ask, asked) = mpsc::channel(1);
                    tokio::spawn(connection.keep(interval, asked));
                    asks.push(ask);
                }
                Err(error) => failed.push(format!("a connection to {to}: {error:#}")),
            }
        }
        if !failed.is_empty() {
            // Where whoever waits for us to be ready reads it.
            let all = failed.len() + asks.len();
            println!("{} of {all} are not opened: {}", failed.len(), failed.join("; "));
            return Ok(());
        }
        println!("ready");
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        while lines.next_line().await?.is_some() {
            let mut answers = Vec::new();
            for ask in &asks {
                let (reply, answer) = oneshot::channel();
                ask.send(reply).await?;
                answers.push(answer);
            }
            let mut all = Vec::new();
            for answer in answers {
                all.push(answer.await?);
            }
            println!("{}", serde_json::to_string(&all)?);
        }
        Ok(())
    })
}

struct Connection {
    stream: TcpStream,
    seen: Seen,
}

/// Sends the first packet of a connection, and does not wait for the answer.
fn begin(to: SocketAddr) -> Result<std::net::TcpStream> {
    let family = if to.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error.into()),
    }
}

impl Connection {
    async fn open(to: SocketAddr) -> Result<Self> {
        let begun = begin(to)?;
        // Of one that nobody answers it is to be known as well which flow it would have been.
        let own = begun.local_addr()?;
        let mut stream = TcpStream::from_std(begun)?;
        tokio::time::timeout(PATIENCE, stream.writable())
            .await
            .with_context(|| format!("nobody answers {own}"))??;
        if let Some(error) = stream.take_error()? {
            return Err(error.into());
        }
        stream.set_nodelay(true)?;
        let mut said = Vec::new();
        while said.last() != Some(&b'\n') && said.len() < 100 {
            let byte = tokio::time::timeout(PATIENCE, stream.read_u8()).await;
            let byte = byte.with_context(|| format!("it is there, from {own}, but the app says nothing"))?;
            said.push(byte.context("the app ends it")?);
        }
        let seen = Seen::new(to, own, std::str::from_utf8(&said)?)?;
        Ok(Self { stream, seen })
    }

    /// Until nobody asks any more.
    async fn keep(mut self, interval: Option<Duration>, mut asked: mpsc::Receiver<oneshot::Sender<Seen>>) {
        loop {
            let pause = async {
                match interval {
                    Some(interval) if self.seen.broken.is_none() => tokio::time::sleep(interval).await,
                    _ => std::future::pending().await,
                }
            };
            let reply = tokio::select! {
                reply = asked.recv() => match reply {
                    Some(reply) => Some(reply),
                    None => return,
                },
                () = pause => None,
            };
            self.exchange().await;
            if let Some(reply) = reply {
                // Whoever has asked may be gone.
                let _ = reply.send(self.seen.clone());
            }
        }
    }

    async fn exchange(&mut self) {
        if self.seen.broken.is_some() {
            return;
        }
        let (begun, number) = (Instant::now(), self.seen.echoed);
        let stream = &mut self.stream;
        let there_and_back = async {
            stream.write_all(&number.to_be_bytes()).await?;
            stream.read_u64().await
        };
        self.seen.broken = match tokio::time::timeout(PATIENCE, there_and_back).await {
            Ok(Ok(echo)) if echo == number => {
                self.seen.echoed += 1;
                let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                self.seen.longest_ms = self.seen.longest_ms.max(took);
                None
            }
            Ok(Ok(echo)) => Some(format!("{echo} came back, not {number}")),
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("nothing came back within {} s", PATIENCE.as_secs())),
        };
    }
}
