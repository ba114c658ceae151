//! Encryption of what goes between hosts, by the kernel's WireGuard.
//!
//! The device [`ENCRYPTED_DEVICE`] carries the tunnel's packets: the programs put VXLAN around a packet as always and
//! hand it to the device instead of a neighbour; WireGuard finds the peer by the other host's address, and the program
//! at the device's ingress takes up what it has decrypted. No route leads there: what else hosts say to each other
//! goes on as it is.
//!
//! A host is encrypted with once there has been a handshake, so that nobody is cut off while hosts get to know one
//! another, or by a firewall; from then on always, and a little later its plain packets are refused. What the device
//! knows (keys, handshakes) outlives this process, as the maps do.

mod device;
mod key;
mod plan;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::PoisonError,
    time::{Duration, Instant},
};

use flynn_dataplane::{ENCRYPTED_DEVICE, Program, Way};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

pub(crate) use device::Device;
pub use key::{Key, PrivateKey};
pub(crate) use plan::Protection;

use crate::{
    error::{Error, Result},
    hosts::Host,
    network::Network,
    sysctl,
};

/// The UDP port of WireGuard between hosts.
pub const PORT: u16 = 51820;

/// What WireGuard adds to a packet: outer IPv4 and UDP headers, its own, and the tag.
pub(crate) const OVERHEAD: u32 = 20 + 8 + 16 + 16;

/// Between looks at hosts that have not answered yet; it doubles while nothing happens.
const LOOK: Duration = Duration::from_millis(100);
const LOOK_MOST: Duration = Duration::from_secs(10);

/// That what goes between hosts shall be encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encryption {
    /// This host's own key.
    pub key: PrivateKey,
    /// Nothing is sent to hosts or taken from them that is not.
    pub required: bool,
}

/// How another host is known to WireGuard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its key.
    pub key: Key,
    /// Its UDP port.
    pub port: u16,
}

/// What there is of encryption on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wireguard {
    /// It is not wanted.
    Off,
    /// It is wanted and cannot be had, for this reason.
    Unavailable(String),
    /// Others may know this host by this key.
    On(Key),
}

/// The same with what it is done by.
pub(crate) enum State {
    Off,
    Unavailable(String),
    On { device: Device, index: u32, key: Key },
}

/// What is known of the handshakes with hosts, by address: when there was the first that this process saw, if any. Only
/// hosts with a usable key are in it.
pub(crate) type Handshakes = BTreeMap<Ipv4Addr, Option<Instant>>;

impl Network {
    /// What there is of encryption on this host.
    pub fn wireguard(&self) -> Wireguard {
        match &self.wireguard {
            State::Off => Wireguard::Off,
            State::Unavailable(why) => Wireguard::Unavailable(why.clone()),
            State::On { key, .. } => Wireguard::On(*key),
        }
    }

    /// The hosts that can be encrypted with, by their addresses, and whether they have answered.
    pub fn handshakes(&self) -> BTreeMap<Ipv4Addr, bool> {
        let known = self.handshakes.lock().unwrap_or_else(PoisonError::into_inner);
        known
            .iter()
            .map(|(address, since)| (*address, since.is_some()))
            .collect()
    }

    /// Looks for handshakes with hosts that have not answered yet, and encrypts from then on. For ever.
    pub async fn follow_handshakes(&self) {
        let mut wait = LOOK;
        loop {
            if timeout(wait, self.unsettled.notified()).await.is_ok() {
                wait = LOOK;
                sleep(wait).await;
            }
            match self.look_for_handshakes().await {
                Ok(true) => wait = LOOK,
                Ok(false) => wait = (wait * 2).min(LOOK_MOST),
                Err(error) => {
                    warn!(%error, "cannot see with which hosts packets are encrypted");
                    wait = LOOK_MOST;
                }
            }
        }
    }

    /// Whether anything has changed by itself.
    async fn look_for_handshakes(&self) -> Result<bool> {
        let State::On { device, .. } = &self.wireguard else {
            return Ok(false);
        };
        let due = {
            let known = self.handshakes.lock().unwrap_or_else(PoisonError::into_inner);
            if known.is_empty() {
                return Ok(false);
            }
            let answered: BTreeSet<Ipv4Addr> = answered(device)?;
            let is_due = |(address, since): (&Ipv4Addr, &Option<Instant>)| match since {
                None => answered.contains(address),
                Some(since) => since.elapsed() >= plan::GRACE,
            };
            let unsettled = self.protections();
            known
                .iter()
                .filter(|(address, _)| {
                    unsettled
                        .get(*address)
                        .is_none_or(|protection| !protection.is_settled(true))
                })
                .any(is_due)
        };
        if due {
            self.refresh().await?;
        }
        Ok(due)
    }

    /// How packets of each host are treated now, by the host's address.
    pub(crate) fn protections(&self) -> BTreeMap<Ipv4Addr, Protection> {
        let hosts = self.dataplane().hosts().into_iter();
        let of = |host: flynn_dataplane::Host| {
            let protection = Protection {
                sent: host.encrypted,
                received: host.only_encrypted,
            };
            (host.address, protection)
        };
        hosts.map(of).collect()
    }

