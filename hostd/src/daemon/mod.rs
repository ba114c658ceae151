//! The daemon: `flynn-host daemon`.
//!
//! It holds nothing that is not on the disk or in the supervisors, so that it can be killed at any moment.

mod adopt;
mod api;
mod attached;
mod background;
mod exe;
mod gate;
mod handover;
mod ids;
mod images;
mod keep;
mod layers;
mod limits;
mod network;
mod notify;
mod pass_on;
mod register;
mod renewal;
mod serve;
mod services;
mod sinks;
mod spares;
mod start;
mod store;
mod table;
mod transfer;
mod update;
mod usage;
mod volumes;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::Held;
use flynn_api::host::{HostStatus, NetworkConfig};
use flynn_api::server::{disk, shutdown};
use flynn_api::tls::Live;
use flynn_api::{Error, Result};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::task::TaskTracker;

use self::exe::Executable;
use self::gate::Gate;
use self::handover::{Predecessor, Sockets};
use self::network::Networking;
use self::network::documents::Documents;
use self::serve::{Connections, Outcome};
use self::spares::Spares;
use self::table::Table;
use crate::apparmor::Apparmor;
use crate::cgroup::Hierarchies;
use crate::config::{HostConfig, Overrides};
use crate::files::disk_error;
use crate::identities;
use crate::layers::{Mounts, Store};
use crate::logs::sink::Sinks;
use crate::paths::Paths;
use crate::prepare;
use crate::status::boot_id;
use crate::volumes::Volumes;

/// Jobs that are prepared and started at once. Most of a start is waiting for the kernel, which waits for all CPUs; those who
/// wait together wait once.
const STARTS: usize = 16;

/// How the daemon is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// The state directory.
    pub state: PathBuf,
    /// What the command line says about the host.
    pub overrides: Overrides,
    /// Take the work of the daemon over that has started this one, and is at the other end of standard input.
    pub takeover: bool,
}

/// The daemon's state.
struct Daemon {
    paths: Paths,
    host_id: String,
    config: Mutex<HostConfig>,
    table: Table,
    store: Store,
    mounts: Mutex<Mounts>,
    collected: layers::Counters,
    volumes: Volumes,
    ids: ids::Ids,
    /// Whether jobs can be confined by it.
    apparmor: bool,
    network: Networking,
    documents: Documents,
    services: services::Asking,
    /// Once their list was read.
    sinks: std::sync::OnceLock<Sinks>,
    /// Once the host has a certificate.
    discovery: Mutex<Option<DiscoveryClient>>,
    hierarchies: Hierarchies,
    executable: Executable,
    spares: Spares,
    starts: Semaphore,
    /// Who may act.
    gate: Gate,
    /// Attached clients and programs beside a job's own: connections that are no requests any more.
    sessions: TaskTracker,
    /// Wishes for another program.
    updates: mpsc::Sender<update::Wish>,
    /// The identity that the host API is served with, once it is.
    serving: Mutex<Option<Arc<Live>>>,
    /// What is held here, of certificates and trust.
    held: Mutex<Option<Held>>,
    /// Held while limits of a job are changed.
    limits: Mutex<()>,
    /// Held while a certificate is asked for.
    signing: tokio::sync::Mutex<()>,
    /// What this host cannot do, and what was found broken.
    notices: Mutex<Vec<String>>,
    /// What the kernel has of what the network and containers make use of.
    features: Vec<flynn_api::host::KernelFeature>,
    /// The floating addresses that are here.
    floating: crate::floating::Held,
    /// Those that there are, and who takes part.
    floating_settings: tokio::sync::watch::Sender<Option<crate::floating::Settings>>,
}

pub use crate::sys::share_heaps;

/// Runs the daemon until it is told to stop, or another has taken over. Jobs go on.
pub async fn run(options: Options) -> anyhow::Result<()> {
    use anyhow::Context;
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "the daemon makes namespaces, mounts and cgroups, which only root may: run it as root"
    );
    let paths = Paths::create(&options.state)
        .with_context(|| format!("cannot use the state directory {}", options.state.display()))?;
    let executable = Executable::own().context("cannot open this program's own file")?;
    let (mut predecessor, sockets) = if options.takeover {
        let (predecessor, sockets) = Predecessor::meet().await?;
        let mut ready = look(&paths, &options.overrides);
        if ready.is_ok() {
            ready = predecessor.wait_for_commit().await;
        }
        if let Err(error) = ready {
            predecessor.failed(&error).await;
            return Err(error);
        }
        (Some(predecessor), sockets)
    } else {
        (None, Sockets::open(paths.state())?)
    };
    let stop = shutdown();
    let mut connections = Connections::new();
    let (wishes, mut updates) = mpsc::channel(1);
    loop {
        let daemon = match Daemon::open(&paths, &options.overrides, executable.clone(), wishes.clone()).await
        {
            Ok(daemon) => daemon,
            Err(error) => {
                if let Some(predecessor) = predecessor {
                    predecessor.failed(&error).await;
                }
                return Err(error);
            }
        };
        let served = serve::run(
            &daemon,
            &sockets,
            &mut updates,
            &mut connections,
            predecessor.take(),
            &stop,
        );
        match served.await? {
            Outcome::Stopped => return Ok(()),
            Outcome::HandedOver(successor) => {
                // Who asked for another update meanwhile hears that this one was under way.
                drop(updates);
                sockets.close();
                serve::linger(&daemon, successor, connections, &stop).await;
                return Ok(());
            }
            Outcome::Anew => {}
        }
    }
}

