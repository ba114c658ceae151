//! What the tasks of the scheduler share: the pure core's state behind locks, and what wakes them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use flynn_api::client::host::HostClient;
use jiff::Timestamp;
use tokio::sync::Notify;

use crate::plan::{Desired, Plan};
use crate::report::Outbox;
use crate::view::View;

/// The state. Locks are held for a computation, never across an await.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    view: Mutex<View>,
    desired: Mutex<Desired>,
    outbox: Mutex<Outbox>,
    plan: Mutex<Plan>,
    clients: Mutex<BTreeMap<String, HostClient>>,
    /// Something is known that was not: plan anew.
    pub(crate) changed: Notify,
    /// Reports wait.
    pub(crate) reports: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is whole before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Looks at the view.
    pub(crate) fn view<T>(&self, look: impl FnOnce(&View) -> T) -> T {
        look(&lock(&self.view))
    }

    /// Changes the view, and has the plan made anew.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut View, Timestamp) -> T) -> T {
        let result = change(&mut lock(&self.view), Timestamp::now());
        self.changed.notify_one();
        result
    }

    /// Looks at what is wanted.
    pub(crate) fn desired<T>(&self, look: impl FnOnce(&Desired) -> T) -> T {
        look(&lock(&self.desired))
    }

    /// Changes what is wanted.
    pub(crate) fn want(&self, change: impl FnOnce(&mut Desired)) {
        change(&mut lock(&self.desired));
        self.changed.notify_one();
    }

    /// The reports.
    pub(crate) fn outbox<T>(&self, with: impl FnOnce(&mut Outbox) -> T) -> T {
        with(&mut lock(&self.outbox))
    }

    /// The last plan.
    pub(crate) fn plan<T>(&self, with: impl FnOnce(&mut Plan) -> T) -> T {
        with(&mut lock(&self.plan))
    }

    /// How a host is reached.
    pub(crate) fn client(&self, host: &str) -> Option<HostClient> {
        lock(&self.clients).get(host).cloned()
    }

    /// A host is reached so from now on, or not at all.
    pub(crate) fn reach(&self, host: &str, client: Option<HostClient>) {
        let mut clients = lock(&self.clients);
        match client {
            Some(client) => clients.insert(host.to_owned(), client),
            None => clients.remove(host),
        };
    }
}
