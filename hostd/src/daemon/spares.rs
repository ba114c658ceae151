//! Supervisors that are made before there are jobs for them, each with a network namespace that has an address: what takes
//! the longest of a start is done by then. A program that is attached to an interface, for one, waits until the kernel has
//! seen all CPUs do something else.

use std::io;
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Child;
use tokio::time::{sleep, timeout};

use super::Daemon;
use super::network::Up;
use super::start::{SUPERVISOR_START, network_namespace};

/// How many wait for jobs.
const SPARES: usize = 1;

/// How long a job that has just been started has the CPU to itself before the next spare one is made.
const PAUSE: Duration = Duration::from_millis(30);

/// A supervisor without a job, in a network namespace of its own.
pub(super) struct Spare {
    pub(super) supervisor: Child,
    /// The address that the namespace has, and in which network, if there was one.
    pub(super) attached: Option<(Arc<Up>, Ipv4Addr)>,
}

impl Spare {
    /// Tells it its job.
    pub(super) async fn assign(&mut self, job_dir: &Path) -> io::Result<()> {
        let mut input = self.supervisor.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        input.write_all(job_dir.as_os_str().as_bytes()).await?;
        input.write_all(b"\n").await
    }
}

/// Those that there are.
#[derive(Default)]
pub(super) struct Spares(Mutex<Pool>);

#[derive(Default)]
struct Pool {
    ready: Vec<Spare>,
    /// Being made.
    coming: usize,
    /// None is needed here any more.
    closed: bool,
}

impl Spares {
    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Daemon {
    /// A spare supervisor that lives, if there is any.
    pub(super) async fn take_spare(&self) -> Option<Spare> {
        loop {
            let mut spare = self.spares.pool().ready.pop()?;
            if matches!(spare.supervisor.try_wait(), Ok(None)) {
                return Some(spare);
            }
            // What has been killed is of no use.
            self.let_go(spare).await;
        }
    }

    /// Ends one that is of no use.
    pub(super) async fn let_go(&self, mut spare: Spare) {
        // It may have heard of a job, and be about to keep it.
        let _ = spare.supervisor.kill().await;
        if let Some((network, address)) = spare.attached {
            self.network.detach(&network, address).await;
        }
    }

    /// Ends all. What their interfaces leave behind is removed by the daemon that comes next.
    pub(super) fn dismiss_spares(&self) {
        let mut pool = self.spares.pool();
        pool.closed = true;
        // The end of their input ends them; the runtime waits for them.
        pool.ready.clear();
    }

    /// Sees that there are enough, a moment from now.
    pub(super) fn refill_spares(self: &Arc<Self>) {
        {
            let mut pool = self.spares.pool();
            if pool.closed || pool.ready.len() + pool.coming >= SPARES {
                return;
            }
            pool.coming += 1;
        }
        let daemon = Arc::clone(self);
        tokio::spawn(async move {
            sleep(PAUSE).await;
            // A daemon that has handed over makes none: its successor gives out the same addresses.
            let Some(_pass) = daemon.gate.enter("a supervisor in advance").await else {
                daemon.spares.pool().coming -= 1;
                return;
            };
            let made = daemon.make_spare().await;
            let mut pool = daemon.spares.pool();
            pool.coming -= 1;
            match made {
                Ok(spare) => pool.ready.push(spare),
                Err(error) => tracing::warn!(%error, "cannot start a supervisor in advance"),
            }
        });
    }

    async fn make_spare(&self) -> flynn_api::Result<Spare> {
        let failed = |error: io::Error| flynn_api::Error::internal(error.to_string());
        let mut supervisor = self.executable.spare().map_err(failed)?;
        let output = supervisor.stdout.as_mut();
        let output = output.ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        // Before it says so its process is in our network.
        let ready = timeout(SUPERVISOR_START, output.read_exact(&mut [0])).await;
        ready
            .map_err(|_| failed(io::ErrorKind::TimedOut.into()))?
            .map_err(failed)?;
        let mut spare = Spare {
            supervisor,
            attached: None,
        };
        if let (Some(network), Some(pid)) = (self.network.peek(), spare.supervisor.id()) {
            let namespace = network_namespace(pid.cast_signed())?;
            // Without an address it is of use, too.
            if let Ok(Some(address)) = self.network.reserve(&network, &namespace).await {
                spare.attached = Some((network, address));
            }
        }
        Ok(spare)
    }
}
