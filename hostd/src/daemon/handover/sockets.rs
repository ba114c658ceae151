//! What a daemon holds that cannot be had twice: the locks of its directories, and the sockets that clients come to.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flynn_api::host;
use flynn_api::server::Listener;
use flynn_api::tls::Live;

use crate::paths::RUN;

/// Connections that may wait until somebody takes them: while a successor gets ready, all do.
const BACKLOG: i32 = 4096;

const LOCKS: [&str; 2] = ["lock of the state", "lock of the host"];
const UNIX: &str = "unix";
const TLS: &str = "tls";

/// The locks and the listening sockets.
#[derive(Debug)]
pub(in crate::daemon) struct Sockets {
    locks: [OwnedFd; 2],
    unix: UnixListener,
    /// Once this host has a certificate.
    tls: Arc<Mutex<Option<std::net::TcpListener>>>,
}

impl Sockets {
    /// Of a daemon that is the first: nobody else has them.
    pub(in crate::daemon) fn open(state: &Path) -> anyhow::Result<Self> {
        let locks = [lock(state)?, lock(Path::new(RUN))?];
        let unix = crate::supervisor::listen(Path::new(host::SOCKET))?;
        rustix::net::listen(&unix, BACKLOG)?;
        Ok(Self {
            locks,
            unix,
            tls: Arc::default(),
        })
    }

    /// By their names, for a successor.
    pub(super) fn describe<T>(&self, give: impl FnOnce(Vec<String>, &[BorrowedFd<'_>]) -> T) -> T {
        let tls = self.tls();
        let mut all: Vec<(&str, BorrowedFd<'_>)> = Vec::new();
        for (name, lock) in LOCKS.into_iter().zip(&self.locks) {
            all.push((name, lock.as_fd()));
        }
        all.push((UNIX, self.unix.as_fd()));
        all.extend(tls.as_ref().map(|tls| (TLS, tls.as_fd())));
        let names = all.iter().map(|(name, _)| (*name).to_owned()).collect();
        let descriptors: Vec<_> = all.into_iter().map(|(_, descriptor)| descriptor).collect();
        give(names, &descriptors)
    }

    /// From a predecessor. What is there that this version does not know is closed.
    pub(super) fn take(names: &[String], descriptors: Vec<OwnedFd>) -> io::Result<Self> {
        let mut given: Vec<_> = names.iter().map(String::as_str).zip(descriptors).collect();
        let mut find = |name: &str| {
            let found = given.iter().position(|(given, _)| *given == name)?;
            Some(given.swap_remove(found).1)
        };
        let missing =
            |name: &str| io::Error::other(format!("the daemon that runs did not hand its {name} over"));
        let locks = [
            find(LOCKS[0]).ok_or_else(|| missing(LOCKS[0]))?,
            find(LOCKS[1]).ok_or_else(|| missing(LOCKS[1]))?,
        ];
        let unix = find(UNIX).ok_or_else(|| missing("socket"))?;
        Ok(Self {
            locks,
            unix: UnixListener::from(unix),
            tls: Arc::new(Mutex::new(find(TLS).map(std::net::TcpListener::from))),
        })
    }

    fn tls(&self) -> MutexGuard<'_, Option<std::net::TcpListener>> {
        self.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// They are another daemon's: once that has ended nobody shall come to them, and the next one shall have them.
    pub(in crate::daemon) fn close(self) {
        self.tls().take();
    }

    /// The root-only socket, to be served.
    pub(in crate::daemon) fn unix_listener(&self) -> io::Result<Listener> {
        Listener::from_unix(self.unix.try_clone()?)
    }

    /// Where the socket for other hosts is kept.
    pub(in crate::daemon) fn tls_slot(&self) -> TlsSlot {
        TlsSlot(Arc::clone(&self.tls))
    }
}

/// The socket for other hosts, which is opened when there is a certificate.
#[derive(Clone, Debug)]
pub(in crate::daemon) struct TlsSlot(Arc<Mutex<Option<std::net::TcpListener>>>);

impl TlsSlot {
    /// The one that is there, if it listens at this address; else a new one.
    pub(in crate::daemon) async fn listener(
        &self,
        address: SocketAddr,
        live: Arc<Live>,
    ) -> io::Result<Listener> {
        let there = || {
            let slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let fits = |socket: &&std::net::TcpListener| socket.local_addr().is_ok_and(|own| own == address);
            slot.as_ref()
                .filter(fits)
                .map(std::net::TcpListener::try_clone)
                .transpose()
        };
        let socket = if let Some(socket) = there()? {
            socket
        } else {
            let socket = tokio::net::TcpListener::bind(address).await?.into_std()?;
            let kept = socket.try_clone()?;
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
            socket
        };
        Ok(Listener::from_tls_live(
            tokio::net::TcpListener::from_std(socket)?,
            live,
        ))
    }
}

/// Two daemons would fight over the jobs of one state directory, and over the sockets and pins of one host.
fn lock(dir: &Path) -> anyhow::Result<OwnedFd> {
    let file = File::create(dir.join("lock"))?;
    file.try_lock()
        .map_err(|_| anyhow::anyhow!("another flynn-host daemon uses {}: stop it first", dir.display()))?;
    Ok(file.into())
}

/// Whether no daemon uses a state directory.
pub(in crate::daemon) fn is_free(dir: &Path) -> bool {
    File::open(dir.join("lock")).is_ok_and(|file| file.try_lock().is_ok())
}
