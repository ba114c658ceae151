//! What the parts of the router share: the table, the services, the certificates, the counters.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};

use flynn_api::route::{Route, RouteKind};
use flynn_dataplane::Protocol;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::Service;
use crate::l4::plan::Key;
use crate::metrics::Metrics;
use crate::slots::Slots;
use crate::table::Table;
use crate::tls::Certificates;

/// Where a route leads.
#[derive(Clone, Debug)]
pub struct Target {
    /// The service.
    pub service: Arc<Service>,
    /// Only to its leader.
    pub leader: bool,
    /// Clients stay at their backend.
    pub sticky: bool,
    /// Close each client connection after its request.
    pub disable_keep_alives: bool,
}

/// The routes as they are now, and what was made of them.
#[derive(Debug, Default)]
struct Now {
    /// Whether anybody has ever told of them.
    known: bool,
    routes: Vec<Route>,
    table: Table<Target>,
    services: BTreeMap<String, Arc<Service>>,
}

/// The router.
#[derive(Debug)]
pub struct Router {
    now: RwLock<Arc<Now>>,
    /// Certificates by name.
    pub certificates: Arc<Certificates>,
    /// Counters.
    pub metrics: Metrics,
    /// Places for clients' connections.
    pub slots: Slots,
    /// Connections, upgraded ones as well.
    pub tasks: TaskTracker,
    /// Routes by port that cannot be served, and why.
    refused: RwLock<BTreeMap<Key, String>>,
    /// The drain is over: whatever still runs ends.
    pub stop: CancellationToken,
    /// Routes or instances have changed.
    pub(crate) changed: Notify,
    cookie_key: String,
}

impl Router {
    /// A router without routes. Sticky cookies are bound to `cookie_key`.
    pub fn new(certificates: Arc<Certificates>, cookie_key: String) -> Self {
        Self {
            now: RwLock::default(),
            certificates,
            metrics: Metrics::default(),
            slots: Slots::of_process(),
            refused: RwLock::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            changed: Notify::new(),
            cookie_key,
        }
    }

    fn now(&self) -> Arc<Now> {
        Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Where a request for this host and path goes.
    pub fn find(&self, host: &str, path: &str) -> Option<Target> {
        self.now().table.find(host, path).cloned()
    }

    /// The routes.
    pub fn routes(&self) -> Vec<Route> {
        self.now().routes.clone()
    }

    /// Whether anybody has ever told of routes, be it that there are none.
    pub fn knows_routes(&self) -> bool {
        self.now().known
    }

    /// Whether all is known that requests are answered by: the routes, and who serves each.
    pub fn is_informed(&self) -> bool {
        let now = self.now();
        now.known && now.services.values().all(|service| service.members().known)
    }

    /// Routes by port that cannot be served, and why: `3000` for TCP, `3000/udp` for UDP.
    pub fn refused(&self) -> BTreeMap<String, String> {
        let refused = self.refused.read().unwrap_or_else(PoisonError::into_inner);
        let name = |key: &Key| match key.protocol {
            Protocol::Tcp => key.port.to_string(),
            Protocol::Udp => format!("{}/udp", key.port),
        };
        refused
            .iter()
            .map(|(key, why)| (name(key), why.clone()))
            .collect()
    }

    /// These routes of the protocol, by port, cannot be served; those which could be before are logged.
    pub(crate) fn refuse(&self, protocol: Protocol, refused: BTreeMap<u16, String>) {
        let mut before = self.refused.write().unwrap_or_else(PoisonError::into_inner);
        let mut now: BTreeMap<Key, String> = before.clone();
        now.retain(|key, _| key.protocol != protocol);
        now.extend(
            refused
                .into_iter()
                .map(|(port, why)| (Key { port, protocol }, why)),
        );
        for (Key { port, .. }, why) in now.iter().filter(|(key, why)| before.get(key) != Some(why)) {
            tracing::warn!(port, ?protocol, "a route cannot be served: {why}");
        }
        self.metrics.refused_routes(now.len());
        *before = now;
    }

    /// The services that routes lead to.
    pub fn services(&self) -> Vec<Arc<Service>> {
        self.now().services.values().cloned().collect()
    }

    /// These are the routes from now on; says whether anything changed. Services that stay keep their backends.
    pub fn set_routes(&self, mut routes: Vec<Route>) -> bool {
        // Of two routes for the same place the older one counts, whatever the order of the list.
        routes.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        let old = self.now();
        if old.known && old.routes == routes {
            return false;
        }
        let mut services: BTreeMap<String, Arc<Service>> = BTreeMap::new();
        for route in &routes {
            let known = || old.services.get(&route.service).cloned();
            let service = || known().unwrap_or_else(|| Arc::new(Service::new(&route.service)));
            services.entry(route.service.clone()).or_insert_with(service);
        }
        let table = Table::new(
            routes
                .iter()
                .filter(|route| route.kind == RouteKind::Http)
                .map(|route| {
                    let target = Target {
                        service: Arc::clone(&services[&route.service]),
                        leader: route.leader,
                        sticky: route.sticky,
                        disable_keep_alives: route.disable_keep_alives,
                    };
                    (route.domain.as_str(), route.path.as_str(), target)
                }),
        );
        self.certificates.set(&routes);
        self.metrics.routes(routes.len());
        let now = Arc::new(Now {
            known: true,
            routes,
            table,
            services,
        });
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = now;
        self.changed.notify_one();
        true
    }

    /// These are a service's instances from now on, and `lost` the addresses of those that died of late.
    pub fn set_instances(
        &self,
        service: &Service,
        instances: Vec<flynn_api::discovery::Instance>,
        leader: Option<String>,
        lost: BTreeSet<String>,
    ) {
        service.set(instances, leader, lost, &self.cookie_key);
        self.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::default_certificate;

    fn router() -> Router {
        let dir = tempfile::tempdir().unwrap();
        let default = default_certificate(dir.path(), None).unwrap();
        Router::new(Arc::new(Certificates::new(&default).unwrap()), "key".into())
    }

    fn route(domain: &str, service: &str) -> Route {
        Route {
            domain: domain.into(),
            path: "/".into(),
            service: service.into(),
            ..Route::default()
        }
    }

    #[test]
    fn a_service_that_fails_takes_nobody_elses_retries() {
        let router = router();
        router.set_routes(vec![route("a.test", "a"), route("b.test", "b")]);
        let budget = |host: &str| router.find(host, "/").unwrap().service;
        while budget("a.test").budget.withdraw() {}
        assert!(budget("b.test").budget.withdraw());
        // Nor does it get new ones by other routes' changes.
        router.set_routes(vec![route("a.test", "a")]);
        assert!(!budget("a.test").budget.withdraw());
    }
}
