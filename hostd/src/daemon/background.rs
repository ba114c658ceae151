//! The daemon's loops: what it does without being asked.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::network::follow;
use super::{Daemon, layers, register, renewal, services, usage};
use crate::{apparmor, floating};

/// Between attempts to bring the network up.
const NETWORK_RETRY: Duration = Duration::from_secs(5);

/// How often the profile of AppArmor is looked for.
const PROFILE_CHECK: Duration = Duration::from_secs(10);

/// The loops, which run until they are stopped.
#[derive(Debug)]
pub(super) struct Background {
    tasks: JoinSet<()>,
    /// The thread of floating addresses, and what has it leave them.
    floating: (CancellationToken, JoinHandle<()>),
}

impl Background {
    pub(super) fn start(daemon: &Arc<Daemon>) -> Self {
        let mut tasks = JoinSet::new();
        tasks.spawn(register::run(Arc::clone(daemon)));
        tasks.spawn(keep_network(Arc::clone(daemon)));
        tasks.spawn(follow::run(Arc::clone(daemon)));
        tasks.spawn(follow_floating(Arc::clone(daemon)));
        tasks.spawn(services::run(Arc::clone(daemon)));
        tasks.spawn(renewal::keep(Arc::clone(daemon)));
        tasks.spawn(layers::keep_room(Arc::clone(daemon)));
        tasks.spawn(usage::watch(Arc::clone(daemon)));
        if daemon.apparmor {
            tasks.spawn(keep_profile());
        }
        Self {
            tasks,
            floating: hold_floating(daemon),
        }
    }

    /// Ends them all: a successor may begin.
    pub(super) async fn stop(mut self, daemon: &Daemon) {
        self.tasks.shutdown().await;
        daemon.services.end();
        // A successor goes on from where each has got to.
        if let Ok(sinks) = daemon.sinks() {
            sinks.shut_down().await;
        }
        let (leave, thread) = self.floating;
        leave.cancel();
        let ended = tokio::task::spawn_blocking(|| thread.join()).await;
        if !matches!(ended, Ok(Ok(()))) {
            tracing::error!("the thread of floating addresses is dead");
        }
    }
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

/// A start sees to the profile itself; a supervisor that starts its job again cannot.
async fn keep_profile() {
    loop {
        sleep(PROFILE_CHECK).await;
        if let Err(error) = apparmor::keep() {
            tracing::error!(%error, "jobs cannot be started again without their AppArmor profile");
        }
    }
}

/// Holds this host's share of the floating addresses, until there are none any more.
fn hold_floating(daemon: &Daemon) -> (CancellationToken, JoinHandle<()>) {
    let receiver = daemon.floating_settings.subscribe();
    let (id, address, held) = (
        daemon.host_id.clone(),
        daemon.config().address,
        daemon.floating.clone(),
    );
    let leave = CancellationToken::new();
    let left = leave.clone();
    let thread = std::thread::spawn(move || {
        if let Err(error) = floating::run(&id, address, receiver, &held, &left) {
            tracing::error!(%error, "floating addresses are left to other hosts");
        }
    });
    (leave, thread)
}

async fn follow_floating(daemon: Arc<Daemon>) {
    floating::follow(
        daemon.paths.state(),
        || daemon.discovery(),
        &daemon.floating_settings,
    )
    .await;
}
