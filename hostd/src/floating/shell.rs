//! Heartbeats, addresses and time.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use super::core::{Actions, Floating, HostKey, TICK};
use super::uplink::Uplink;
use super::{Address, Held, PORT, Settings, packet};

/// Between looks at the uplink, and attempts to find it.
const LOOK: Duration = Duration::from_secs(1);

/// Holds this host's share of the floating addresses until the sender of settings is gone, in the network namespace of
/// the calling thread, which it takes for itself. While there are no addresses it sends nothing.
pub fn run(
    id: &str,
    own: Ipv4Addr,
    mut settings: watch::Receiver<Option<Settings>>,
    held: &Held,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        loop {
            // Nothing to do, nothing bound.
            if settings.wait_for(has_addresses).await.is_err() {
                return Ok(());
            }
            match Shell::open(id, own).await {
                Ok(shell) => shell.serve(&mut settings, held).await,
                Err(error) => {
                    tracing::warn!(%error, "floating addresses are left to other hosts");
                    tokio::time::sleep(LOOK).await;
                }
            }
            held.set(BTreeSet::new());
        }
    })
}

#[expect(clippy::ref_option, reason = "what a watch hands out")]
fn has_addresses(settings: &Option<Settings>) -> bool {
    settings
        .as_ref()
        .is_some_and(|settings| !settings.addresses.is_empty())
}

struct Shell {
    core: Floating,
    socket: UdpSocket,
    uplink: Uplink,
    begun: Instant,
}

impl Shell {
    async fn open(id: &str, own: Ipv4Addr) -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let uplink = Uplink::find(handle, own).await?;
        let socket = UdpSocket::bind((own, PORT)).await?;
        // Each start has another; it need not be the right time.
        let incarnation = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(0));
        Ok(Self {
            core: Floating::new(id, incarnation),
            socket,
            uplink,
            begun: Instant::now(),
        })
    }

    /// Until there are no addresses any more, or nobody who tells of them.
    async fn serve(mut self, settings: &mut watch::Receiver<Option<Settings>>, held: &Held) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut looked, mut up) = (None::<Instant>, false);
        let mut buffer = [0; packet::MAX + 1];
        let Some(mut now) = settings.borrow_and_update().clone() else {
            return;
        };
        self.configure(&now);
        loop {
            let actions = tokio::select! {
                _ = ticks.tick() => {
                    if looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
                        (looked, up) = (Some(Instant::now()), self.uplink.is_up().await);
                    }
                    self.core.tick(self.begun.elapsed(), up)
                }
                received = self.socket.recv(&mut buffer) => {
                    let Ok(length) = received else { continue };
                    let Some(beat) = packet::decode(&now.key, &buffer[..length]) else { continue };
                    self.core.receive(self.begun.elapsed(), beat)
                }
                changed = settings.changed() => {
                    let next = changed.ok().and_then(|()| settings.borrow_and_update().clone());
                    let none = next.as_ref().is_none_or(|next| next.addresses.is_empty());
                    // Those that are gone are released before the rest is thought about.
                    let gone = self.core.held().collect::<Vec<_>>();
                    let stays = |ip: &IpAddr| {
                        next.iter().flat_map(|next| &next.addresses).any(|address| address.ip == *ip)
                    };
                    for ip in gone.into_iter().filter(|ip| !stays(ip)) {
                        self.release(ip).await;
                    }
                    match next {
                        Some(next) if !none => {
                            self.configure(&next);
                            now = next;
                        }
                        _ => return,
                    }
                    continue;
                }
            };
            self.act(actions, &now).await;
            held.set(self.core.held().collect());
        }
    }

    fn configure(&mut self, settings: &Settings) {
        let hosts = settings.hosts.keys().map(|id| HostKey::of(id)).collect();
        let addresses = settings.addresses.iter().map(|address| address.ip).collect();
        self.core.configure(&hosts, &addresses);
    }

    async fn act(&mut self, actions: Actions, settings: &Settings) {
        // Heartbeats first: others wait for them, and the kernel may take its time with the rest.
        for beat in &actions.beats {
            let to = settings
                .hosts
                .iter()
                .find(|(id, _)| HostKey::of(id) == beat.to)
                .map(|(_, address)| SocketAddr::from((*address, PORT)));
            if let Some(to) = to {
                // One that cannot be sent is lost, as it may be on its way.
                let _ = self.socket.try_send_to(&packet::encode(&settings.key, beat), to);
            }
        }
        for ip in actions.release {
            tracing::info!(%ip, "a floating address is another host's");
            self.release(ip).await;
        }
        for ip in &actions.take {
            tracing::info!(%ip, "a floating address is taken");
        }
        for ip in actions.take.into_iter().chain(actions.announce) {
            let address = settings.addresses.iter().find(|address| address.ip == ip);
            if let Some(address) = address
                && let Err(error) = self.uplink.hold(Address { ..*address }).await
            {
                tracing::error!(%ip, %error, "a floating address cannot be held");
            }
        }
    }

    async fn release(&self, ip: IpAddr) {
        if let Err(error) = self.uplink.release(ip).await {
            tracing::warn!(%ip, %error, "a floating address that is another's stays for some seconds");
        }
    }
}
