//! Services and their instances: what can be sent to, how busy it is, and connections kept to it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use flynn_api::Digest;
use flynn_api::discovery::Instance;
use tokio::sync::watch;

use crate::balance::{Budget, Load};
use crate::upstream::Connection;

/// How long a backend that refused a connection is passed over while there are others.
const FAILING_FOR: Duration = Duration::from_secs(1);
/// Idle connections kept to a backend.
const MAX_IDLE: usize = 64;
/// How long one is kept.
const IDLE_FOR: Duration = Duration::from_secs(30);
/// How long a connection may take after an answer until it is ready for the next request.
const READY_WITHIN: Duration = Duration::from_secs(1);

/// How long a service that a route leads to may be unknown while somebody waits for its instances.
const TOLD_WITHIN: Duration = Duration::from_secs(2);

/// One instance of a service.
#[derive(Debug)]
pub struct Backend {
    /// Where it listens.
    pub addr: SocketAddr,
    /// What a sticky client's cookie says: unforgeable, and says nothing about the address.
    pub token: String,
    in_flight: AtomicUsize,
    /// Milliseconds after `born` until which it is passed over.
    failing_until: AtomicU64,
    born: Instant,
    idle: Mutex<Vec<(Connection, Instant)>>,
}

impl Backend {
    /// An instance at this address.
    pub fn new(addr: SocketAddr, cookie_key: &str, service: &str) -> Self {
        // The key is first and the digest is truncated (SHA-512/256): nobody without the key can make another.
        let token = Digest::of(format!("{cookie_key}\0{service}\0{addr}").as_bytes()).to_string();
        Self {
            addr,
            token: token[..32].to_owned(),
            in_flight: AtomicUsize::new(0),
            failing_until: AtomicU64::new(0),
            born: Instant::now(),
            idle: Mutex::default(),
        }
    }

    /// How busy it is.
    pub fn load(&self) -> Load {
        let now = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        Load {
            failing: now < self.failing_until.load(Ordering::Relaxed),
            in_flight: self.in_flight.load(Ordering::Relaxed),
        }
    }

    /// It refused a connection.
    pub fn failed(&self) {
        let until = self.born.elapsed() + FAILING_FOR;
        self.failing_until.store(
            u64::try_from(until.as_millis()).unwrap_or(u64::MAX),
            Ordering::Relaxed,
        );
        self.connections().clear();
    }

    /// Counts a request until the guard is dropped.
    pub fn begin(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }

