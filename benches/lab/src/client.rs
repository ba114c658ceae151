//! The lab's verbs, for tests, benchmarks and `flynn-lab`.

use crate::clean::clean;
use crate::config::{LabConfig, host_address, host_address6, host_name};
use crate::keeper::{KeeperPlan, program, socket};
use crate::protocol::{HostStatus, LabStatus, Request, Response};
use crate::stage::{Stage, hand};
use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// How long the keeper has to answer; a lab of five booting hosts takes a second or two.
const PATIENCE: Duration = Duration::from_mins(2);

/// A lab, owned (it ends when this is dropped or the process dies) or only spoken to.
pub struct Lab {
    name: String,
    dir: PathBuf,
    keeper: Option<Child>,
}

impl Lab {
    /// Boots a lab that ends with this value, or with this process however it dies.
    ///
    /// The calling program must begin its `main` with [`crate::reexec`].
    pub fn start(config: &LabConfig) -> Result<Self> {
        Self::spawn(config, false)
    }

    /// Boots a lab that stays until [`Lab::down`] or `flynn-lab down`.
    pub fn start_detached(config: &LabConfig) -> Result<Self> {
        Self::spawn(config, true)
    }

    fn spawn(config: &LabConfig, detached: bool) -> Result<Self> {
        config.check()?;
        if !rustix::process::geteuid().is_root() {
            bail!("a lab needs root, for its namespaces and mounts");
        }
        let dir = &config.dir;
        if let Some(parent) = dir.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        }
        fs::create_dir(dir)
            .with_context(|| format!("cannot make {}; is the lab there already?", dir.display()))?;
        match Self::launch(config, detached) {
            Ok(keeper) => Ok(Self {
                name: config.name.clone(),
                dir: dir.clone(),
                keeper: (!detached).then_some(keeper),
            }),
            Err(error) => {
                let said = fs::read_to_string(dir.join("lab.log")).unwrap_or_default();
                clean(&config.name, dir)?;
                Err(error.context(said.trim().to_owned())).context("the lab does not start")
            }
        }
    }

    fn launch(config: &LabConfig, detached: bool) -> Result<Child> {
        let dir = &config.dir;
        fs::copy("/proc/self/exe", program(dir)).context("cannot copy the lab's program")?;
        let log = File::create(dir.join("lab.log")).context("cannot make the lab's log")?;
        let plan = KeeperPlan {
            config: config.clone(),
            detached,
        };
        let mut keeper = Stage::Keeper
            .command(&program(dir))
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("cannot start the lab's keeper")?;
        // It is dropped, and the keeper told to end by that, together with the child.
        hand(keeper.stdin.as_mut().context("no stdin")?, &plan)?;
        let mut line = String::new();
        BufReader::new(keeper.stdout.take().context("no stdout")?).read_line(&mut line)?;
        if line.trim() != "up" {
            bail!("its keeper ended: {}", keeper.wait()?);
        }
        Ok(keeper)
    }

    /// Speaks to the lab whose state is in `dir`, if there is one.
    pub fn connect(dir: impl Into<PathBuf>) -> Result<Self> {
        let mut lab = Self {
            name: String::new(),
            dir: dir.into(),
            keeper: None,
        };
        lab.name = lab.status()?.name;
        Ok(lab)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its state directory: `lab.log`, and per host `host<n>/<service>.log`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How it is.
    pub fn status(&self) -> Result<LabStatus> {
        self.ask(&Request::Status)
    }

    /// Where the machine's side of each forward listens.
    pub fn forwards(&self) -> Result<Vec<SocketAddr>> {
        Ok(self.status()?.forwards)
    }

    /// A host, by number from 1.
    pub fn host(&self, number: u8) -> Host<'_> {
        Host { lab: self, number }
    }

    /// Lets nothing pass from one host to another, in this direction only.
    pub fn cut_one_way(&self, from: u8, to: u8) -> Result<()> {
        self.ask(&Request::Cut { from, to }).map(drop)
    }

    /// Lets nothing pass between two hosts.
    pub fn cut(&self, one: u8, other: u8) -> Result<()> {
        self.cut_one_way(one, other)?;
        self.cut_one_way(other, one)
    }

    /// Undoes all cuts between two hosts.
    pub fn mend(&self, one: u8, other: u8) -> Result<()> {
        self.ask(&Request::Mend { from: one, to: other })?;
        self.ask(&Request::Mend { from: other, to: one }).map(drop)
    }

    /// Has these links, and no others, lose frames, all at once: of a hundred frames from the first host to the second so
    /// many. A hundred is a cut; without any link all is mended.
    pub fn lose(&self, links: &[(u8, u8, u8)]) -> Result<()> {
        let links = links.to_vec();
        self.ask(&Request::Lose { links }).map(drop)
    }

    /// Frames that were lost on purpose so far.
    pub fn lost(&self) -> Result<u64> {
        Ok(self.ask(&Request::Count)?.lost)
    }

    /// Ends the lab and sees that nothing is left of it.
    pub fn down(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        // A keeper that does not answer is dealt with below.
        let asked = self.ask(&Request::Down);
        if let Some(mut keeper) = self.keeper.take() {
            if asked.is_err() {
                let _ = keeper.kill();
            }
            keeper.wait().context("cannot wait for the keeper")?;
        }
        clean(&self.name, &self.dir)
    }

    fn ask(&self, request: &Request) -> Result<LabStatus> {
        let path = socket(&self.dir);
        let mut stream =
            UnixStream::connect(&path).with_context(|| format!("no lab answers at {}", path.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        stream
            .write_all(line.as_bytes())
            .context("the lab does not listen")?;
        let mut answer = String::new();
        BufReader::new(stream)
            .read_line(&mut answer)
            .context("the lab does not answer")?;
        match serde_json::from_str(&answer).context("the lab went while it was asked")? {
            Response::Done(status) => Ok(status),
            Response::Failed(error) => bail!("{error}"),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keeper.is_some()
            && let Err(error) = self.end()
        {
            eprintln!("the lab {} is not cleanly gone: {error:#}", self.name);
        }
    }
}

/// A host of a lab.
#[derive(Clone, Copy)]
pub struct Host<'a> {
    lab: &'a Lab,
    number: u8,
}

impl Host<'_> {
    /// Its number.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Its name.
    pub fn name(&self) -> String {
        host_name(self.number)
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        host_address(self.number)
    }

    /// Its IPv6 address.
    pub fn address6(&self) -> Ipv6Addr {
        host_address6(self.number)
    }

    /// How it is.
    pub fn status(&self) -> Result<HostStatus> {
        let status = self.lab.status()?;
        let index = usize::from(self.number).checked_sub(1);
        index
            .and_then(|index| status.hosts.get(index).cloned())
            .with_context(|| format!("there is no host {}", self.number))
    }

    /// A command that runs in the host when it is started here. Arguments, environment and the three streams are set
    /// as on any command; the exit code is the command's, or 128 and the signal's number; killing it kills it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let init = self
            .status()?
            .init
            .with_context(|| format!("{} is off; boot it first", self.name()))?;
        let mut command = Stage::Exec.command(&crate::keeper::program(&self.lab.dir));
        command
            .args([&self.lab.name, &self.number.to_string(), &init.to_string()])
            .arg(program);
        Ok(command)
    }

    /// Runs a command in the host to its end.
    pub fn exec<A: AsRef<OsStr>>(&self, program: &str, args: impl IntoIterator<Item = A>) -> Result<Output> {
        let mut command = self.command(program)?;
        command.args(args).stdin(Stdio::null());
        command
            .output()
            .with_context(|| format!("cannot run {program} on {}", self.name()))
    }

    /// Runs a command in the host that must succeed, and gives what it wrote to stdout.
    pub fn run<A: AsRef<OsStr>>(&self, program: &str, args: impl IntoIterator<Item = A>) -> Result<String> {
        let output = self.exec(program, args)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!(
                "{program} on {} failed: {}: {}",
                self.name(),
                output.status,
                said.trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts a configured service that does not run.
    pub fn start(&self, service: &str) -> Result<()> {
        self.lab
            .ask(&Request::Start {
                host: self.number,
                service: service.to_owned(),
            })
            .map(drop)
    }

    /// Kills a service's process (SIGKILL), but nothing that it started.
    pub fn kill(&self, service: &str) -> Result<()> {
        self.signal(service, rustix::process::Signal::KILL.as_raw())
    }

    /// Stops a service's process where it is (SIGSTOP).
    pub fn pause(&self, service: &str) -> Result<()> {
        self.signal(service, rustix::process::Signal::STOP.as_raw())
    }

    /// Has a paused one go on (SIGCONT).
    pub fn resume(&self, service: &str) -> Result<()> {
        self.signal(service, rustix::process::Signal::CONT.as_raw())
    }

    /// Sends a service's process any signal.
    pub fn signal(&self, service: &str, signal: i32) -> Result<()> {
        self.lab
            .ask(&Request::Signal {
                host: self.number,
                service: service.to_owned(),
                signal,
            })
            .map(drop)
    }

    /// Whether a service's process is there.
    pub fn runs(&self, service: &str) -> Result<bool> {
        Ok(self.status()?.services.get(service).is_some_and(Option::is_some))
    }

    /// What a service wrote to its stdout and stderr, in all its lives.
    pub fn log(&self, service: &str) -> PathBuf {
        self.lab.dir.join(self.name()).join(format!("{service}.log"))
    }

    /// Sends a process of the host, by the host's own id for it, a signal.
    pub fn signal_process(&self, pid: u32, signal: i32) -> Result<()> {
        self.run("/bin/kill", [format!("-{signal}"), pid.to_string()])
            .map(drop)
    }

    /// Takes its power away: all processes are gone at once, and of its disk there is what was synced.
    pub fn power_cut(&self) -> Result<()> {
        self.lab.ask(&Request::PowerCut { host: self.number }).map(drop)
    }

    /// Puts it on again.
    pub fn boot(&self) -> Result<()> {
        self.lab.ask(&Request::Boot { host: self.number }).map(drop)
    }
}
