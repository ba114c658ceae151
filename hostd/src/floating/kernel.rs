//! Has the kernel hold what is to be held, in a thread of its own: one lock guards all of the kernel's network
//! configuration, and heartbeats must not wait for it while containers come and go.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::Address;
use super::uplink::Uplink;

/// Between looks at the uplink.
const LOOK: Duration = Duration::from_secs(1);

/// What is to be held, each with when it was last to be announced.
type Wanted = BTreeMap<IpAddr, (Address, Instant)>;

/// The thread. Once this is dropped nothing is held, unless it was left.
pub(super) struct Kernel {
    wanted: Option<watch::Sender<Wanted>>,
    up: Arc<AtomicBool>,
    /// Whether what is held stays when this is dropped.
    leave: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Kernel {
    /// Starts it, in the network namespace of the calling thread, for the interface with this address.
    pub(super) async fn open(own: Ipv4Addr) -> io::Result<Self> {
        let (wanted, receiver) = watch::channel(Wanted::new());
        let (opened, open) = oneshot::channel();
        let up = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&up);
        let leave = Arc::new(AtomicBool::new(false));
        let left = Arc::clone(&leave);
        let thread = std::thread::Builder::new()
            .name("floating-kernel".to_owned())
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                match runtime {
                    Ok(runtime) => runtime.block_on(run(own, receiver, &told, &left, opened)),
                    Err(error) => drop(opened.send(Err(error))),
                }
            })?;
        let kernel = Self {
            wanted: Some(wanted),
            up,
            leave,
            thread: Some(thread),
        };
        open.await.map_err(io::Error::other)??;
        Ok(kernel)
    }

    /// Whether what the uplink is connected to was up of late.
    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Has the address held, or renewed, and announced, soon.
    pub(super) fn announce(&self, address: Address) {
        self.change(|wanted| {
            wanted.insert(address.ip, (address, Instant::now()));
            true
        });
    }

    /// Has it given up, soon.
    pub(super) fn release(&self, ip: IpAddr) {
        self.change(|wanted| wanted.remove(&ip).is_some());
    }

    /// Has the kernel keep what is held for its last seconds, when this is dropped: another daemon of this host is about
    /// to hold it.
    pub(super) fn leave(&self) {
        self.leave.store(true, Ordering::Relaxed);
    }

    fn change(&self, change: impl FnOnce(&mut Wanted) -> bool) {
        if let Some(wanted) = &self.wanted {
            wanted.send_if_modified(change);
        }
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.wanted = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that holds floating addresses is dead");
        }
    }
}

async fn run(
    own: Ipv4Addr,
    mut wanted: watch::Receiver<Wanted>,
    up: &AtomicBool,
    leave: &AtomicBool,
    opened: oneshot::Sender<io::Result<()>>,
) {
    let uplink = async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Uplink::find(handle, own).await
    };
    let uplink = match uplink.await {
        Ok(uplink) => uplink,
        Err(error) => return drop(opened.send(Err(error))),
    };
    if opened.send(Ok(())).is_err() {
        return;
    }
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut done = Wanted::new();
    loop {
        let goes_on = tokio::select! {
            _ = looks.tick() => {
                up.store(uplink.is_up().await, Ordering::Relaxed);
                true
            }
            changed = wanted.changed() => changed.is_ok(),
        };
        if !goes_on && leave.load(Ordering::Relaxed) {
            return;
        }
        let now = if goes_on {
            wanted.borrow_and_update().clone()
        } else {
            Wanted::new()
        };
        for ip in done.keys().filter(|ip| !now.contains_key(ip)) {
            if let Err(error) = uplink.release(*ip).await {
                tracing::warn!(%ip, %error, "a floating address that is another's stays for some seconds");
            }
        }
        for (ip, (address, _)) in now.iter().filter(|(ip, wanted)| done.get(ip) != Some(wanted)) {
            if let Err(error) = uplink.hold(*address).await {
                tracing::error!(%ip, %error, "a floating address cannot be held");
            }
        }
        done = now;
        if !goes_on {
            return;
        }
    }
}