    fn connections(&self) -> MutexGuard<'_, Vec<(Connection, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that was kept, the one that was used last first.
    pub fn take_idle(&self) -> Option<Connection> {
        let mut idle = self.connections();
        while let Some((connection, since)) = idle.pop() {
            if since.elapsed() > IDLE_FOR {
                idle.clear();
            } else if !connection.is_closed() {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps a connection for the next request, once it can take one. A backend may answer early, while its client
    /// still sends: until that has ended, which may be long, the next request would wait for another client's.
    pub fn keep(self: &Arc<Self>, mut connection: Connection) {
        if connection.is_ready() {
            return self.keep_ready(connection);
        }
        if connection.is_closed() {
            return;
        }
        let backend = Arc::clone(self);
        tokio::spawn(async move {
            if let Ok(true) = tokio::time::timeout(READY_WITHIN, connection.ready()).await {
                backend.keep_ready(connection);
            }
        });
    }

    fn keep_ready(&self, connection: Connection) {
        let mut idle = self.connections();
        if idle.len() >= MAX_IDLE {
            idle.remove(0);
        }
        idle.push((connection, Instant::now()));
    }

    /// Lets go of connections that nobody has used for long.
    pub fn tidy(&self) {
        self.connections()
            .retain(|(connection, since)| since.elapsed() <= IDLE_FOR && !connection.is_closed());
    }
}

/// One request under way.
#[derive(Debug)]
pub struct InFlight(Arc<Backend>);

impl InFlight {
    /// To which backend.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A service with its instances as discoverd last knew them.
#[derive(Debug)]
pub struct Service {
    /// Its name in discoverd.
    pub name: String,
    /// Requests that may still be tried again.
    pub budget: Budget,
    members: watch::Sender<Arc<Members>>,
}

/// The instances of a service at one time.
#[derive(Clone, Debug, Default)]
pub struct Members {
    /// As discoverd lists them: kept on disk.
    pub instances: Vec<Instance>,
    /// The id of the leader, if there is one.
    pub leader: Option<String>,
    /// Whether anybody has ever told of them.
    pub known: bool,
    /// Addresses of instances that have not said goodbye, and whose registration ran out of late.
    pub lost: BTreeSet<String>,
    backends: Vec<Arc<Backend>>,
    leading: Option<Arc<Backend>>,
}

impl Members {
    /// Those that a route may send to.
    pub fn backends(&self, leader_only: bool) -> &[Arc<Backend>] {
        if leader_only {
            self.leading.as_slice()
        } else {
            &self.backends
        }
    }
}

impl Service {
    /// A service of which nothing is known yet.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            budget: Budget::default(),
            members: watch::Sender::default(),
        }
    }

    /// Its instances now.
    pub fn members(&self) -> Arc<Members> {
        Arc::clone(&self.members.borrow())
    }

    /// Its instances; those of a service that nobody has told of yet are waited for, a moment. A route may be known
    /// before those who serve it.
    pub async fn told(&self) -> Arc<Members> {
        let members = self.members();
        if members.known {
            return members;
        }
        let mut told = self.members.subscribe();
        let _ = tokio::time::timeout(TOLD_WITHIN, told.wait_for(|members| members.known)).await;
        self.members()
    }

    /// These are its instances from now on. Backends that stay keep their connections and counts; requests under way
    /// at one that goes are finished.
    pub fn set(
        &self,
        mut instances: Vec<Instance>,
        leader: Option<String>,
        lost: BTreeSet<String>,
        cookie_key: &str,
    ) {
        instances.sort_by(|a, b| a.id.cmp(&b.id));
        let old = self.members();
        let backend = |instance: &Instance| {
            let addr: SocketAddr = instance.addr.parse().ok().filter(|_| instance.proto != "udp")?;
            let known = old.backends.iter().find(|backend| backend.addr == addr);
            Some(
                known
                    .cloned()
                    .unwrap_or_else(|| Arc::new(Backend::new(addr, cookie_key, &self.name))),
            )
        };
        let backends: Vec<_> = instances.iter().filter_map(backend).collect();
        let leading = instances
            .iter()
            .find(|instance| Some(&instance.id) == leader.as_ref())
            .and_then(|instance| {
                let addr: SocketAddr = instance.addr.parse().ok()?;
                backends.iter().find(|backend| backend.addr == addr).cloned()
            });
        let members = Arc::new(Members {
            instances,
            leader,
            known: true,
            lost,
            backends,
            leading,
        });
        self.members.send_replace(members);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_that_stay_keep_what_they_have() {
        let instance = |addr: &str| Instance::new("http", addr, flynn_api::Meta::new());
        let (a, b) = (instance("10.0.0.1:80"), instance("10.0.0.2:80"));
        let service = Service::new("web");
        service.set(
            vec![
                a.clone(),
                b.clone(),
                instance("nonsense"),
                Instance::new("udp", "10.0.0.3:80", flynn_api::Meta::new()),
            ],
            Some(b.id.clone()),
            BTreeSet::new(),
            "key",
        );
        let before = service.members();
        assert_eq!(
            (before.backends(false).len(), before.backends(true).len()),
            (2, 1)
        );
        let request = before.backends(true)[0].begin();
        service.set(vec![b], None, BTreeSet::new(), "key");
        let after = service.members();
        assert_eq!(after.backends(false)[0].load().in_flight, 1);
        assert!(after.backends(true).is_empty());
        drop(request);
        assert_eq!(after.backends(false)[0].load().in_flight, 0);
        assert_ne!(before.backends(false)[0].token, before.backends(false)[1].token);
        assert!(!after.backends(false)[0].token.contains("10.0"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_known_yet_is_waited_for() {
        let service = Arc::new(Service::new("web"));
        let asked = Arc::clone(&service);
        let asking = tokio::spawn(async move { asked.told().await.backends(false).len() });
        tokio::task::yield_now().await;
        let instance = Instance::new("http", "10.0.0.1:80", flynn_api::Meta::new());
        service.set(vec![instance], None, BTreeSet::new(), "key");
        assert_eq!(asking.await.unwrap(), 1);

        // Nobody may ever tell.
        assert!(!Service::new("other").told().await.known);
    }

    #[test]
    fn who_failed_is_passed_over() {
        let backend = Backend::new("10.0.0.1:80".parse().unwrap(), "key", "web");
        assert!(!backend.load().failing);
        backend.failed();
        assert!(backend.load().failing);
    }
}
