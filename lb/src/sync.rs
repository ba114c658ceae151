//! Follows the controller's routes and discoverd's instances. What is known stays until something else is known:
//! nobody's absence changes anything.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flynn_api::Result;
use flynn_api::client::Retry;
use flynn_api::client::controller::{ControllerClient, EventFilter};
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{EventKind, Instance};
use futures::StreamExt as _;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::backend::Service;
use crate::l4::plan::DRAIN;
use crate::router::Router;
use crate::store::Store;

/// Between lists when nothing happens.
const LIST: Duration = Duration::from_mins(1);
/// How long events are gathered before the list is read.
const GATHER: Duration = Duration::from_millis(20);
/// Between looks at connections that nobody uses any more.
const TIDY: Duration = Duration::from_secs(10);

/// Who is followed, and who is told.
#[derive(Debug)]
pub struct Sync {
    /// What is told.
    pub router: Arc<Router>,
    /// What keeps it.
    pub store: Arc<Store>,
    /// Where services are found.
    pub discovery: DiscoveryClient,
    /// A key of the controller.
    pub controller_key: String,
    /// Routes have changed.
    pub routes_changed: Notify,
}

impl Sync {
    /// Follows the routes, for ever. Events are a wake-up, nothing more: the list is read anew.
    pub async fn follow_routes(self: Arc<Self>) {
        let (mut attempt, mut retry) = (0, Retry::default());
        loop {
            attempt += 1;
            if let Err(error) = self.follow_controller(attempt, &mut retry).await {
                tracing::warn!(%error, "the controller cannot be followed; the routes stay as they are");
            }
            retry.wait().await;
        }
    }

    async fn follow_controller(&self, attempt: usize, retry: &mut Retry) -> Result<()> {
        let client = ControllerClient::discover(&self.discovery, &self.controller_key, attempt).await?;
        let filter = EventFilter {
            object_types: vec!["route", "route_deletion"],
            ..EventFilter::default()
        };
        let mut events = client.event_stream(&filter, None).await?;
        loop {
            if self.router.set_routes(client.all_routes().await?) {
                tracing::info!(routes = self.router.routes().len(), "the routes have changed");
                self.routes_changed.notify_one();
                self.store.dirty.notify_one();
            }
            retry.reset();
            match tokio::time::timeout(LIST, events.next()).await {
                Ok(Some(event)) => drop(event?),
                Ok(None) => return Ok(()),
                Err(_) => continue,
            }
            tokio::time::sleep(GATHER).await;
        }
    }

    /// Follows the instances of each service that a route leads to, for ever.
    pub async fn follow_services(self: Arc<Self>) {
        let mut followers: Vec<Follower> = Vec::new();
        loop {
            let services = self.router.services();
            // One that was without routes for a moment has come back as another.
            followers.retain(|follower| services.iter().any(|service| follower.is_of(service)));
            for service in &services {
                if !followers.iter().any(|follower| follower.is_of(service)) {
                    let task = tokio::spawn(Arc::clone(&self).follow_service(Arc::clone(service)));
                    followers.push(Follower {
                        service: Arc::clone(service),
                        task,
                    });
                }
            }
            tokio::select! {
                () = self.routes_changed.notified() => {}
                () = tokio::time::sleep(TIDY) => {
                    for service in &services {
                        service.members().backends(false).iter().for_each(|backend| backend.tidy());
                    }
                }
            }
        }
    }

    async fn follow_service(self: Arc<Self>, service: Arc<Service>) {
        let mut retry = Retry::default();
        loop {
            if let Err(error) = self.follow_instances(&service, &mut retry).await {
                tracing::debug!(%error, service = service.name, "instances cannot be followed; they stay as they are");
            }
            retry.wait().await;
        }
    }

    async fn follow_instances(&self, service: &Service, retry: &mut Retry) -> Result<()> {
        let mut events = self.discovery.watch(&service.name).await?;
        let mut instances: BTreeMap<String, Instance> = BTreeMap::new();
        let mut lost: BTreeMap<String, Instant> = BTreeMap::new();
        let (mut leader, mut current) = (None, false);
        while let Some(event) = events.next().await {
            let (_, event) = event?;
            match (event.kind, event.instance) {
                (EventKind::Up | EventKind::Update, Some(instance)) => {
                    lost.remove(&instance.addr);
                    instances.insert(instance.id.clone(), instance);
                }
                (EventKind::Down, Some(instance)) => {
                    instances.remove(&instance.id);
                    if event.expired {
                        lost.retain(|_, since| since.elapsed() < DRAIN);
                        lost.insert(instance.addr, Instant::now());
                    }
                }
                (EventKind::Leader, instance) => leader = instance.map(|instance| instance.id),
                (EventKind::Current, _) => current = true,
                _ => continue,
            }
            // Until everything has been told, what was known before is the better knowledge.
            if current {
                retry.reset();
                self.router.set_instances(
                    service,
                    instances.values().cloned().collect(),
                    leader.clone(),
                    lost.keys().cloned().collect(),
                );
                self.store.dirty.notify_one();
            }
        }
        Ok(())
    }
}

/// Who follows a service; it ends with this.
struct Follower {
    service: Arc<Service>,
    task: JoinHandle<()>,
}

impl Follower {
    fn is_of(&self, service: &Arc<Service>) -> bool {
        Arc::ptr_eq(&self.service, service)
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}
