//! A host as the keeper sees it: a monitor process, services, and a disk in its nth generation.

use crate::cgroup::Group;
use crate::config::{LabConfig, Service, host_address, host_address6, host_name};
use crate::disk::Pool;
use crate::protocol::HostStatus;
use crate::stage::{HostPlan, Stage, hand};
use crate::switch::Switch;
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Stdio};

/// A host, on or off.
pub(crate) struct MachineHost {
    number: u8,
    group: Group,
    dir: PathBuf,
    program: PathBuf,
    generation: u32,
    power: Option<Power>,
}

/// What there is while a host is on.
struct Power {
    monitor: Child,
    init: i32,
    services: BTreeMap<String, Running>,
}

/// A service's process, as a handle that cannot come to mean another.
struct Running {
    helper: Child,
    pid: i32,
    handle: OwnedFd,
}

impl MachineHost {
    /// A host that has never been on, with an empty disk.
    pub(crate) fn new(
        config: &LabConfig,
        number: u8,
        lab: &Group,
        program: PathBuf,
        pool: &Pool,
    ) -> Result<Self> {
        let dir = config.dir.join(host_name(number));
        fs::create_dir_all(dir.join("stage")).with_context(|| format!("cannot make {}", dir.display()))?;
        pool.make(number, config.disk)?;
        Ok(Self {
            number,
            group: lab.child(&host_name(number)),
            dir,
            program,
            generation: 0,
            power: None,
        })
    }

    /// Puts it on and starts its services.
    pub(crate) fn boot(&mut self, config: &LabConfig, pool: &Pool, switch: &Switch) -> Result<()> {
        if self.running() {
            bail!("{} is on already", host_name(self.number));
        }
        self.sweep(switch)?;
        match self.start(config, pool, switch) {
            Ok(power) => self.power = Some(power),
            Err(error) => {
                // Whatever it got to is of no use.
                self.group.kill()?;
                return Err(error).with_context(|| format!("{} does not boot", host_name(self.number)));
            }
        }
        config
            .services
            .iter()
            .try_for_each(|service| self.start_service(config, &service.name))
    }

