//! Registers a job's services in discoverd while their checks pass.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{self, Instance, ServiceConfig};
use flynn_api::host::HealthCheck;
use flynn_api::tls::probing_client_config;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::inside::Inside;
use crate::container::Place;
use crate::launch::{Launch, Service};

/// Between heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(discovery::HEARTBEAT_SECS);

/// Between attempts while discoverd cannot be reached.
const RETRY: Duration = Duration::from_millis(500);

/// How long one call may take, and one check that says nothing else.
const PATIENCE: Duration = Duration::from_secs(2);

/// Between the first checks of a program that is not up yet.
const EAGER: Duration = Duration::from_millis(50);

/// What a health check's silence stands for.
const INTERVAL: Duration = Duration::from_secs(2);
const THRESHOLD: u32 = 2;
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// What the supervisor is told.
#[derive(Debug)]
pub(super) enum HealthEvent {
    /// The service of this index is healthy, or no longer.
    Changed(usize, bool),
    /// The service of this index is down, and the job wants to be killed then: why.
    KillDown(String),
}

/// The services of one run of the program.
pub(super) struct Services {
    tasks: Vec<Task>,
}

struct Task {
    stop: watch::Sender<bool>,
    handle: JoinHandle<()>,
}

impl Services {
    /// Begins to check and register.
    pub(super) fn start(
        launch: &Launch,
        place: &watch::Receiver<Place>,
        events: &mpsc::UnboundedSender<HealthEvent>,
        inside: &Inside,
    ) -> Self {
        let tasks = launch.services.iter().enumerate().map(|(index, service)| {
            let (stop, stopped) = watch::channel(false);
            let own = place.borrow().address.unwrap_or(launch.host_ip);
            let address = SocketAddr::new(IpAddr::V4(own), service.port);
            let watcher = Watcher {
                index,
                service: service.clone(),
                address,
                instance: Instance::new(&service.proto, address.to_string(), launch.instance_meta.clone()),
                place: place.clone(),
                events: events.clone(),
                inside: inside.clone(),
            };
            Task {
                stop,
                handle: tokio::spawn(watcher.run(stopped)),
            }
        });
        Self {
            tasks: tasks.collect(),
        }
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Takes the instances out of discoverd, and stops. Bounded: one that cannot be taken out runs out by itself.
    pub(super) async fn deregister(self) {
        for task in &self.tasks {
            let _ = task.stop.send(true);
        }
        for task in self.tasks {
            let aborter = task.handle.abort_handle();
            if timeout(PATIENCE, task.handle).await.is_err() {
                aborter.abort();
            }
        }
    }
}

struct Watcher {
    index: usize,
    service: Service,
    address: SocketAddr,
    instance: Instance,
    place: watch::Receiver<Place>,
    events: mpsc::UnboundedSender<HealthEvent>,
    inside: Inside,
}

impl Watcher {
    async fn run(self, mut stopped: watch::Receiver<bool>) {
        let health = Arc::new(watch::Sender::new(false));
        tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => {}
            () = self.check(&health) => {}
            () = self.register(health.subscribe()) => {}
        }
        // After a stop, at whatever point it came: deregistering what is not registered does no harm.
        if let Some(client) = self.client() {
            let _ = timeout(PATIENCE, client.deregister(&self.service.name, &self.instance.id)).await;
        }
    }

