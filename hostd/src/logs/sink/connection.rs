//! A connection to a sink, over TCP or TLS.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use flynn_api::sink::{PORT, SyslogConfig};
use flynn_api::tls::{install_provider, probing_client_config};
use flynn_api::{Error, Result};
use rustix::net::sockopt;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::logs::record::Id;

/// How long it may take to connect.
const CONNECT: Duration = Duration::from_secs(10);

/// How long the other host may leave bytes unacknowledged.
const SILENCE: Duration = Duration::from_secs(30);

/// The longest line that is expected from the other side.
const MAX_LINE: usize = 512;

/// Where a sink is.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// `host:port`.
    pub(super) address: String,
    /// How TLS is spoken, and to whom.
    pub(super) tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
}

impl Target {
    /// Of a syslog server.
    pub(super) fn of(config: &SyslogConfig) -> Result<Self> {
        let wanted = "syslog://host:port or syslog+tls://host:port is wanted";
        let refused = |why: &str| Error::invalid_field("config.url", format!("{:?}: {why}", config.url));
        let (scheme, rest) = config.url.split_once("://").ok_or_else(|| refused(wanted))?;
        let address = rest.strip_suffix('/').unwrap_or(rest);
        let parsed: http::uri::Authority = address.parse().map_err(|_| refused(wanted))?;
        if parsed.host().is_empty() || address.contains('@') {
            return Err(refused(wanted));
        }
        let port = parsed.port_u16().unwrap_or(PORT);
        let host = parsed
            .host()
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        let tls = match scheme {
            "syslog" => None,
            "syslog+tls" => {
                let name = ServerName::try_from(host).map_err(|_| refused("it names no host"))?;
                Some((trust(config)?, name))
            }
            _ => return Err(refused(wanted)),
        };
        Ok(Self {
            address: format!("{}:{port}", parsed.host()),
            tls,
        })
    }
}

