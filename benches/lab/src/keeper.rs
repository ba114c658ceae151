//! The keeper: the one lasting process of a lab. It does one wish after the other.

use crate::cgroup::Group;
use crate::config::{LabConfig, host_address};
use crate::disk::Pool;
use crate::host::MachineHost;
use crate::making::alone;
use crate::protocol::{LabStatus, Request, Response};
use crate::stage::{ForwardPlan, Stage, hand, plan};
use crate::switch::Switch;
use anyhow::{Context, Result, bail};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::Pid;
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

/// The longest request, in bytes.
const LONGEST: u64 = 64 << 10;

/// What a keeper is started with.
#[derive(Serialize, Deserialize)]
pub(crate) struct KeeperPlan {
    pub(crate) config: LabConfig,
    /// Whether it goes on without whoever started it.
    pub(crate) detached: bool,
}

/// The socket that a keeper answers on.
pub(crate) fn socket(dir: &Path) -> PathBuf {
    dir.join("lab.sock")
}

/// The program of a lab, kept beside it: the one that started it may be built anew meanwhile.
pub(crate) fn program(dir: &Path) -> PathBuf {
    dir.join("program")
}

/// A lab that is.
struct Keeper {
    config: LabConfig,
    group: Group,
    pool: Pool,
    switch: Switch,
    hosts: Vec<MachineHost>,
    forwarders: Vec<(SocketAddr, Child)>,
}

/// A wish and whom to answer.
type Wish = (Request, oneshot::Sender<Response>);

pub(crate) fn main() -> Result<i32> {
    let KeeperPlan { config, detached } = plan()?;
    if detached {
        rustix::process::setsid().context("cannot make a session")?;
    }
    // Services whose helper was killed are reaped here, not by whoever is the machine's process 1.
    rustix::process::set_child_subreaper(Pid::from_raw(1)).context("cannot become a reaper")?;
    // Whoever ends the lab meanwhile waits until it is there, or was here first.
    let making = alone(&config.dir)?.context("the lab was ended before it was made")?;
    let keeper = Keeper::start(&config)?;
    // The same thread for good: monitors die with the thread that started them.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(keeper.serve(detached, making));
    // A read of stdin may be under way for ever.
    runtime.shutdown_background();
    outcome
}

impl Keeper {
    /// Makes the lab, or nothing.
    fn start(config: &LabConfig) -> Result<Self> {
        config.check()?;
        let group = Group::lab(&config.name)?;
        if group.exists() {
            bail!(
                "a lab {} is there already; `flynn-lab down {0}` ends it",
                config.name
            );
        }
        let outcome = Self::make(config, &group);
        if outcome.is_err() {
            // It cannot remove the group that it is in.
            let _ = leave(&group).and_then(|()| group.remove());
        }
        outcome
    }

    fn make(config: &LabConfig, group: &Group) -> Result<Self> {
        group.make()?;
        group.enter_v2_leaf()?;
        crate::unshare(UnshareFlags::NEWNS).context("cannot make a mount namespace; is this root?")?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .context("cannot go private")?;
        let pool = Pool::new(&config.dir, config.hosts, config.disk)?;
        let switch = Switch::new()?;
        let program = program(&config.dir);
        let hosts = (1..=config.hosts)
            .map(|number| MachineHost::new(config, number, group, program.clone(), &pool))
            .collect::<Result<Vec<_>>>()?;
        let mut keeper = Self {
            config: config.clone(),
            group: group.clone(),
            pool,
            switch,
            hosts,
            forwarders: Vec::new(),
        };
        let outcome = keeper.begin();
        if outcome.is_err() {
            keeper.stop()?;
        }
        outcome.map(|()| keeper)
    }

    fn begin(&mut self) -> Result<()> {
        for forward in &self.config.forwards {
            let plan = ForwardPlan {
                listen: forward.listen,
                to: (1..=self.config.hosts)
                    .map(|host| (host_address(host), forward.port).into())
                    .collect(),
                namespace: format!(
                    "/proc/{}/fd/{}",
                    std::process::id(),
                    self.switch.namespace().as_raw_fd()
                )
                .into(),
            };
            let mut child = Stage::Forward
                .command(&program(&self.config.dir))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .context("cannot start a forwarder")?;
            hand(&mut child.stdin.take().context("no stdin")?, &plan)?;
            let mut line = String::new();
            BufReader::new(child.stdout.take().context("no stdout")?).read_line(&mut line)?;
            let Ok(address) = line.trim().parse() else {
                let _ = child.wait();
                bail!("cannot forward {}; the lab's log says why", forward.listen);
            };
            self.forwarders.push((address, child));
        }
        for host in &mut self.hosts {
            host.boot(&self.config, &self.pool, &self.switch)?;
        }
        Ok(())
    }

