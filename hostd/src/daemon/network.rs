//! The host's part of the cluster's network, once there is one.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use flynn_api::host::{EndpointStatus, NetworkConfig, NetworkStatus};
use flynn_api::{Error, Result};
use flynn_overlay::{Allocator, Attachment};
use rustix::mount::MountFlags;

/// The file system of pinned programs.
const BPF: &str = "/sys/fs/bpf";

/// Its mark.
const BPF_MAGIC: i64 = 0xcafe_4a11;

/// Where programs and maps are pinned.
const PINS: &str = "/sys/fs/bpf/flynn";

/// The network when it is up, and nothing before.
#[derive(Default)]
pub(super) struct Networking {
    up: Mutex<Option<Arc<Up>>>,
    /// One change at a time.
    changing: tokio::sync::Mutex<()>,
}

/// A network that is up.
pub(super) struct Up {
    config: NetworkConfig,
    network: flynn_overlay::Network,
    addresses: Mutex<Allocator>,
}

impl Networking {
    /// The network, or an error that says what to do.
    pub(super) fn get(&self) -> Result<Arc<Up>> {
        self.peek().ok_or_else(|| {
            Error::unavailable(
                "this host has no cluster network yet: run flynn-host bootstrap or flynn-host join, or start the job \
                 in the host's network",
            )
        })
    }

    /// The network if it is up.
    pub(super) fn peek(&self) -> Option<Arc<Up>> {
        self.up.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The gateway address of this host's containers.
    pub(super) fn gateway(&self) -> Option<Ipv4Addr> {
        self.peek().map(|up| up.network.gateway())
    }

    /// Brings the network up; `in_use` are the addresses of jobs that run, `lately` those of jobs that ran: others may
    /// still take them for what they were. Whether it was down before.
    pub(super) async fn configure(
        &self,
        config: &NetworkConfig,
        in_use: &[Ipv4Addr],
        lately: &[Ipv4Addr],
    ) -> Result<bool> {
        let _changing = self.changing.lock().await;
        if let Some(up) = self.peek() {
            if up.config == *config {
                return Ok(false);
            }
            return Err(Error::conflict(format!(
                "this host's network is {} already; it can only change when no job has an address of it and the \
                 daemon is started anew",
                up.config.subnet
            )));
        }
        let parse = |field: &str, text: &str| {
            text.parse()
                .map_err(|error| Error::invalid_field(field, format!("{text:?}: {error}")))
        };
        let wanted = flynn_overlay::NetworkConfig {
            cluster: parse("network", &config.network)?,
            cluster6: Some(flynn_overlay::NetworkConfig::DEFAULT_CLUSTER6),
            subnet: parse("subnet", &config.subnet)?,
            pins: PathBuf::from(PINS),
            uplink: None,
            address: None,
        };
        let subnet = wanted.subnet;
        mount_bpf().map_err(|error| Error::internal(format!("cannot mount {BPF}: {error}")))?;
        let network = flynn_overlay::Network::up(wanted)
            .await
            .map_err(failed("bring the cluster network up"))?;
        // What the kernel still has of jobs that are gone goes; what jobs miss is put back.
        network
            .reconcile(
                &in_use
                    .iter()
                    .map(|&address| (address, Attachment::default()))
                    .collect(),
            )
            .await
            .map_err(failed("compare the network with the jobs"))?;
        let mut addresses = Allocator::new(subnet, in_use.iter().copied());
        addresses.rest(lately.iter().copied());
        let addresses = Mutex::new(addresses);
        let up = Arc::new(Up {
            config: config.clone(),
            network,
            addresses,
        });
        *self.up.lock().unwrap_or_else(PoisonError::into_inner) = Some(up);
        Ok(true)
    }

    /// What `GET /host/network` shows.
    pub(super) fn status(&self, jobs: &BTreeMap<Ipv4Addr, String>) -> Result<NetworkStatus> {
        let Some(up) = self.peek() else {
            return Ok(NetworkStatus::default());
        };
        let endpoints = up.network.endpoints().map_err(failed("read the counters"))?;
        let drops = up.network.drops().map_err(failed("read the counters"))?;
        let status =
            |(container, traffic): &(flynn_overlay::Container, flynn_overlay::Traffic)| EndpointStatus {
                address: container.ipv4,
                job_id: jobs.get(&container.ipv4).cloned().unwrap_or_default(),
                tx_packets: traffic.sent_packets,
                tx_bytes: traffic.sent_bytes,
                rx_packets: traffic.received_packets,
                rx_bytes: traffic.received_bytes,
            };
        Ok(NetworkStatus {
            subnet: up.config.subnet.clone(),
            gateway: Some(up.network.gateway()),
            endpoints: endpoints.iter().map(status).collect(),
            drops: drops
                .into_iter()
                .map(|(reason, count)| (reason.name().to_owned(), count))
                .collect(),
        })
    }
}

impl Up {
    /// The host's subnet.
    pub(super) fn subnet(&self) -> &str {
        &self.config.subnet
    }

    /// The gateway address.
    pub(super) fn gateway(&self) -> Ipv4Addr {
        self.network.gateway()
    }

    /// An address that nobody has.
    pub(super) fn allocate(&self) -> Result<Ipv4Addr> {
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        addresses.allocate().ok_or_else(|| {
            let mut error = Error::new(
                flynn_api::ErrorCode::LimitExceeded,
                format!(
                    "all addresses of {} are taken: place the job on another host",
                    self.config.subnet
                ),
            );
            error.retry = true;
            error
        })
    }

    /// Plumbs the network namespace of a process.
    pub(super) async fn attach(&self, pid: i32, address: Ipv4Addr) -> Result<()> {
        let namespace = File::open(format!("/proc/{pid}/ns/net"))
            .map_err(|error| Error::internal(format!("cannot open the job's network namespace: {error}")))?;
        self.network
            .attach(namespace.as_fd(), address, &Attachment::default())
            .await
            .map_err(failed("attach the job to the network"))?;
        Ok(())
    }

    /// Takes an address back.
    pub(super) async fn detach(&self, address: Ipv4Addr) {
        if let Err(error) = self.network.detach(address).await {
            tracing::warn!(%address, %error, "cannot detach");
        }
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .release(address);
    }
}

/// Makes the place where programs are pinned, which jobs of the platform that have programs of their own mount.
pub(super) fn make_pins() -> std::io::Result<()> {
    mount_bpf()?;
    std::fs::create_dir_all(PINS)
}

/// Most init systems have mounted it; a machine without one gets it here.
fn mount_bpf() -> std::io::Result<()> {
    if rustix::fs::statfs(BPF)?.f_type == BPF_MAGIC {
        return Ok(());
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(rustix::mount::mount("bpf", BPF, "bpf", flags, Some(c"mode=700"))?)
}

fn failed(what: &str) -> impl Fn(flynn_overlay::Error) -> Error + '_ {
    move |error| Error::internal(format!("cannot {what}: {error}"))
}