/// Reads all that is there, and changes nothing: whether this version could take it over.
fn look(paths: &Paths, overrides: &Overrides) -> anyhow::Result<()> {
    use anyhow::Context;
    HostConfig::load(paths.state(), overrides)?;
    Hierarchies::find().context("cannot find the cgroup hierarchies")?;
    Documents::open(&paths.network()).context("cannot use the cluster network's documents")?;
    store::look(paths).context("this version cannot read the jobs that are here")
}

impl Daemon {
    /// Takes up what is on the disk and in the kernel.
    async fn open(
        paths: &Paths,
        overrides: &Overrides,
        executable: Executable,
        updates: mpsc::Sender<update::Wish>,
    ) -> anyhow::Result<Arc<Self>> {
        use anyhow::Context;
        let config = HostConfig::load(paths.state(), overrides)?;
        let hierarchies = Hierarchies::find().context("cannot find the cgroup hierarchies")?;
        crate::cgroup::prepare(&hierarchies).context("cannot make the cgroup flynn")?;
        let mut notices = hierarchies.notices();
        notices.extend(crate::notices::of_kernel());
        let (mut features, missed) = crate::notices::of_network();
        notices.extend(missed);
        let ids = ids::Ids::probe(&executable).await;
        features.push(ids.feature());
        notices.extend(ids.notice());
        let apparmor = tokio::task::block_in_place(Apparmor::load);
        features.push(apparmor.feature());
        notices.extend(apparmor.notice());
        if let Err(error) = network::make_pins() {
            let notice = format!(
                "there is no place for eBPF programs, without which the router does not start: {error}"
            );
            tracing::error!("{notice}");
            notices.push(notice);
        }
        let (stored, broken) = store::load(paths).context("cannot read the jobs")?;
        for notice in &broken {
            tracing::error!("{notice}");
        }
        notices.extend(broken);
        let daemon = Arc::new(Self {
            host_id: config.id.clone(),
            table: Table::new(&config.id),
            store: Store::open(paths)?,
            config: Mutex::new(config),
            mounts: Mutex::default(),
            collected: layers::Counters::default(),
            volumes: Volumes::open(paths).context("cannot use the volumes")?,
            network: Networking::default(),
            services: services::Asking::default(),
            sinks: std::sync::OnceLock::new(),
            discovery: Mutex::default(),
            documents: Documents::open(&paths.network())
                .context("cannot use the cluster network's documents")?,
            hierarchies,
            ids,
            apparmor: apparmor == Apparmor::Loaded,
            executable,
            spares: Spares::default(),
            starts: Semaphore::new(STARTS),
            gate: Gate::default(),
            sessions: TaskTracker::new(),
            updates,
            serving: Mutex::default(),
            held: Mutex::default(),
            limits: Mutex::default(),
            signing: tokio::sync::Mutex::default(),
            notices: Mutex::new(notices),
            features,
            floating: crate::floating::Held::default(),
            floating_settings: tokio::sync::watch::Sender::new(None),
            paths: paths.clone(),
        });
        daemon.restore_network(&stored).await;
        // Before anything is forgotten that they have yet to take.
        daemon.start_sinks();
        daemon.adopt(stored);
        daemon
            .mounts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .sweep()?;
        let sweeping = Arc::clone(&daemon);
        let pass = daemon.gate.beside("removing what is left of volumes");
        // What a crash has left can be large.
        tokio::task::spawn_blocking(move || {
            let _pass = pass;
            sweeping.volumes.sweep();
        });
        Ok(daemon)
    }

