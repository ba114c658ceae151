//! One run of a job's program, from clone to the death of everything in the container.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use flynn_api::host::JobState;
use jiff::Timestamp;
use rustix::process::{WaitId, WaitIdOptions};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::Supervisor;
use super::inside::Inside;
use super::server::Command;
use super::services::{HealthEvent, Services};
use super::streams::Streams;
use crate::cgroup::Group;
use crate::container::{self, Container, FromInit, OwnLayer, Place, UserNamespace};
use crate::files;
use crate::launch::Launch;
use crate::sys::{Polled, polled};

/// How long a container may take, at its stop, that has not come to its program yet: it hangs, or is about to.
const SET_UP: Duration = Duration::from_secs(1);
/// Between an instance's goodbye and the end of its program: load balancers that cannot try another one hear of it before.
const GOODBYE: Duration = Duration::from_millis(250);

/// How a run has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It was stopped before there was a program.
    Stopped,
    /// The program could not be started: why.
    Failed(String),
    /// The program ended.
    Exited {
        /// 128 + n after signal n.
        status: i32,
        /// By its memory limit.
        oom_killed: bool,
        /// Why we ended it, if we did.
        why: Option<String>,
    },
}

impl End {
    pub(super) fn status(&self) -> Option<i32> {
        match self {
            Self::Exited { status, .. } => Some(*status),
            _ => None,
        }
    }

    pub(super) fn oom_killed(&self) -> bool {
        matches!(self, Self::Exited { oom_killed: true, .. })
    }

    /// In words.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Stopped => "stopped".into(),
            Self::Failed(why)
            | Self::Exited {
                oom_killed: false,
                why: Some(why),
                ..
            } => why.clone(),
            Self::Exited { oom_killed: true, .. } => {
                "killed for want of memory: the job's memory limit was reached; raise the limit or use less"
                    .into()
            }
            Self::Exited { status, .. } if *status > 128 => format!("ended by signal {}", status - 128),
            Self::Exited { status, .. } => format!("ended with status {status}"),
        }
    }
}

/// A container that is made as far as it can be without its place in the network.
pub(super) struct Prepared {
    container: Container,
    /// How many had been killed for want of memory before it was there.
    oom_kills: u64,
}

impl Prepared {
    /// Begins to make it. Where there is v2 alone it is born in its group, which must be there.
    pub(super) fn begin(
        launch: &Launch,
        job_dir: &Path,
        group: &Group,
        users: Option<&UserNamespace>,
    ) -> io::Result<Self> {
        let own = OwnLayer::make(launch, job_dir)?;
        files::private_dir(&job_dir.join("root"))?;
        let oom_kills = group.oom_kills();
        let cradle = group.cradle().map(File::open).transpose()?;
        let container = Container::create(launch, job_dir, &own, users, cradle.as_ref().map(File::as_fd))?;
        container.go()?;
        Ok(Self { container, oom_kills })
    }

    /// Sees that it is in its groups.
    pub(super) fn join(self, group: &Group) -> io::Result<Self> {
        if group.cradle().is_none() {
            group.add(self.container.pid)?;
        }
        Ok(self)
    }

    /// Has it start the program there.
    pub(super) fn place(&self, place: &Place) {
        // Should init be dead, its last words say why.
        let _ = self.container.place(place);
    }
}

/// What a run keeps while it lasts.
pub(super) struct Run<'a> {
    supervisor: &'a mut Supervisor,
    init: Polled,
    inside: Inside,
    streams: Option<Streams>,
    services: Option<Services>,
    unhealthy: Vec<bool>,
    health_in: mpsc::UnboundedSender<HealthEvent>,
    running: bool,
    kill_at: Option<Instant>,
    exited: Option<i32>,
    failed: Option<String>,
    why: Option<String>,
}

impl<'a> Run<'a> {
    /// Runs the program once.
    #[expect(clippy::new_ret_no_self, reason = "a run is made and lived through in one go")]
    pub(super) async fn new(supervisor: &'a mut Supervisor) -> End {
        match Run::live(&mut *supervisor).await {
            Ok(end) => end,
            Err(error) => {
                let _ = supervisor.group.kill();
                End::Failed(format!("cannot make the container: {error}"))
            }
        }
    }

