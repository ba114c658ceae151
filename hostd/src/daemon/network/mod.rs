//! The host's part of the cluster's network, once there is one.
//!
//! [`documents`] is what the cluster agreed on, as this host saw it last; [`wanted`] what follows from it for the data
//! plane; [`follow`] keeps both up to date and tells the cluster of this host's containers; [`attachment`] is what a
//! job is allowed; [`status`] shows it all, [`flows`] what goes on now.

mod attachment;
pub(super) mod documents;
mod flows;
pub(super) mod follow;
pub(super) mod metrics;
mod sockets;
mod status;
mod wanted;

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use flynn_api::host::NetworkConfig;
use flynn_api::{Error, Result};
use flynn_overlay::{Allocator, Attachment, Wireguard};
use rustix::mount::MountFlags;
use tokio::sync::Notify;

/// The file system of pinned programs.
const BPF: &str = "/sys/fs/bpf";

/// Its mark.
const BPF_MAGIC: i64 = 0xcafe_4a11;

/// Where programs and maps are pinned.
pub(super) const PINS: &str = "/sys/fs/bpf/flynn";

/// The network when it is up, and nothing before.
#[derive(Default)]
pub(super) struct Networking {
    up: Mutex<Option<Arc<Up>>>,
    /// One change at a time.
    changing: tokio::sync::Mutex<()>,
    /// A container has come or gone: the cluster must be told.
    endpoints_changed: Notify,
}

/// A network that is up.
pub(super) struct Up {
    config: NetworkConfig,
    network: flynn_overlay::Network,
    addresses: Mutex<Allocator>,
    attached: Mutex<BTreeMap<Ipv4Addr, Attached>>,
    /// What is counted of containers that are gone.
    gone: Mutex<BTreeMap<metrics::Owner, metrics::Counted>>,
}

/// A container that is attached.
#[derive(Clone, Debug)]
pub(super) struct Attached {
    attachment: Attachment,
    owner: metrics::Owner,
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
        address: Ipv4Addr,
        in_use: BTreeMap<Ipv4Addr, Attached>,
        lately: &[Ipv4Addr],
        encryption: Option<flynn_overlay::Encryption>,
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
            cluster6: Some(config.network6.parse().map_err(|error| {
                Error::invalid_field("network6", format!("{:?}: {error}", config.network6))
            })?),
            subnet: parse("subnet", &config.subnet)?,
            pins: PathBuf::from(PINS),
            uplink: None,
            address: Some(address),
            encryption,
        };
        let subnet = wanted.subnet;
        mount_bpf().map_err(|error| Error::internal(format!("cannot mount {BPF}: {error}")))?;
        let network = flynn_overlay::Network::up(wanted)
            .await
            .map_err(failed("bring the cluster network up"))?;
        // What the kernel still has of jobs that are gone goes; what jobs miss is put back.
        network
            .reconcile(&attachments(&in_use))
            .await
            .map_err(failed("compare the network with the jobs"))?;
        let mut addresses = Allocator::new(subnet, in_use.keys().copied());
        addresses.rest(lately.iter().copied());
        let addresses = Mutex::new(addresses);
        let up = Arc::new(Up {
            config: config.clone(),
            network,
            addresses,
            attached: Mutex::new(in_use),
            gone: Mutex::default(),
        });
        *self.up.lock().unwrap_or_else(PoisonError::into_inner) = Some(up);
        self.endpoints_changed.notify_one();
        Ok(true)
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

    /// What is to be said of traffic to these hosts that is not encrypted.
    fn plain_traffic(&self, wireguard: &Wireguard, hosts: &BTreeMap<&str, Ipv4Addr>) -> Vec<String> {
        let wanted = self.network.config().encryption.as_ref();
        let required = wanted.is_some_and(|wanted| wanted.required);
        crate::encryption::notices(wireguard, required, hosts, &self.network.handshakes())
    }

    /// The IPv6 address of the container that has this address, if it is one of the cluster's.
    pub(super) fn ipv6_of(&self, address: Ipv4Addr) -> Option<Ipv6Addr> {
        let config = self.network.config();
        config.cluster.contains(&address).then(|| config.ipv6(address))?
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

    /// What each container is allowed that is attached.
    fn attachments(&self) -> BTreeMap<Ipv4Addr, Attachment> {
        attachments(&self.attached.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is counted of containers that are gone, by app and process type.
    fn gone(&self) -> BTreeMap<metrics::Owner, metrics::Counted> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets a container whose interface is still there, but not what was counted of it.
    fn forget(&self, address: Ipv4Addr) {
        let attached = self
            .attached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&address);
        let (Some(attached), Ok(endpoints)) = (attached, self.network.endpoints()) else {
            return;
        };
        if let Some((_, traffic)) = endpoints.iter().find(|(container, _)| container.ipv4 == address) {
            let mut drops = self.network.container_drops().unwrap_or_default();
            let counted = metrics::Counted::new(*traffic, drops.remove(&address).unwrap_or_default());
            let mut gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
            gone.entry(attached.owner).or_default().add(counted);
        }
    }
}

impl Networking {
    /// Gives a network namespace an address.
    pub(super) async fn attach(&self, up: &Up, namespace: &File, attached: Attached) -> Result<Ipv4Addr> {
        let address = up.allocate()?;
        let plumbed = up
            .network
            .attach(namespace.as_fd(), address, &attached.attachment)
            .await
            .map_err(failed("attach the job to the network"));
        match plumbed {
            Ok(_) => {
                up.attached
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(address, attached);
                self.endpoints_changed.notify_one();
                Ok(address)
            }
            Err(error) => {
                self.detach(up, address).await;
                Err(error)
            }
        }
    }

    /// Gives a network namespace that is nobody's yet an address. None if it would be the last.
    pub(super) async fn reserve(&self, up: &Up, namespace: &File) -> Result<Option<Ipv4Addr>> {
        let address = up
            .addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .allocate_in_advance();
        let Some(address) = address else { return Ok(None) };
        let reserved = up
            .network
            .attach(namespace.as_fd(), address, &Attachment::default())
            .await;
        match reserved {
            Ok(_) => Ok(Some(address)),
            Err(error) => {
                self.detach(up, address).await;
                Err(failed("attach a namespace to the network")(error))
            }
        }
    }

    /// Has a container be in the namespace that an address was reserved for.
    pub(super) async fn occupy(&self, up: &Up, address: Ipv4Addr, attached: Attached) -> Result<()> {
        let changed = up.network.change(address, &attached.attachment).await;
        changed.map_err(failed("attach the job to the network"))?;
        up.attached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(address, attached);
        self.endpoints_changed.notify_one();
        Ok(())
    }

    /// Takes an address back.
    pub(super) async fn detach(&self, up: &Up, address: Ipv4Addr) {
        up.forget(address);
        if let Err(error) = up.network.detach(address).await {
            tracing::warn!(%address, %error, "cannot detach");
        }
        up.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .release(address);
        self.endpoints_changed.notify_one();
    }
}

/// Makes the place where programs are pinned, which jobs of the platform that have programs of their own mount.
pub(super) fn make_pins() -> std::io::Result<()> {
    mount_bpf()?;
    std::fs::create_dir_all(PINS)
}

fn attachments(attached: &BTreeMap<Ipv4Addr, Attached>) -> BTreeMap<Ipv4Addr, Attachment> {
    attached
        .iter()
        .map(|(address, attached)| (*address, attached.attachment.clone()))
        .collect()
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