    fn config(&self) -> HostConfig {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what the host knows of itself, on the disk first.
    fn configure(&self, what: &str, change: impl FnOnce(&mut HostConfig)) -> Result<()> {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = config.clone();
        change(&mut changed);
        changed
            .save(self.paths.state())
            .map_err(|error| disk_error(what, &error))?;
        *config = changed;
        Ok(())
    }

    /// Has something done to its end, whether or not whoever has asked for it goes away.
    async fn to_the_end<T: Send + 'static>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let pass = self.gate.beside(what);
        let done = tokio::spawn(async move {
            let _pass = pass;
            work.await
        });
        done.await
            .map_err(|error| Error::internal(format!("{what} was cut off: {error}")))?
    }

    fn as_host(&self) -> prepare::Host<'_> {
        prepare::Host {
            id: &self.host_id,
            address: self.config().address,
        }
    }

    /// Brings the network up that this host had before. A failure is said, and tried again later; jobs
    /// in the host's network start without.
    async fn restore_network(&self, stored: &[store::Stored]) {
        let Some(config) = self.config().network else {
            return;
        };
        let boot = boot_id();
        let runs = |stored: &&store::Stored| {
            stored.status.boot_id == boot
                && stored
                    .status
                    .supervisor
                    .is_some_and(crate::status::ProcessId::is_alive)
        };
        let (running, ended): (Vec<_>, Vec<_>) = stored.iter().partition(runs);
        let in_use = running
            .into_iter()
            .filter_map(|stored| Some((stored.status.address?, self.known_attached(&stored.job))))
            .collect();
        let lately: Vec<Ipv4Addr> = ended
            .into_iter()
            .filter_map(|stored| stored.status.address)
            .collect();
        if let Err(error) = self.bring_up(&config, in_use, &lately).await {
            tracing::error!(%error, "the network is not up");
            self.notice(format!("the network is not up: {error}"));
        }
    }

    /// Brings the network up, with all that the cluster is known to have agreed on. Whether it was down before.
    async fn bring_up(
        &self,
        config: &NetworkConfig,
        in_use: BTreeMap<Ipv4Addr, network::Attached>,
        lately: &[Ipv4Addr],
    ) -> Result<bool> {
        let host = self.config();
        let direct = self.is_direct();
        let encryption = crate::encryption::wanted(host.encryption, direct, &self.paths.wireguard_key())
            .map_err(|error| disk_error("use this host's key for WireGuard", &error))?;
        let changed = self
            .network
            .configure(config, host.address, in_use, lately, encryption)
            .await?;
        if changed
            && let Some(up) = self.network.peek()
            && let Err(error) = self.apply_documents(&up).await
        {
            // The loop that follows the documents tries on.
            tracing::error!(%error, "the data plane does not take what the cluster says");
        }
        if changed {
            self.warn_of_plain_traffic();
        }
        Ok(changed)
    }

    fn notice(&self, notice: String) {
        self.notices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(notice);
    }

    /// Brings the network up, remembers it, and tells those who wait for it.
    async fn configure_network(&self, wanted: NetworkConfig) -> Result<()> {
        let attachment = |(address, id): (Ipv4Addr, String)| {
            let entry = self.table.get(&id)?;
            Some((address, self.known_attached(&entry.job)))
        };
        let in_use = self.table.addresses().into_iter().filter_map(attachment);
        let came_up = self.bring_up(&wanted, in_use.collect(), &[]).await?;
        // It may have come up before, and the disk been full.
        if self.config().network.as_ref() != Some(&wanted) {
            self.configure("remember the network", |config| config.network = Some(wanted))?;
        }
        if came_up {
            self.notices
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .retain(|notice| !notice.starts_with("the network is not up"));
            self.announce_gateway().await;
        }
        Ok(())
    }

    fn notices(&self) -> Vec<String> {
        let mut notices = self
            .notices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        notices.extend(self.lost_lease());
        notices.extend(self.volumes.notices());
        notices.extend(self.damaged_layers());
        notices.extend(self.plain_traffic());
        notices.extend(identities::warnings(self.paths.state(), jiff::Timestamp::now()));
        notices
    }

    fn status(&self) -> Result<HostStatus> {
        let config = self.config();
        let (disk_free, _) = disk::space(self.paths.state())
            .map_err(|error| Error::internal(format!("cannot look at the disk: {error}")))?;
        let up = self.network.peek();
        let (cpu, memory) = crate::notices::machine();
        Ok(HostStatus {
            id: config.id,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            url: format!("{}:{}", config.address, flynn_api::host::PORT),
            tags: config.tags,
            draining: config.draining,
            subnet: up.as_ref().map(|up| up.subnet().to_owned()),
            gateway: up.as_ref().map(|up| up.gateway()),
            cpu,
            memory,
            disk_free,
            notices: self.notices(),
            features: self.features.clone(),
            boot_id: boot_id(),
        })
    }
}
