//! The daemon's listeners, how long they serve, and how its work passes on.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{self, HOST_SERVICE, Held, NetworkLeases};
use flynn_api::host;
use flynn_api::server::{CancellationToken, Farewell, serve_until};
use flynn_api::tls::{ClientAuth, Identity, Live};
use tokio::process::Child;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::background::Background;
use super::handover::{self, Predecessor, Sockets, TlsSlot};
use super::update::{self, Wish};
use super::{Daemon, api, notify};
use crate::{identities, leases};

/// Between looks at the certificate.
pub(super) const CERTIFICATE_CHECK: Duration = Duration::from_secs(1);

/// How often a daemon that lingers looks whether there is another one.
const SUCCESSOR_CHECK: Duration = Duration::from_secs(1);

/// How long the end of a daemon that is told to stop may take.
const STOP: Duration = Duration::from_secs(5);

/// After a handover clients keep the connections that they have: those under way for as long as it may take, idle ones
/// for longer than any client of ours takes one up again. Whoever uses one again is told to make another.
const HANDED_OVER: Farewell = Farewell {
    idle: Duration::from_secs(20),
    busy: Duration::from_hours(24),
};

/// How serving has ended.
pub(super) enum Outcome {
    /// By SIGTERM.
    Stopped,
    /// Another daemon serves.
    HandedOver(Child),
    /// Another daemon has begun to act, and failed: this one has to begin anew.
    Anew,
}

/// What outlives a daemon that has handed its work over: connections under way.
pub(super) type Connections = JoinSet<()>;

/// Serves until SIGTERM, or until a successor does.
pub(super) async fn run(
    daemon: &Arc<Daemon>,
    sockets: &Sockets,
    updates: &mut mpsc::Receiver<Wish>,
    connections: &mut Connections,
    predecessor: Option<Predecessor>,
    stop: &CancellationToken,
) -> anyhow::Result<Outcome> {
    let (farewell, farewells) = watch::channel(None);
    let listener = sockets.unix_listener()?;
    let router = api::router(Arc::clone(daemon));
    let goodbye = said(farewells.clone());
    connections.spawn(async move {
        if let Err(error) = serve_until(listener, router, goodbye).await {
            tracing::error!(%error, "the host API");
        }
    });
    connections.spawn(listen_tls(Arc::clone(daemon), sockets.tls_slot(), farewells));
    let background = Background::start(daemon);
    if let Some(predecessor) = predecessor
        && !predecessor.serving().await
    {
        // It starts another one, which would find this one in its way for ever.
        anyhow::ensure!(
            !notify::is_there(),
            "the daemon that has handed over was killed: systemd starts one in its place"
        );
    }
    notify::ready();
    tracing::info!(id = daemon.host_id, socket = host::SOCKET, "ready");
    loop {
        let wish = tokio::select! {
            () = stop.cancelled() => break,
            Some(wish) = updates.recv() => wish,
        };
        let prepared = match stop
            .run_until_cancelled(update::prepare(daemon, sockets, &wish))
            .await
        {
            None => break,
            Some(Ok(prepared)) => prepared,
            Some(Err(error)) => {
                tracing::warn!(%error, "this daemon goes on");
                wish.answer(Err(error));
                continue;
            }
        };
        // From here on clients wait at the sockets, and those that are connected at the gate.
        farewell.send_replace(Some(HANDED_OVER));
        background.stop(daemon).await;
        daemon.dismiss_spares();
        let successor = update::commit(prepared, wish).await;
        return Ok(successor.map_or(Outcome::Anew, Outcome::HandedOver));
    }
    notify::stopping();
    farewell.send_replace(Some(Farewell::default()));
    // What is held here goes to others at once.
    daemon.floating_settings.send_replace(None);
    background.stop(daemon).await;
    let ended = async { while connections.join_next().await.is_some() {} };
    // Some may be left of a handover that failed.
    let _ = timeout(STOP, ended).await;
    let _ = std::fs::remove_file(host::SOCKET);
    tracing::info!("stopped; jobs go on");
    Ok(Outcome::Stopped)
}