    /// Makes the device, or takes hold of it. That it cannot be had is no reason to have no network.
    pub(crate) async fn encrypt(&mut self) {
        let Some(wanted) = self.config.encryption.clone() else {
            return;
        };
        self.wireguard = match self.device_for(&wanted).await {
            Ok((device, index, key)) => {
                info!(%key, port = PORT, "packets to other hosts are encrypted where those can be");
                State::On { device, index, key }
            }
            Err(error) => {
                let why = error.to_string();
                warn!(why, "packets to other hosts cannot be encrypted");
                State::Unavailable(why)
            }
        };
    }

    async fn device_for(&self, wanted: &Encryption) -> Result<(Device, u32, Key)> {
        let failed = |what: &str| Error::kernel(format!("{what} {ENCRYPTED_DEVICE}"));
        let device = Device::open().map_err(Error::kernel("the kernel has no WireGuard"))?;
        let link = self.netlink.link(ENCRYPTED_DEVICE).await;
        if link.map_err(failed("looking for"))?.is_none() {
            let made = self.netlink.add_wireguard(ENCRYPTED_DEVICE).await;
            made.map_err(failed("making the WireGuard device"))?;
        }
        let link = self.netlink.link(ENCRYPTED_DEVICE).await;
        let link = link.map_err(failed("looking for"))?;
        let index = link
            .ok_or_else(|| failed("looking for")(std::io::ErrorKind::NotFound.into()))?
            .index;
        device
            .configure(&wanted.key, PORT)
            .map_err(failed(&format!("setting the key and the UDP port {PORT} of")))?;
        // What is left to the stack comes from hosts whose routes lead elsewhere. See where containers' interfaces are
        // opened.
        sysctl::set(&format!("ipv4/conf/{ENCRYPTED_DEVICE}/rp_filter"), "2")?;
        self.netlink
            .add_address(index, self.gateway().into())
            .await
            .map_err(failed("addressing"))?;
        if self.config.cluster6.is_some() {
            self.netlink
                .without_link_local(index)
                .await
                .map_err(failed("configuring"))?;
        }
        self.dataplane()
            .attach(Program::FromEncrypted, ENCRYPTED_DEVICE)?;
        self.netlink
            .up_with_mtu(index, self.mtu.saturating_sub(OVERHEAD))
            .await
            .map_err(failed(&format!("listening on UDP port {PORT} for")))?;
        let (key, _) = device.state().map_err(failed("looking at"))?;
        Ok((device, index, key))
    }

    /// Takes the device away, once nothing is sent by it any more.
    pub(crate) async fn stop_encrypting(&self) -> Result<()> {
        for program in [Program::FromEncrypted, Program::LbEncrypted] {
            self.dataplane().detach(program, ENCRYPTED_DEVICE)?;
        }
        let removed = self.netlink.remove_link(ENCRYPTED_DEVICE).await;
        removed
            .map(drop)
            .map_err(Error::kernel(format!("removing {ENCRYPTED_DEVICE}")))
    }

    /// Has the device know these hosts, and says with which of them there was a handshake.
    pub(crate) fn introduce(&self, hosts: &[Host]) -> Result<Handshakes> {
        let State::On { device, key, .. } = &self.wireguard else {
            return Ok(Handshakes::new());
        };
        let failed = |what: &str| Error::kernel(format!("{what} the peers of {ENCRYPTED_DEVICE}"));
        let hosts: Vec<_> = hosts.iter().map(|host| (host.address, host.wireguard)).collect();
        let wanted = plan::usable(*key, &hosts);
        let (_, present) = device.state().map_err(failed("reading"))?;
        let changes = plan::changes(&present, &wanted);
        if !changes.is_empty() {
            device.change(&changes).map_err(failed("changing"))?;
        }
        let answered: BTreeSet<_> = present
            .iter()
            .filter(|peer| peer.handshake && !changes.removed.contains(&peer.key))
            .filter_map(|peer| peer.address)
            .collect();
        let mut known = self.handshakes.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let handshakes: Handshakes = wanted
            .into_keys()
            .map(|address| {
                let before = known.get(&address).copied().flatten();
                (
                    address,
                    answered.contains(&address).then(|| before.unwrap_or(now)),
                )
            })
            .collect();
        known.clone_from(&handshakes);
        Ok(handshakes)
    }

    /// How a host's packets are to be treated, and the way there.
    pub(crate) fn protect(
        &self,
        host: &Host,
        way: Option<Way>,
        handshakes: &Handshakes,
        before: &BTreeMap<Ipv4Addr, Protection>,
    ) -> (Protection, Option<Way>) {
        let required = self
            .config
            .encryption
            .as_ref()
            .is_some_and(|wanted| wanted.required);
        let known = handshakes.get(&host.address);
        let since = known.copied().flatten().map(|since| since.elapsed());
        let before = before.get(&host.address).copied().unwrap_or_default();
        let protection = Protection::of(required, known.is_some(), since, before);
        if !protection.is_settled(known.is_some()) {
            self.unsettled.notify_one();
        }
        if !protection.sent || way.is_none() {
            return (protection, way);
        }
        let encrypted = match &self.wireguard {
            State::On { index, .. } if known.is_some() => way.map(|way| Way {
                ifindex: *index,
                ..way
            }),
            _ => None,
        };
        (protection, encrypted)
    }
}

fn answered(device: &Device) -> Result<BTreeSet<Ipv4Addr>> {
    let (_, present) = device
        .state()
        .map_err(Error::kernel(format!("reading the peers of {ENCRYPTED_DEVICE}")))?;
    Ok(present
        .into_iter()
        .filter(|peer| peer.handshake)
        .filter_map(|peer| peer.address)
        .collect())
}
