//! The daemon's listeners, and the host's own instance in discoverd.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{self, HOST_SERVICE, Held, Instance, NetworkLeases, ServiceConfig};
use flynn_api::host;
use flynn_api::server::{CancellationToken, Listener, serve, shutdown};
use flynn_api::tls::{ClientAuth, Identity, Live};
use tokio::time::sleep;

use super::network::follow;
use super::{Daemon, api, renewal, services, usage};
use crate::{floating, identities, leases};

/// Between looks at the certificate.
const CERTIFICATE_CHECK: Duration = Duration::from_secs(1);

/// Between attempts to bring the network up.
const NETWORK_RETRY: Duration = Duration::from_secs(5);

/// Serves until SIGTERM.
pub(super) async fn run(daemon: Arc<Daemon>) -> anyhow::Result<()> {
    let stop = shutdown();
    let socket = Listener::unix(Path::new(host::SOCKET))?;
    tracing::info!(id = daemon.host_id, socket = host::SOCKET, "ready");
    let tls = tokio::spawn(listen_tls(Arc::clone(&daemon), stop.clone()));
    let registration = tokio::spawn(register(Arc::clone(&daemon), stop.clone()));
    let network = tokio::spawn(keep_network(Arc::clone(&daemon)));
    let documents = tokio::spawn(follow::run(Arc::clone(&daemon)));
    let floating = tokio::spawn(keep_floating(Arc::clone(&daemon)));
    let services = tokio::spawn(services::run(Arc::clone(&daemon)));
    let renewal = tokio::spawn(renewal::keep(Arc::clone(&daemon)));
    let usage = tokio::spawn(usage::watch(Arc::clone(&daemon)));
    serve(socket, api::router(Arc::clone(&daemon)), stop.cancelled()).await?;
    network.abort();
    documents.abort();
    floating.abort();
    // What is held here goes to others at once.
    daemon.floating_settings.send_replace(None);
    services.abort();
    renewal.abort();
    usage.abort();
    let _ = tokio::join!(tls, registration);
    if let Ok(sinks) = daemon.sinks() {
        sinks.shut_down().await;
    }
    let _ = std::fs::remove_file(host::SOCKET);
    tracing::info!("stopped; jobs go on");
    Ok(())
}

/// Brings the network up that the host had before, when the daemon's start could not.
async fn keep_network(daemon: Arc<Daemon>) {
    loop {
        sleep(NETWORK_RETRY).await;
        if daemon.network.peek().is_none()
            && let Some(config) = daemon.config().network
            && let Err(error) = daemon.configure_network(config).await
        {
            tracing::error!(%error, "the network is not up; trying on");
        }
    }
}

/// Holds this host's share of the floating addresses, until there are none any more.
async fn keep_floating(daemon: Arc<Daemon>) {
    let receiver = daemon.floating_settings.subscribe();
    let (id, address, held) = (
        daemon.host_id.clone(),
        daemon.config().address,
        daemon.floating.clone(),
    );
    std::thread::spawn(move || {
        if let Err(error) = floating::run(&id, address, receiver, &held) {
            tracing::error!(%error, "floating addresses are left to other hosts");
        }
    });
    floating::follow(
        daemon.paths.state(),
        || daemon.discovery(),
        &daemon.floating_settings,
    )
    .await;
}

/// Serves on the host's address once it has a certificate, and with another one as soon as that is renewed.
async fn listen_tls(daemon: Arc<Daemon>, stop: CancellationToken) {
    let address = SocketAddr::from((daemon.config().address, host::PORT));
    let mut said = None;
    let mut open = async || loop {
        if daemon.certificate_version().is_some() {
            match listener(&daemon, address).await {
                Ok(opened) => return opened,
                Err(error) => {
                    let text = error.to_string();
                    if said.as_ref() != Some(&text) {
                        tracing::error!(%error, %address, "cannot listen; trying on");
                        said = Some(text);
                    }
                }
            }
        }
        sleep(CERTIFICATE_CHECK).await;
    };
    let Some((listener, live)) = stop.run_until_cancelled(open()).await else {
        return;
    };
    tracing::info!(%address, "listening");
    *daemon.serving.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&live));
    let router = api::router(Arc::clone(&daemon));
    tokio::select! {
        served = serve(listener, router, stop.cancelled()) => if let Err(error) = served {
            tracing::error!(%error, "the host API");
        },
        () = follow_certificate(&live) => {}
    }
}

async fn listener(daemon: &Daemon, address: SocketAddr) -> anyhow::Result<(Listener, Arc<Live>)> {
    let live = Live::open(&identities::host_dir(daemon.paths.state()), ClientAuth::Required)?;
    let live = Arc::new(live);
    Ok((Listener::tls_live(address, Arc::clone(&live)).await?, live))
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

/// Keeps the host registered as an instance of its service. It is not taken out at the end: a daemon that is started
/// anew is the same host, and one that is not runs out.
async fn register(daemon: Arc<Daemon>, stop: CancellationToken) {
    let heartbeat = async {
        loop {
            let pause = match daemon.discovery() {
                Some(client) => match beat(&daemon, &client).await {
                    Ok(()) => Duration::from_secs(discovery::HEARTBEAT_SECS),
                    Err(error) => {
                        tracing::debug!(%error, "cannot register this host");
                        Duration::from_millis(500)
                    }
                },
                None => CERTIFICATE_CHECK,
            };
            sleep(pause).await;
        }
    };
    tokio::select! {
        () = heartbeat => {}
        () = stop.cancelled() => {}
    }
}

async fn beat(daemon: &Daemon, client: &DiscoveryClient) -> flynn_api::Result<()> {
    let config = daemon.config();
    let mut meta = config.tags;
    meta.insert("id".into(), config.id);
    let held: Vec<String> = daemon.floating.get().iter().map(ToString::to_string).collect();
    if !held.is_empty() {
        meta.insert(floating::command::META.into(), held.join(","));
    }
    let address = format!("{}:{}", config.address, host::PORT);
    let instance = Instance::new("https", address.clone(), meta);
    let registered = match client.register(HOST_SERVICE, &instance).await {
        Err(error) if error.code == flynn_api::ErrorCode::NotFound => {
            client
                .ensure_service(HOST_SERVICE, &ServiceConfig::default())
                .await?;
            client.register(HOST_SERVICE, &instance).await
        }
        result => result,
    };
    let held = daemon.held.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(held) = held
        && let Err(error) = identities::tell(client, &daemon.host_id, &address, &held).await
    {
        tracing::debug!(%error, "cannot say which certificates are held here");
    }
    registered
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