/// Another daemon serves: this one remains for the connections that it has, as long as there is another one: systemd sees
/// that there is none by our end alone.
pub(super) async fn linger(
    daemon: &Daemon,
    mut successor: Child,
    mut connections: Connections,
    stop: &CancellationToken,
) {
    tracing::info!("another daemon has taken over; connections under way go on");
    daemon.sessions.close();
    let ended = async {
        // A session may still come of a connection.
        while connections.join_next().await.is_some() {}
        let _ = timeout(HANDED_OVER.busy, daemon.sessions.wait()).await;
    };
    let alone = async {
        let _ = successor.wait().await;
        if !handover::is_free(daemon.paths.state()) {
            tracing::info!("the daemon that had taken over has handed over in its turn");
        }
        while !handover::is_free(daemon.paths.state()) {
            sleep(SUCCESSOR_CHECK).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = ended => tracing::info!("the last connection has ended"),
        () = alone => tracing::error!("the daemon that had taken over is gone: connections under way end with this one"),
    }
}

/// The farewell once it is said.
async fn said(mut farewells: watch::Receiver<Option<Farewell>>) -> Farewell {
    let said = farewells.wait_for(Option::is_some).await;
    // Who cannot say it any more has stopped.
    said.ok().and_then(|said| *said).unwrap_or_default()
}

/// Serves on the host's address once it has a certificate, and with another one as soon as that is renewed.
async fn listen_tls(daemon: Arc<Daemon>, slot: TlsSlot, farewells: watch::Receiver<Option<Farewell>>) {
    let address = SocketAddr::from((daemon.config().address, host::PORT));
    let mut complaint = None;
    let mut open = async || loop {
        if daemon.certificate_version().is_some() {
            match live(&daemon) {
                Ok(live) => match slot.listener(address, Arc::clone(&live)).await {
                    Ok(listener) => return (listener, live),
                    Err(error) => complain(&mut complaint, address, &error),
                },
                Err(error) => complain(&mut complaint, address, &error),
            }
        }
        sleep(CERTIFICATE_CHECK).await;
    };
    let (listener, live) = tokio::select! {
        opened = open() => opened,
        _ = said(farewells.clone()) => return,
    };
    tracing::info!(%address, "listening");
    *daemon.serving.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&live));
    let router = api::router(Arc::clone(&daemon));
    tokio::select! {
        served = serve_until(listener, router, said(farewells)) => if let Err(error) = served {
            tracing::error!(%error, "the host API");
        },
        () = follow_certificate(&live) => {}
    }
}

fn live(daemon: &Daemon) -> anyhow::Result<Arc<Live>> {
    let live = Live::open(&identities::host_dir(daemon.paths.state()), ClientAuth::Required)?;
    Ok(Arc::new(live))
}

/// Says why nobody is served, once for each reason.
fn complain(said: &mut Option<String>, address: SocketAddr, error: &dyn std::fmt::Display) {
    let text = error.to_string();
    if said.as_ref() != Some(&text) {
        tracing::error!(%error, %address, "cannot listen; trying on");
        *said = Some(text);
    }
}

/// Takes renewed certificates into use, for ever.
async fn follow_certificate(live: &Live) {
    let mut said = false;
    loop {
        match live.look() {
            Ok(true) => tracing::info!("the certificate was renewed, and is in use"),
            Ok(false) => said = false,
            Err(error) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::error!(%error, "the renewed certificate cannot be used; the one before stays in use");
                }
            }
        }
        sleep(CERTIFICATE_CHECK).await;
    }
}

impl Daemon {
    /// The identity that the host API is served with.
    pub(super) fn serving(&self) -> Option<Arc<Live>> {
        self.serving
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Has discoverd told what is held here.
    pub(super) fn tell_held(&self, held: Option<Held>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }

    fn certificate_version(&self) -> Option<SystemTime> {
        let path = identities::host_dir(self.paths.state()).join("cert.pem");
        std::fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok()
    }

    fn identity(&self) -> Option<Identity> {
        self.certificate_version()?;
        match Identity::load(&identities::host_dir(self.paths.state())) {
            Ok(identity) => Some(identity),
            Err(error) => {
                tracing::error!(%error, "cannot read the host's certificate");
                None
            }
        }
    }
}

impl Daemon {
    /// Discoverd over mutual TLS, at this host or, where that one does not answer, at another; none before the host has a
    /// certificate.
    pub(crate) fn discovery(&self) -> Option<DiscoveryClient> {
        self.certificate_version()?;
        let mut made = self.discovery.lock().unwrap_or_else(PoisonError::into_inner);
        if made.is_none() {
            let leases = self.documents.get::<NetworkLeases>(HOST_SERVICE);
            let own = self.discovery_at(self.config().address)?;
            *made = Some(
                own.learning(identities::host_dir(self.paths.state()))
                    .knowing(leases.iter().flat_map(leases::members)),
            );
        }
        made.clone()
    }

    /// The discoverd of the host at this address alone.
    pub(crate) fn discovery_at(&self, address: std::net::Ipv4Addr) -> Option<DiscoveryClient> {
        let identity = self.identity()?;
        let http = Http::new(&format!("https://{address}:{}", discovery::PORT)).ok()?;
        let http = http.identity(&identity).ok()?.timeout(Duration::from_secs(2));
        Some(DiscoveryClient::new(http))
    }
}