    fn start(&self, config: &LabConfig, pool: &Pool, switch: &Switch) -> Result<Power> {
        self.group.make()?;
        let plan = HostPlan {
            lab: config.name.clone(),
            number: self.number,
            hosts: config.hosts,
            group: self.group.clone(),
            stage: self.dir.join("stage"),
            disk: pool.image(self.number, self.generation),
            program: self.program.clone(),
            binds: config.binds.clone(),
        };
        let mut monitor = Stage::Monitor
            .command(&self.program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the monitor")?;
        let mut stdin = monitor.stdin.take().context("no stdin")?;
        hand(&mut stdin, &plan)?;
        let mut said = BufReader::new(monitor.stdout.take().context("no stdout")?);
        if hear(&mut said)? != "ready" {
            bail!("its monitor failed: {}; the lab's log says why", monitor.wait()?);
        }
        switch.plug(self.number, monitor.id())?;
        stdin.write_all(b"go\n")?;
        let answer = hear(&mut said)?;
        let Some(init) = answer.strip_prefix("init ") else {
            bail!("its monitor failed: {}; the lab's log says why", monitor.wait()?);
        };
        Ok(Power {
            monitor,
            init: init.parse()?,
            services: BTreeMap::new(),
        })
    }

    /// Whether it is on; a host whose process 1 died is off.
    fn running(&mut self) -> bool {
        self.power
            .as_mut()
            .is_some_and(|power| matches!(power.monitor.try_wait(), Ok(None)))
    }

    fn power(&mut self) -> Result<&mut Power> {
        if !self.running() {
            bail!("{} is off; boot it first", host_name(self.number));
        }
        self.power.as_mut().context("the host is off")
    }

    /// Removes what a host that is off has left in the kernel.
    fn sweep(&mut self, switch: &Switch) -> Result<()> {
        if let Some(mut power) = self.power.take() {
            // It may be there still, with the host's end of the cable in a namespace that is being taken down.
            let _ = switch.unplug(self.number);
            self.group.kill()?;
            let _ = power.monitor.wait();
            for running in power.services.values_mut() {
                let _ = running.helper.wait();
                // Killed at the same moment as its parent, it has come to the keeper.
                let _ = waitpid(Pid::from_raw(running.pid), WaitOptions::empty());
            }
        }
        self.group.remove()
    }

    /// Starts one of the configured services.
    pub(crate) fn start_service(&mut self, config: &LabConfig, name: &str) -> Result<()> {
        let service = config.services.iter().find(|service| service.name == name);
        let service = service.with_context(|| format!("there is no service {name}"))?;
        let (number, program) = (self.number, self.program.clone());
        let log = self.dir.join(format!("{name}.log"));
        let power = self.power()?;
        if power.services.get_mut(name).is_some_and(Running::alive) {
            bail!("{name} runs already on {}", host_name(number));
        }
        let mut helper = Stage::Exec.command(&program);
        helper
            .arg("--log")
            .arg(log)
            .args([&config.name, &number.to_string(), &power.init.to_string()]);
        let (args, env) = filled_in(service, number);
        helper
            .args(args)
            .envs(env)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut helper = helper.spawn().context("cannot start the helper")?;
        let pid = hear(&mut BufReader::new(helper.stdout.take().context("no stdout")?))?;
        let Ok(pid) = pid.parse::<i32>() else {
            bail!(
                "{name} does not start: {}; the lab's log says why",
                helper.wait()?
            );
        };
        let handle = Pid::from_raw(pid).context("no process")?;
        let handle =
            pidfd_open(handle, PidfdFlags::empty()).with_context(|| format!("{name} ended at once"))?;
        power
            .services
            .insert(name.to_owned(), Running { helper, pid, handle });
        Ok(())
    }

    /// Sends a service's process a signal. A killed one is waited for.
    pub(crate) fn signal(&mut self, name: &str, signal: i32) -> Result<()> {
        let number = self.number;
        let signal =
            Signal::from_named_raw(signal).with_context(|| format!("there is no signal {signal}"))?;
        let Some(running) = self.power()?.services.get_mut(name) else {
            bail!("{name} was never started on {}", host_name(number))
        };
        pidfd_send_signal(&running.handle, signal).with_context(|| format!("{name} does not run"))?;
        if signal == Signal::KILL {
            running.helper.wait()?;
        }
        Ok(())
    }

    /// Takes its power away: what was not synced is lost.
    pub(crate) fn power_cut(&mut self, pool: &Pool, switch: &Switch) -> Result<()> {
        self.power()?;
        // In this order: from here on the world hears no more of it, nothing in it goes on, and only then is its disk
        // copied; so nothing that anyone was told of can be missing from the copy, but for what was not synced.
        switch.unplug(self.number)?;
        self.group.freeze()?;
        pool.snapshot(self.number, self.generation)?;
        self.sweep(switch)?;
        self.generation += 1;
        pool.drop_image(self.number, self.generation - 1)
    }

    /// Ends it for good.
    pub(crate) fn end(&mut self, switch: &Switch) -> Result<()> {
        self.sweep(switch)
    }

    /// How it is.
    pub(crate) fn status(&mut self, services: &[Service]) -> HostStatus {
        let on = self.running();
        let power = self.power.as_mut().filter(|_| on);
        let init = power.as_ref().map(|power| power.init);
        let mut alive = BTreeMap::new();
        if let Some(power) = power {
            for (name, running) in &mut power.services {
                if running.alive() {
                    alive.insert(name.clone(), running.pid);
                }
            }
        }
        let services = services
            .iter()
            .map(|service| (service.name.clone(), alive.get(&service.name).copied()));
        HostStatus {
            number: self.number,
            power_cuts: self.generation,
            init,
            services: services.collect(),
        }
    }
}

impl Running {
    fn alive(&mut self) -> bool {
        matches!(self.helper.try_wait(), Ok(None))
    }
}

/// One line of what a process of ours says; empty at its end.
fn hear(said: &mut BufReader<ChildStdout>) -> Result<String> {
    let mut line = String::new();
    said.read_line(&mut line)
        .context("cannot hear a process of the lab")?;
    Ok(line.trim_end().to_owned())
}

/// A service's command and environment for a host.
fn filled_in(service: &Service, host: u8) -> (Vec<String>, BTreeMap<String, String>) {
    let fill = |text: &String| {
        text.replace("{host}", &host_name(host))
            .replace("{address}", &host_address(host).to_string())
            .replace("{address6}", &host_address6(host).to_string())
    };
    let env = service
        .env
        .iter()
        .map(|(name, value)| (name.clone(), fill(value)))
        .collect();
    (service.command.iter().map(fill).collect(), env)
}