    /// Follows the health of the program. Never ends.
    async fn check(&self, health: &watch::Sender<bool>) {
        let default = HealthCheck {
            kind: "tcp".into(),
            ..HealthCheck::default()
        };
        let check = self.service.check.as_ref().unwrap_or(&default);
        let interval = check.interval.map_or(INTERVAL, Duration::from_nanos).max(EAGER);
        let threshold = check.threshold.unwrap_or(THRESHOLD).max(1);
        let start_timeout = check.start_timeout.map_or(START_TIMEOUT, Duration::from_nanos);
        let started = Instant::now();
        let mut gate = Gate::new(threshold);
        loop {
            let result = match self.service.proto.as_str() {
                _ if check.kind == "command" => self.command(check).await,
                // Nothing answers on a UDP port whose protocol is not known.
                "udp" => Ok(()),
                _ => probe(check, self.address).await,
            };
            let reason = result.as_ref().err().cloned().unwrap_or_default();
            if let Some(healthy) = gate.take(result.is_ok()) {
                health.send_replace(healthy);
                let _ = self.events.send(HealthEvent::Changed(self.index, healthy));
                if !healthy && check.kill_down {
                    let why = format!("service {} is down: {reason}", self.service.name);
                    let _ = self.events.send(HealthEvent::KillDown(why));
                }
            }
            if !gate.was_up && check.kill_down && started.elapsed() > start_timeout {
                let why = format!(
                    "service {} did not come up within {} s: {reason}",
                    self.service.name,
                    start_timeout.as_secs()
                );
                let _ = self.events.send(HealthEvent::KillDown(why));
                return std::future::pending().await;
            }
            sleep(if gate.was_up {
                interval
            } else {
                EAGER.max(started.elapsed() / 10).min(interval)
            })
            .await;
        }
    }

    async fn command(&self, check: &HealthCheck) -> Result<(), String> {
        let place = self.place.borrow().clone();
        self.inside
            .succeeds(&place, &check.command, patience(check))
            .await
    }

    /// Keeps the instance registered while it is healthy. Never ends.
    async fn register(&self, mut health: watch::Receiver<bool>) {
        let mut place = self.place.clone();
        let mut registered = false;
        loop {
            if !*health.borrow_and_update() {
                if registered && let Some(client) = self.client() {
                    registered = client
                        .deregister(&self.service.name, &self.instance.id)
                        .await
                        .is_err();
                }
                if registered {
                    sleep(RETRY).await;
                } else if health.changed().await.is_err() {
                    return std::future::pending().await;
                }
                continue;
            }
            let result = match self.client() {
                Some(client) => self.put(&client).await,
                None => Err(flynn_api::Error::unavailable(
                    "the gateway address is not known yet",
                )),
            };
            registered |= result.is_ok();
            if let Err(error) = &result {
                tracing::debug!(service = %self.service.name, %error, "cannot register");
            }
            let pause = if result.is_ok() { HEARTBEAT } else { RETRY };
            tokio::select! {
                () = sleep(pause) => {}
                _ = health.changed() => {}
                Ok(()) = place.changed() => {}
            }
        }
    }

    async fn put(&self, client: &DiscoveryClient) -> flynn_api::Result<()> {
        match client.register(&self.service.name, &self.instance).await {
            Err(error) if error.code == flynn_api::ErrorCode::NotFound && self.service.create => {
                client
                    .ensure_service(&self.service.name, &ServiceConfig::default())
                    .await?;
                client.register(&self.service.name, &self.instance).await
            }
            result => result,
        }
    }

    fn client(&self) -> Option<DiscoveryClient> {
        let gateway = self.place.borrow().gateway?;
        let http = Http::new(&format!("http://{gateway}:{}", discovery::PORT)).ok()?;
        Some(DiscoveryClient::new(http.timeout(PATIENCE)))
    }
}

/// Turns results of checks into changes of health: up at the first success, then both ways after `threshold` results
/// in a row.
#[derive(Debug)]
struct Gate {
    threshold: u32,
    up: bool,
    was_up: bool,
    against: u32,
}

impl Gate {
    fn new(threshold: u32) -> Self {
        Self {
            threshold,
            up: false,
            was_up: false,
            against: 0,
        }
    }

    /// Takes a result; gives the new health if it has changed.
    fn take(&mut self, ok: bool) -> Option<bool> {
        if ok == self.up {
            self.against = 0;
            return None;
        }
        self.against += 1;
        if self.was_up && self.against < self.threshold {
            return None;
        }
        self.up = ok;
        self.was_up |= ok;
        self.against = 0;
        Some(ok)
    }
}