    async fn live(supervisor: &'a mut Supervisor) -> io::Result<End> {
        let Prepared { container, oom_kills } = supervisor.container()?;
        let Container {
            pid,
            pidfd,
            init,
            pipes,
        } = container;
        let pidfd = polled(pidfd)?;
        supervisor.output.begin();
        let streams = match pipes {
            Some(pipes) => Some(Streams::of_pipes(pipes, &supervisor.output, &supervisor.input)?),
            None => None,
        };
        let (health_in, mut health) = mpsc::unbounded_channel();
        let unhealthy = vec![true; supervisor.launch.services.len()];
        let inside = Inside::new(&supervisor.launch, &supervisor.group, Arc::clone(pidfd.get_ref()));
        let mut run = Self {
            supervisor,
            init: polled(init)?,
            inside,
            streams,
            services: None,
            unhealthy,
            health_in,
            running: false,
            kill_at: None,
            exited: None,
            failed: None,
            why: None,
        };
        run.supervisor.change(|status| status.pid = Some(pid)).await;
        loop {
            let kill_at = run.kill_at;
            tokio::select! {
                biased;
                message = receive(&run.init), if run.exited.is_none() && run.failed.is_none() => run.hear(message?).await?,
                dead = pidfd.readable() => {
                    drop(dead?);
                    break;
                }
                Some(command) = run.supervisor.commands.recv() => run.obey(command).await,
                Some(event) = health.recv() => run.health(event).await,
                _ = run.supervisor.terminate.recv() => {
                    run.supervisor.terminated = true;
                    run.stop().await;
                }
                () = tokio::time::sleep_until(kill_at.unwrap_or_else(Instant::now)), if kill_at.is_some() => {
                    run.kill_at = None;
                    run.supervisor.group.kill()?;
                }
            }
        }
        run.end(pidfd.get_ref(), oom_kills).await
    }

    /// Takes what init says.
    async fn hear(&mut self, message: Option<FromInit>) -> io::Result<()> {
        match message {
            Some(FromInit::Terminal(fd)) => {
                let streams = Streams::of_terminal(fd, &self.supervisor.output, &self.supervisor.input)?;
                self.streams = Some(streams);
            }
            Some(FromInit::Running) => {
                self.running = true;
                if self.kill_at.is_some() {
                    // It is being stopped, and there is a program to wait for.
                    self.kill_at = Some(Instant::now() + self.patience());
                }
                self.serve();
                let supervisor = &self.supervisor;
                supervisor.inside.send_replace(Some(self.inside.clone()));
                let healthy = self.unhealthy.is_empty();
                supervisor
                    .change(|status| {
                        status.state = JobState::Running;
                        status.started_at = Some(Timestamp::now());
                        status.healthy = healthy;
                        status.error = None;
                    })
                    .await;
            }
            // An overlay that finds no room for a directory of its own can only be read.
            Some(FromInit::Failed(why)) if why.contains("Read-only file system") => {
                self.failed = Some(format!(
                    "{why}: the container's own layer takes nothing; is the host's disk full?"
                ));
            }
            Some(FromInit::Failed(why)) => self.failed = Some(why),
            Some(FromInit::Exited(status)) => self.exited = Some(status),
            // Init died without a word: its pidfd says the rest.
            None => self.exited = Some(128 + libc::SIGKILL),
        }
        Ok(())
    }

    /// Begins to check and register.
    fn serve(&mut self) {
        let supervisor = &self.supervisor;
        self.services = Some(Services::start(
            &supervisor.launch,
            &supervisor.place.subscribe(),
            &self.health_in,
            &self.inside,
        ));
    }

