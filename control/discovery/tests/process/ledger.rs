//! What was written and acknowledged, and what must therefore be read.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{ServiceConfig, ServiceMeta};
use serde_json::json;

use crate::common::eventually;

/// Counters, each the metadata of a service, written by one writer each. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Ledger {
    counters: Arc<Mutex<BTreeMap<String, Counter>>>,
    /// Bytes that are written along with a count.
    padding: usize,
}

#[derive(Clone, Copy, Default)]
struct Counter {
    acknowledged: u64,
    /// May be there: its writer had no answer.
    tried: u64,
}

/// Writers at work.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    writers: Vec<tokio::task::JoinHandle<()>>,
}

impl Ledger {
    /// With so many bytes beside each count.
    pub(crate) fn padded(padding: usize) -> Self {
        Self {
            padding,
            ..Self::default()
        }
    }

    fn counters(&self) -> MutexGuard<'_, BTreeMap<String, Counter>> {
        self.counters.lock().unwrap()
    }

    /// Writes that were acknowledged.
    pub(crate) fn total(&self) -> u64 {
        self.counters().values().map(|counter| counter.acknowledged).sum()
    }

    /// Makes counters, which may have to wait.
    pub(crate) async fn create(&self, client: &DiscoveryClient, count: usize) {
        eventually("counters", async || self.try_create(client, count).await.ok()).await;
    }

    /// Makes counters.
    pub(crate) async fn try_create(&self, client: &DiscoveryClient, count: usize) -> flynn_api::Result<()> {
        for number in 0..count {
            let service = format!("w{number}");
            client.ensure_service(&service, &ServiceConfig::default()).await?;
            self.counters().entry(service).or_default();
        }
        Ok(())
    }

    /// Reads `service`, which must be what was acknowledged.
    async fn read(&self, client: &DiscoveryClient, service: &str) -> flynn_api::Result<(u64, u64)> {
        let meta = client.find_meta(service).await?;
        let (n, index) = meta.map_or((0, 0), |meta| (meta.data["n"].as_u64().unwrap(), meta.index));
        let mut counters = self.counters();
        let counter = counters.get_mut(service).unwrap();
        assert!(
            (counter.acknowledged..=counter.tried.max(counter.acknowledged)).contains(&n),
            "{service} is at {n}; {} was acknowledged, {} was tried",
            counter.acknowledged,
            counter.tried
        );
        // What was read must be read ever after.
        counter.acknowledged = n;
        Ok((n, index))
    }

    /// Adds one to `service`.
    pub(crate) async fn write(&self, client: &DiscoveryClient, service: &str) -> flynn_api::Result<()> {
        let (n, index) = self.read(client, service).await?;
        self.counters().get_mut(service).unwrap().tried = n + 1;
        let meta = ServiceMeta {
            data: json!({"n": n + 1, "padding": "x".repeat(self.padding)}),
            index,
            leader_id: None,
        };
        client.set_meta(service, &meta).await?;
        self.counters().get_mut(service).unwrap().acknowledged = n + 1;
        Ok(())
    }

    /// Reads all of them and writes all of them, which may have to wait.
    pub(crate) async fn check(&self, client: &DiscoveryClient) {
        let services: Vec<String> = self.counters().keys().cloned().collect();
        for service in services {
            eventually("a read", async || self.read(client, &service).await.ok()).await;
            eventually("a write", async || self.write(client, &service).await.ok()).await;
        }
    }

    /// Writes until it is stopped, whatever happens to those who are asked; each writer asks one of `clients`.
    pub(crate) fn load(&self, clients: &[DiscoveryClient]) -> Load {
        let stop = Arc::<AtomicBool>::default();
        let services: Vec<String> = self.counters().keys().cloned().collect();
        let writers = services
            .into_iter()
            .zip(clients.iter().cycle())
            .map(|(service, client)| {
                let (ledger, client, stop) = (self.clone(), client.clone(), Arc::clone(&stop));
                tokio::spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        if ledger.write(&client, &service).await.is_err() {
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                    }
                })
            });
        Load {
            writers: writers.collect(),
            stop,
        }
    }
}

impl Load {
    /// Stops and waits until nobody writes any more.
    pub(crate) async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.unwrap();
        }
    }
}