/// How long one check may take.
fn patience(check: &HealthCheck) -> Duration {
    check.timeout.map_or(PATIENCE, Duration::from_nanos)
}

async fn probe(check: &HealthCheck, address: SocketAddr) -> Result<(), String> {
    let attempt = async {
        match check.kind.as_str() {
            "http" => probe_http(check, Http::new(&format!("http://{address}"))).await,
            // A container's certificate is for the names of its users, and not for its address.
            "https" => {
                let client = Http::new(&format!("https://{address}"));
                probe_http(check, client.map(|client| client.tls(probing_client_config()))).await
            }
            _ => tokio::net::TcpStream::connect(address)
                .await
                .map(drop)
                .map_err(|error| error.to_string()),
        }
    };
    let patience = patience(check);
    timeout(patience, attempt)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {} ms", patience.as_millis())))
}

async fn probe_http(check: &HealthCheck, client: flynn_api::Result<Http>) -> Result<(), String> {
    use http_body_util::{BodyExt, Limited};
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let path = check.path.as_deref().unwrap_or("/");
    let mut request = http::Request::get(path);
    if let Some(host) = &check.host {
        request = request.header(http::header::HOST, host);
    }
    let request = request
        .body(flynn_api::client::full(""))
        .map_err(|error| text(&error))?;
    let client = client.map_err(|error| text(&error))?;
    let response = client.send_raw(request).await.map_err(|error| text(&error))?;
    let wanted = check.status.unwrap_or(200);
    if response.status().as_u16() != wanted {
        return Err(format!(
            "GET {path} answered {} instead of {wanted}",
            response.status().as_u16()
        ));
    }
    let Some(contains) = &check.contains else {
        return Ok(());
    };
    let body = Limited::new(response.into_body(), 1 << 20)
        .collect()
        .await
        .map_err(|error| text(&error))?
        .to_bytes();
    let found = body
        .windows(contains.len().max(1))
        .any(|window| window == contains.as_bytes());
    if found || contains.is_empty() {
        Ok(())
    } else {
        Err(format!("GET {path} answered without {contains:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::server::{CancellationToken, Listener, serve};
    use flynn_api::tls::{Ca, ClientAuth, PeerIdentity};

    #[tokio::test]
    async fn https_is_checked_whatever_name_the_certificate_has() {
        flynn_api::tls::install_provider();
        let ca = Ca::create("somebody else's").unwrap();
        let identity = ca.issue(&PeerIdentity::Job("shop".into()), &[]).unwrap();
        let config = identity.server_config(ClientAuth::Optional).unwrap();
        let listener = Listener::tls("127.0.0.1:0".parse().unwrap(), config)
            .await
            .unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let app = axum::Router::new().route("/up", axum::routing::get(async || "all is well"));
        let server = tokio::spawn(serve(listener, app, stop.clone().cancelled_owned()));
        let check = |kind: &str, path: &str, contains: &str| HealthCheck {
            kind: kind.into(),
            path: Some(path.into()),
            contains: Some(contains.into()),
            ..HealthCheck::default()
        };
        probe(&check("https", "/up", "well"), address).await.unwrap();
        for (bad, words) in [
            (check("https", "/up", "ill"), "without"),
            (check("https", "/down", ""), "404"),
            (check("http", "/up", "well"), ""),
        ] {
            let why = probe(&bad, address).await.unwrap_err();
            assert!(why.contains(words), "{why}");
        }
        stop.cancel();
        server.await.unwrap().unwrap();
    }

    #[test]
    fn up_at_once_and_changed_by_results_in_a_row() {
        let mut gate = Gate::new(2);
        let changes: Vec<_> = [false, true, false, true, false, false, true, true]
            .into_iter()
            .map(|ok| gate.take(ok))
            .collect();
        assert_eq!(
            changes,
            [None, Some(true), None, None, None, Some(false), None, Some(true)]
        );
    }
}