    /// Has the processes stand still, out of discoverd before, or go on.
    async fn pause(&mut self, paused: bool) -> Result<(), String> {
        if !self.running {
            return Err("the job's program is not running yet".into());
        }
        if self.supervisor.status.borrow().paused == paused {
            return Ok(());
        }
        if self.kill_at.is_some() {
            return Err("the job is being stopped".into());
        }
        if paused && let Some(services) = self.services.take() {
            services.deregister().await;
        }
        if let Err(error) = self.supervisor.group.freeze(paused) {
            if paused {
                let _ = self.supervisor.group.freeze(false);
                self.serve();
            }
            return Err(error.to_string());
        }
        // As at the start: who has services is well once they are.
        self.unhealthy.fill(true);
        let healthy = !paused && self.unhealthy.is_empty();
        if !paused {
            self.serve();
        }
        self.supervisor
            .change(|status| {
                status.paused = paused;
                status.healthy = healthy;
            })
            .await;
        Ok(())
    }

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Go(place) => self.supervisor.move_to(place).await,
            Command::Stop => {
                if !self.supervisor.status.borrow().stop_requested {
                    self.supervisor
                        .change(|status| status.stop_requested = true)
                        .await;
                    self.stop().await;
                }
            }
            Command::Signal(signal, reply) => {
                let error = if self.running {
                    let sent = container::signal(self.init.get_ref(), signal);
                    sent.err().map(|error| error.to_string())
                } else {
                    Some("the job's program is not running yet".into())
                };
                let _ = reply.send(error);
            }
            Command::Deregister(reply) => {
                if let Some(services) = self.services.take() {
                    services.deregister().await;
                }
                let _ = reply.send(None);
            }
            Command::Pause(paused, reply) => {
                let _ = reply.send(self.pause(paused).await.err());
            }
        }
    }

    /// Asks the program to end: out of discoverd first, then SIGTERM, and SIGKILL when its time is up.
    async fn stop(&mut self) {
        if let Some(services) = self.services.take() {
            let told = !services.is_empty();
            services.deregister().await;
            if told && self.running {
                sleep(GOODBYE).await;
            }
        }
        if self.supervisor.status.borrow().paused {
            // It could not take the signal.
            let _ = self.supervisor.group.freeze(false);
        }
        // Before the program runs this waits for it at its init: it may run already, and we not have heard of it.
        let _ = container::signal(self.init.get_ref(), libc::SIGTERM);
        self.kill_at = Some(Instant::now() + self.patience());
    }

    /// How long a stop may take.
    fn patience(&self) -> Duration {
        let patience = Duration::from_secs(self.supervisor.launch.stop_timeout.into());
        if self.running {
            patience
        } else {
            patience.min(SET_UP)
        }
    }

    async fn health(&mut self, event: HealthEvent) {
        match event {
            HealthEvent::Changed(index, healthy) => {
                if let Some(slot) = self.unhealthy.get_mut(index) {
                    *slot = !healthy;
                }
                let healthy = !self.unhealthy.contains(&true);
                let changed = self.supervisor.status.borrow().healthy != healthy;
                if changed {
                    self.supervisor.change(|status| status.healthy = healthy).await;
                }
            }
            HealthEvent::KillDown(why) => {
                self.supervisor.output.say(format!("{why}: killing the job"));
                self.why = Some(why);
                self.stop().await;
            }
        }
    }

    /// Everything in the container is dead, or, in the host's pid namespace, init is.
    async fn end(mut self, pidfd: &OwnedFd, oom_kills: u64) -> io::Result<End> {
        self.supervisor.inside.send_replace(None);
        // What init said last may still be in its socket.
        while let Ok(Some(message)) = container::receive(self.init.get_ref()) {
            self.hear(Some(message)).await?;
        }
        let waited = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
        let by_kernel = waited.and_then(|status| {
            status
                .exit_status()
                .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
        });
        if self.supervisor.launch.host_pid_namespace {
            self.supervisor.group.kill()?;
        }
        if let Some(services) = self.services.take() {
            services.deregister().await;
        }
        if self.supervisor.status.borrow().paused {
            // Or the next one would stand still as well.
            let _ = self.supervisor.group.freeze(false);
        }
        self.supervisor.output.set_terminal(None);
        if let Some(streams) = self.streams.take() {
            self.finish_output(streams).await;
        }
        if let Some(why) = self.failed.take() {
            return Ok(End::Failed(why));
        }
        let status = self.exited.or(by_kernel).unwrap_or(255);
        let oom_killed = status == 128 + libc::SIGKILL && self.supervisor.group.oom_kills() > oom_kills;
        if !self.running {
            if self.supervisor.over() {
                return Ok(End::Stopped);
            }
            return Ok(End::Failed(
                "the container's init was killed before the program was started".into(),
            ));
        }
        Ok(End::Exited {
            status,
            oom_killed,
            why: self.why.take(),
        })
    }
}

impl Run<'_> {
    /// Passes on what is left. Whoever stops the job meanwhile does not wait for its clients.
    async fn finish_output(&mut self, streams: Streams) {
        let output = Arc::clone(&self.supervisor.output);
        let mut finishing = pin!(streams.finish(&output, self.supervisor.client_patience()));
        let was_over = self.supervisor.over();
        loop {
            tokio::select! {
                biased;
                () = &mut finishing => return,
                Some(command) = self.supervisor.commands.recv() => {
                    self.supervisor.without_program(command).await;
                }
                _ = self.supervisor.terminate.recv() => self.supervisor.terminated = true,
            }
            if self.supervisor.over() && !was_over {
                output.let_clients_go();
            }
        }
    }
}

/// The next word from init, or from another one that keeps a program.
pub(super) async fn receive(init: &Polled) -> io::Result<Option<FromInit>> {
    loop {
        let mut guard = init.readable().await?;
        match guard.try_io(|init| container::receive(init.get_ref())) {
            Ok(result) => return result,
            Err(_would_block) => {}
        }
    }
}
