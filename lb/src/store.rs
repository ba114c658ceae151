//! The last good state on disk: from it the router serves at once when it starts, and for ever when those who tell
//! it are away.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use flynn_api::discovery::Instance;
use flynn_api::route::Route;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::files;
use crate::router::Router;

/// The version of the format. Others are not read: the state is fetched anew.
const VERSION: u32 = 1;
/// How long changes are gathered before they are written.
const GATHER: Duration = Duration::from_millis(250);

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Saved {
    version: u32,
    routes: Vec<Route>,
    services: BTreeMap<String, SavedService>,
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct SavedService {
    instances: Vec<Instance>,
    #[serde(default)]
    leader: Option<String>,
}

/// The file.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    /// Something has changed.
    pub dirty: Notify,
}

impl Store {
    /// In this directory.
    pub fn new(dir: &Path) -> Self {
        Self {
            path: dir.join("state.json"),
            dirty: Notify::new(),
        }
    }

    /// Gives the router what was saved; a file that is missing or cannot be read is as good as none.
    pub fn load(&self, router: &Router) {
        let saved = match std::fs::read(&self.path) {
            Ok(bytes) => serde_json::from_slice::<Saved>(&bytes),
            Err(_) => return,
        };
        let saved = match saved {
            Ok(saved) if saved.version == VERSION => saved,
            Ok(saved) => {
                return tracing::warn!(version = saved.version, "the saved state has another format");
            }
            // The error's text may quote a key.
            Err(_) => return tracing::warn!("the saved state cannot be read; waiting for the controller"),
        };
        router.set_routes(saved.routes);
        let mut services = saved.services;
        for service in router.services() {
            if let Some(saved) = services.remove(&service.name) {
                router.set_instances(&service, saved.instances, saved.leader, BTreeSet::new());
            }
        }
        tracing::info!(routes = router.routes().len(), "serving from the saved state");
    }

    fn save(&self, router: &Router) -> anyhow::Result<()> {
        let services = router.services().into_iter().filter_map(|service| {
            let members = service.members();
            // One that nobody has told of would be read as one without instances.
            members.known.then(|| {
                let saved = SavedService {
                    instances: members.instances.clone(),
                    leader: members.leader.clone(),
                };
                (service.name.clone(), saved)
            })
        });
        let saved = Saved {
            version: VERSION,
            routes: router.routes(),
            services: services.collect(),
        };
        files::write(&self.path, &serde_json::to_vec(&saved)?)
    }

    /// Saves whenever something has changed, for ever. What cannot be written is tried again with the next change.
    pub async fn keep(self: Arc<Self>, router: Arc<Router>) {
        loop {
            self.dirty.notified().await;
            tokio::time::sleep(GATHER).await;
            let (store, router) = (Arc::clone(&self), Arc::clone(&router));
            let saved = tokio::task::spawn_blocking(move || store.save(&router)).await;
            if let Ok(Err(why)) = saved {
                tracing::warn!("the state cannot be saved; a restart would serve an older one: {why:#}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::{Certificates, default_certificate};
    use std::os::unix::fs::PermissionsExt as _;

    fn router(dir: &Path) -> Router {
        let default = default_certificate(dir, None).unwrap();
        Router::new(Arc::new(Certificates::new(&default).unwrap()), "key".into())
    }

    #[test]
    fn what_is_saved_is_served_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let first = router(dir.path());
        let route = |domain: &str| Route {
            domain: domain.into(),
            path: "/".into(),
            service: "web".into(),
            ..Route::default()
        };
        let unknown = Route {
            service: "unknown".into(),
            ..route("b.test")
        };
        first.set_routes(vec![route("a.test"), unknown]);
        let instance = Instance::new("http", "10.0.0.1:80", flynn_api::Meta::new());
        first.set_instances(
            &first.find("a.test", "/").unwrap().service,
            vec![instance.clone()],
            Some(instance.id.clone()),
            BTreeSet::new(),
        );
        store.save(&first).unwrap();
        let mode = std::fs::metadata(&store.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "there are keys in it");

        let second = router(dir.path());
        store.load(&second);
        let target = second.find("a.test", "/").unwrap();
        assert_eq!(target.service.members().backends(true).len(), 1);
        let unknown = second.find("b.test", "/").unwrap().service;
        assert!(!unknown.members().known, "nobody has ever told of it");

        std::fs::write(&store.path, &std::fs::read(&store.path).unwrap()[..40]).unwrap();
        let third = router(dir.path());
        store.load(&third);
        assert!(
            third.find("a.test", "/").is_none(),
            "a file that is cut short is as good as none"
        );
    }
}
