//! Heartbeats, addresses and time.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::core::{Actions, Floating, HostKey, MAX_HOSTS, TICK};
use super::kernel::Kernel;
use super::{Held, PORT, Settings, packet};

/// Between attempts to find the uplink.
const AGAIN: Duration = Duration::from_secs(1);

/// So many packets at most are read before a tick: what came while this thread had to wait, and no flood.
const DRAINED: usize = 16 * MAX_HOSTS;

/// Holds this host's share of the floating addresses until the sender of settings is gone, in the network namespace of
/// the calling thread, which it takes for itself. While there are no addresses it sends nothing. Once `leave` is cancelled
/// it ends as well, and what it holds stays with the kernel for some seconds: for another daemon of this host.
pub fn run(
    id: &str,
    own: Ipv4Addr,
    mut settings: watch::Receiver<Option<Settings>>,
    held: &Held,
    leave: &CancellationToken,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        loop {
            // Nothing to do, nothing bound.
            let wanted = leave.run_until_cancelled(settings.wait_for(has_addresses)).await;
            if !matches!(wanted, Some(Ok(_))) {
                return Ok(());
            }
            drop(wanted);
            match Shell::open(id, own).await {
                Ok(shell) => shell.serve(&mut settings, held, leave).await,
                Err(error) => {
                    tracing::warn!(%error, "floating addresses are left to other hosts");
                    tokio::time::sleep(AGAIN).await;
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
    kernel: Kernel,
    begun: Instant,
}

impl Shell {
    async fn open(id: &str, own: Ipv4Addr) -> io::Result<Self> {
        let kernel = Kernel::open(own).await?;
        let socket = UdpSocket::bind((own, PORT)).await?;
        // Each start has another; it need not be the right time.
        let incarnation = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(0));
        Ok(Self {
            core: Floating::new(id, incarnation),
            socket,
            kernel,
            begun: Instant::now(),
        })
    }

    /// Until there are no addresses any more, or nobody who tells of them.
    async fn serve(
        mut self,
        settings: &mut watch::Receiver<Option<Settings>>,
        held: &Held,
        leave: &CancellationToken,
    ) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut buffer = [0; packet::MAX + 1];
        let Some(mut now) = settings.borrow_and_update().clone() else {
            return;
        };
        self.configure(&now);
        loop {
            tokio::select! {
                biased;
                changed = settings.changed() => {
                    let next = changed.ok().and_then(|()| settings.borrow_and_update().clone());
                    let none = next.as_ref().is_none_or(|next| next.addresses.is_empty());
                    // Those that are gone are released before the rest is thought about.
                    let gone = self.core.held().collect::<Vec<_>>();
                    let stays = |ip: &IpAddr| {
                        next.iter().flat_map(|next| &next.addresses).any(|address| address.ip == *ip)
                    };
                    for ip in gone.into_iter().filter(|ip| !stays(ip)) {
                        self.kernel.release(ip);
                    }
                    match next {
                        Some(next) if !none => {
                            self.configure(&next);
                            now = next;
                        }
                        _ => return,
                    }
                }
                () = leave.cancelled() => return self.kernel.leave(),
                _ = ticks.tick() => {
                    // Nobody is lost whose heartbeat only waits here.
                    for _ in 0..DRAINED {
                        let Ok(length) = self.socket.try_recv(&mut buffer) else { break };
                        self.receive(&now, &buffer[..length]);
                    }
                    let actions = self.core.tick(self.begun.elapsed(), self.kernel.is_up());
                    self.act(actions, &now);
                    held.set(self.core.held().collect());
                }
                received = self.socket.recv(&mut buffer) => {
                    if let Ok(length) = received {
                        self.receive(&now, &buffer[..length]);
                    }
                }
            }
        }
    }

    fn configure(&mut self, settings: &Settings) {
        let hosts = settings.hosts.keys().map(|id| HostKey::of(id)).collect();
        let addresses = settings.addresses.iter().map(|address| address.ip).collect();
        self.core.configure(&hosts, &addresses);
    }

    fn receive(&mut self, settings: &Settings, packet: &[u8]) {
        if let Some(beat) = packet::decode(&settings.key, packet) {
            self.core.receive(self.begun.elapsed(), beat);
        }
    }

    fn act(&self, actions: Actions, settings: &Settings) {
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
            self.kernel.release(ip);
        }
        for ip in &actions.take {
            tracing::info!(%ip, "a floating address is taken");
        }
        for ip in actions.take.into_iter().chain(actions.announce) {
            if let Some(address) = settings.addresses.iter().find(|address| address.ip == ip) {
                self.kernel.announce(*address);
            }
        }
    }
}