fn trust(config: &SyslogConfig) -> Result<Arc<ClientConfig>> {
    if config.insecure {
        return Ok(probing_client_config());
    }
    install_provider();
    let mut roots = RootCertStore::empty();
    if let Some(ca) = &config.ca {
        let refused =
            |why: String| Error::invalid_field("config.ca", format!("certificates as PEM are wanted: {why}"));
        for certificate in CertificateDer::pem_slice_iter(ca.as_bytes()) {
            let certificate = certificate.map_err(|error| refused(error.to_string()))?;
            roots
                .add(certificate)
                .map_err(|error| refused(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(refused("there are none".into()));
        }
    } else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    let config = ClientConfig::builder().with_root_certificates(roots);
    Ok(Arc::new(config.with_no_client_auth()))
}

/// What the other side says.
#[derive(Debug)]
pub(super) enum Heard {
    /// It has a job's records up to this one.
    Has(String, Id),
    /// It has ended the connection: orderly, or not.
    Over(bool),
}

/// A connection that is up.
pub(super) struct Connection {
    write: Box<dyn AsyncWrite + Send + Unpin>,
    heard: mpsc::Receiver<Heard>,
    listener: JoinHandle<()>,
    meter: Arc<Meter>,
}

impl Connection {
    /// Connects.
    pub(super) async fn open(target: &Target) -> io::Result<Self> {
        timeout(CONNECT, Self::connect(target))
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    async fn connect(target: &Target) -> io::Result<Self> {
        let socket = TcpStream::connect(&target.address).await?;
        socket.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&socket, true)?;
        sockopt::set_tcp_keepidle(&socket, SILENCE)?;
        sockopt::set_tcp_keepintvl(&socket, SILENCE / 3)?;
        sockopt::set_tcp_user_timeout(&socket, u32::try_from(SILENCE.as_millis()).unwrap_or(u32::MAX))?;
        let meter = Arc::new(Meter {
            socket: std::os::fd::AsFd::as_fd(&socket).try_clone_to_owned()?,
            written: AtomicU64::new(0),
        });
        let metered = Metered {
            socket,
            meter: Arc::clone(&meter),
        };
        let (said, heard) = mpsc::channel(64);
        Ok(if let Some((config, name)) = &target.tls {
            let tls = tokio_rustls::TlsConnector::from(Arc::clone(config));
            let stream = tls.connect(name.clone(), metered).await?;
            let (read, write) = tokio::io::split(stream);
            Self {
                write: Box::new(write),
                heard,
                listener: tokio::spawn(listen(read, said)),
                meter,
            }
        } else {
            let (read, write) = tokio::io::split(metered);
            Self {
                write: Box::new(write),
                heard,
                listener: tokio::spawn(listen(read, said)),
                meter,
            }
        })
    }

    /// What the other side says next.
    pub(super) async fn hear(&mut self) -> Heard {
        self.heard.recv().await.unwrap_or(Heard::Over(false))
    }

    /// Sends it all; `hear` is told what the other side says meanwhile. An error says whether the end was orderly.
    pub(super) async fn send(
        &mut self,
        bytes: &[u8],
        mut hear: impl FnMut(String, Id),
    ) -> std::result::Result<(), bool> {
        let write = &mut self.write;
        let mut sending = pin!(async move {
            write.write_all(bytes).await?;
            write.flush().await
        });
        loop {
            tokio::select! {
                biased;
                heard = self.heard.recv() => match heard {
                    Some(Heard::Has(job, id)) => hear(job, id),
                    Some(Heard::Over(orderly)) => return Err(orderly),
                    None => return Err(false),
                },
                sent = &mut sending => return sent.map_err(|_| false),
            }
        }
    }

    /// Bytes that were handed to the kernel so far, TLS's own included.
    pub(super) fn sent(&self) -> u64 {
        self.meter.written.load(Ordering::Relaxed)
    }

    /// How many of them the other host has. None once the connection is over.
    pub(super) fn taken(&self) -> Option<u64> {
        let waiting = crate::sys::tcp_unacknowledged(&self.meter.socket).ok()??;
        Some(self.sent().saturating_sub(waiting))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

async fn listen(mut read: impl AsyncRead + Unpin, said: mpsc::Sender<Heard>) {
    let mut pending = Vec::new();
    loop {
        match read.read_buf(&mut pending).await {
            Ok(0) => break drop(said.send(Heard::Over(true)).await),
            Ok(_) => {}
            // TLS that is not ended as it should, over TCP that is.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                break drop(said.send(Heard::Over(true)).await);
            }
            Err(_) => break drop(said.send(Heard::Over(false)).await),
        }
        let mut from = 0;
        while let Some(end) = memchr::memchr(b'\n', &pending[from..]) {
            if let Some((job, id)) = acknowledgement(&pending[from..from + end])
                && said.send(Heard::Has(job, id)).await.is_err()
            {
                return;
            }
            from += end + 1;
        }
        pending.drain(..from);
        if pending.len() > MAX_LINE {
            pending.clear();
        }
    }
}

/// Reads `<PROCID> <run> <seq>`; gives the job's id.
fn acknowledgement(line: &[u8]) -> Option<(String, Id)> {
    let line = std::str::from_utf8(line).ok()?;
    let mut parts = line.trim_end().split(' ');
    let process = parts.next()?;
    let job = process.rsplit('.').next()?.to_owned();
    let id = Id {
        run: parts.next()?.parse().ok()?,
        seq: parts.next()?.parse().ok()?,
    };
    parts.next().is_none().then_some((job, id))
}

/// How much goes through a socket.
#[derive(Debug)]
struct Meter {
    /// Another descriptor of it, for questions.
    socket: std::os::fd::OwnedFd,
    written: AtomicU64,
}

struct Metered {
    socket: TcpStream,
    meter: Arc<Meter>,
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, to)
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, bytes);
        if let Poll::Ready(Ok(count)) = written {
            self.meter.written.fetch_add(count as u64, Ordering::Relaxed);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn target(url: &str) -> Result<Target> {
        Target::of(&serde_json::from_value(serde_json::json!({ "url": url })).unwrap())
    }

    #[test]
    fn urls_say_where_and_how() {
        assert_eq!(
            target("syslog://logs.example").unwrap().address,
            "logs.example:514"
        );
        assert_eq!(target("syslog://[::1]:99/").unwrap().address, "[::1]:99");
        assert!(target("syslog+tls://logs.example:6514").unwrap().tls.is_some());
        for url in [
            "logs.example",
            "http://logs.example",
            "syslog://",
            "syslog://a b",
            "syslog://u@h",
            "syslog://h/x",
        ] {
            assert!(target(url).is_err(), "{url}");
        }
    }

    #[test]
    fn acknowledgements_name_a_job() {
        let id = Id { run: 7, seq: 17 };
        assert_eq!(
            acknowledgement(b"web.host1-9c 7 17"),
            Some(("host1-9c".into(), id))
        );
        assert_eq!(acknowledgement(b"host1-9c 7 17\r"), Some(("host1-9c".into(), id)));
        for odd in ["", "host1-9c", "host1-9c 7", "host1-9c 7 17 1", "host1-9c 7 -1"] {
            assert_eq!(acknowledgement(odd.as_bytes()), None, "{odd}");
        }
    }

    proptest! {
        #[test]
        fn any_answer_is_survived(line in proptest::collection::vec(any::<u8>(), 0..60)) {
            acknowledgement(&line);
        }
    }
}