    /// Answers until it is asked to end, told to by a signal, or left alone by whoever started it.
    async fn serve(mut self, detached: bool, making: File) -> Result<i32> {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let socket = socket(&self.config.dir);
        let listener =
            UnixListener::bind(&socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
        // Whoever started the lab waits for this line; of no use to one who is gone.
        let told = writeln!(std::io::stdout(), "up").and_then(|()| std::io::stdout().flush());
        if told.is_err() {
            self.stop()?;
            bail!("whoever started the lab is gone");
        }
        drop(making);
        let (wishes, mut wished) = mpsc::channel::<Wish>(16);
        let mut owner = tokio::io::stdin();
        let mut nothing = [0; 1];
        let answer = loop {
            tokio::select! {
                accepted = listener.accept() => if let Ok((stream, _)) = accepted {
                    tokio::spawn(converse(stream, wishes.clone()));
                },
                Some((request, reply)) = wished.recv() => {
                    if matches!(request, Request::Down) {
                        break Some(reply);
                    }
                    // Whoever asked may be gone.
                    let _ = reply.send(self.answer(request));
                }
                _ = terminate.recv() => break None,
                _ = interrupt.recv() => break None,
                _ = owner.read(&mut nothing), if !detached => break None,
            }
        };
        let outcome = self.stop();
        let status = self.status();
        if let Some(answer) = answer {
            let _ = answer.send(response(
                outcome
                    .as_ref()
                    .map(|()| status)
                    .map_err(|error| format!("{error:#}")),
            ));
            // One turn for the answer to leave.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        outcome?;
        Ok(0)
    }

    fn answer(&mut self, request: Request) -> Response {
        let outcome = self.fulfil(request).map(|()| self.status());
        response(outcome.map_err(|error| format!("{error:#}")))
    }

    fn fulfil(&mut self, request: Request) -> Result<()> {
        let Self {
            config,
            pool,
            switch,
            hosts,
            ..
        } = self;
        match request {
            Request::Status | Request::Down => Ok(()),
            Request::Boot { host } => find(hosts, host)?.boot(config, pool, switch),
            Request::PowerCut { host } => find(hosts, host)?.power_cut(pool, switch),
            Request::Start { host, service } => find(hosts, host)?.start_service(config, &service),
            Request::Signal {
                host,
                service,
                signal,
            } => find(hosts, host)?.signal(&service, signal),
            Request::Cut { from, to } => {
                find(hosts, from)?;
                find(hosts, to)?;
                switch.cut(from, to)
            }
            Request::Mend { from, to } => switch.mend(from, to),
            Request::Count => switch.count(),
            Request::Lose { links } => {
                for (from, to, percent) in &links {
                    find(hosts, *from)?;
                    find(hosts, *to)?;
                    if !(1..=100).contains(percent) {
                        bail!("a link loses 1 to 100 frames of a hundred, not {percent}");
                    }
                }
                let losses = links.into_iter().map(|(from, to, percent)| ((from, to), percent));
                switch.lose(losses.collect())
            }
        }
    }

    fn status(&mut self) -> LabStatus {
        LabStatus {
            name: self.config.name.clone(),
            hosts: self
                .hosts
                .iter_mut()
                .map(|host| host.status(&self.config.services))
                .collect(),
            cuts: self.switch.cuts(),
            lost: self.switch.lost(),
            forwards: self.forwarders.iter().map(|(address, _)| *address).collect(),
        }
    }

    /// Ends everything but the keeper itself.
    fn stop(&mut self) -> Result<()> {
        for (_, forwarder) in &mut self.forwarders {
            let _ = forwarder.kill();
            let _ = forwarder.wait();
        }
        for host in &mut self.hosts {
            host.end(&self.switch)?;
        }
        crate::wait::until(
            std::time::Duration::from_secs(20),
            "the disks to be let go",
            || Ok(self.pool.close().is_ok()),
        )?;
        // Leave the group, so that it can go.
        leave(&self.group)?;
        self.group.remove()?;
        let _ = fs::remove_file(socket(&self.config.dir));
        Ok(())
    }
}

/// A host by its number.
fn find(hosts: &mut [MachineHost], number: u8) -> Result<&mut MachineHost> {
    let count = hosts.len();
    let index = usize::from(number).checked_sub(1);
    let host = index.and_then(|index| hosts.get_mut(index));
    host.with_context(|| format!("there is no host {number}, only 1 to {count}"))
}

/// Leaves the lab's group for the one above it.
fn leave(group: &Group) -> Result<()> {
    let dir = group.v2()?;
    let above = dir.parent().context("a lab's group has no parent")?;
    fs::write(above.join("cgroup.procs"), "0").context("cannot leave the lab's cgroup")
}

fn response(outcome: Result<LabStatus, String>) -> Response {
    match outcome {
        Ok(status) => Response::Done(status),
        Err(error) => Response::Failed(error),
    }
}

/// Takes wishes from one client, a line each.
async fn converse(stream: UnixStream, wishes: mpsc::Sender<Wish>) {
    let (read, mut write) = stream.into_split();
    let mut lines = tokio::io::BufReader::new(read);
    loop {
        let mut line = String::new();
        match (&mut lines).take(LONGEST).read_line(&mut line).await {
            Ok(read) if read > 0 => {}
            _ => return,
        }
        let response = match serde_json::from_str(&line) {
            Err(error) => Response::Failed(format!("the request cannot be read: {error}")),
            Ok(request) => {
                let (reply, answer) = oneshot::channel();
                if wishes.send((request, reply)).await.is_err() {
                    return;
                }
                let Ok(response) = answer.await else { return };
                response
            }
        };
        let Ok(mut json) = serde_json::to_vec(&response) else {
            return;
        };
        json.push(b'\n');
        if write.write_all(&json).await.is_err() {
            return;
        }
    }
}
