//! Five hosts with discoverd, and what is known of each at any moment.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::tls::{Ca, Identity, PeerIdentity};
use flynn_lab::netns::{inside, ip};
use flynn_lab::{Bind, Lab, LabConfig, Service, host_address, host_name, until};
use rustix::process::Signal;
use tokio::sync::watch;

pub(crate) const HOSTS: u8 = 5;
/// What the lab calls it.
const DISCOVERD: &str = "discoverd";
/// Where hosts have the program of this test, which is discoverd as well.
const PROGRAM: &str = "/usr/local/bin/discoverd-under-test";
/// Set in the environment of that.
pub(crate) const UNDER_TEST: &str = "DISCOVERD_UNDER_TEST";
/// Where hosts have their disk.
const DISK: &str = "/var/lib/flynn";
/// How long a process may take to end when it is told to.
const PATIENCE: Duration = Duration::from_secs(30);

/// How a host is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Condition {
    /// Its process 1, when it has power.
    pub(crate) init: Option<i32>,
    /// discoverd runs and is not paused.
    pub(crate) serves: bool,
    /// Since when.
    pub(crate) since: Instant,
}

pub(crate) struct Bed {
    pub(crate) lab: Lab,
    pub(crate) identity: Identity,
    conditions: Vec<watch::Sender<Condition>>,
    _dir: tempfile::TempDir,
}

/// The first address of a host's subnet.
pub(crate) fn gateway(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 100, host, 1)
}

/// All hosts, by number.
pub(crate) fn hosts() -> impl Iterator<Item = u8> {
    1..=HOSTS
}

impl Bed {
    pub(crate) fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let ca = Ca::create("faults")?;
        let addresses: Vec<String> = hosts().map(|host| host_address(host).to_string()).collect();
        let tls = dir.path().join("tls");
        ca.issue(&PeerIdentity::Job("discoverd".into()), &addresses)?
            .save(&tls)?;

        let name = format!("faults-{}", std::process::id());
        let mut config = LabConfig::new(name, dir.path().join("lab"), HOSTS);
        config.disk = 128 << 20;
        config.binds = vec![
            Bind {
                from: std::env::current_exe()?,
                to: PROGRAM.into(),
            },
            Bind {
                from: tls,
                to: "/etc/flynn/tls".into(),
            },
        ];
        let env = [
            (UNDER_TEST, "true".to_owned()),
            ("HOST_ID", "{host}".to_owned()),
            ("HOST_IP", "{address}".to_owned()),
            ("DISCOVERD_DATA", format!("{DISK}/discoverd")),
            ("DISCOVERD_JOIN", addresses.join(",")),
        ];
        config.services = vec![Service {
            name: DISCOVERD.into(),
            command: vec![PROGRAM.into()],
            env: env.map(|(name, value)| (name.to_owned(), value)).into(),
        }];
        let lab = Lab::start(&config)?;
        let off = Condition {
            init: None,
            serves: false,
            since: Instant::now(),
        };
        let bed = Self {
            lab,
            identity: ca.issue(&PeerIdentity::Host("tester".into()), &[])?,
            conditions: hosts().map(|_| watch::Sender::new(off)).collect(),
            _dir: dir,
        };
        hosts().try_for_each(|host| bed.is_on(host))?;
        Ok(bed)
    }

    /// How a host is, now and from now on.
    pub(crate) fn condition(&self, host: u8) -> watch::Receiver<Condition> {
        self.conditions[usize::from(host - 1)].subscribe()
    }

    fn set(&self, host: u8, init: Option<i32>, serves: bool) {
        self.conditions[usize::from(host - 1)].send_replace(Condition {
            init,
            serves,
            since: Instant::now(),
        });
    }

    /// From now on discoverd answers at a host, or it does not.
    pub(crate) fn serves(&self, host: u8, serves: bool) {
        let init = self.condition(host).borrow().init;
        self.set(host, init, serves);
    }

    /// A host has booted: it gets what `flynn-host` would give it, the gateway address.
    fn is_on(&self, host: u8) -> Result<()> {
        let init = self.lab.host(host).status()?.init.context("it is off")?;
        let line = format!("address add {}/32 dev lo\n", gateway(host));
        within(init, || ip(&line))?;
        self.set(host, Some(init), true);
        Ok(())
    }

    /// Does something on the network of a host, on a thread of its own.
    pub(crate) fn at<T: Send>(&self, host: u8, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let init = self.condition(host).borrow().init.context("the host is off")?;
        within(init, work)
    }

    /// A client of a host's cluster listener.
    pub(crate) fn client(&self, host: u8) -> Result<DiscoveryClient> {
        client(&self.identity, host)
    }

    /// Calls a host's discoverd from that host.
    pub(crate) fn call<T: Send>(
        &self,
        host: u8,
        call: impl AsyncFnOnce(&DiscoveryClient) -> flynn_api::Result<T> + Send,
    ) -> Result<T> {
        let client = self.client(host)?;
        self.at(host, || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            Ok(runtime.block_on(call(&client))?)
        })
    }

    pub(crate) fn kill(&self, host: u8) -> Result<()> {
        self.serves(host, false);
        self.lab.host(host).kill(DISCOVERD)?;
        ensure!(!self.lab.host(host).runs(DISCOVERD)?, "a killed discoverd runs");
        Ok(())
    }

    /// Tells it to end, and waits until it has.
    pub(crate) fn stop(&self, host: u8) -> Result<()> {
        self.serves(host, false);
        self.lab.host(host).signal(DISCOVERD, Signal::TERM.as_raw())?;
        until(PATIENCE, "discoverd to end", || {
            Ok(!self.lab.host(host).runs(DISCOVERD)?)
        })
    }

    pub(crate) fn start_again(&self, host: u8) -> Result<()> {
        self.lab.host(host).start(DISCOVERD)?;
        self.serves(host, true);
        Ok(())
    }

    pub(crate) fn pause(&self, host: u8) -> Result<()> {
        self.serves(host, false);
        self.lab.host(host).pause(DISCOVERD)?;
        let status = self.lab.host(host).status()?;
        let pid = status.services[DISCOVERD].context("a paused discoverd is gone")?;
        until(PATIENCE, "discoverd to stop where it is", || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
            // The state comes after the name, which is in brackets.
            Ok(stat
                .rsplit(')')
                .next()
                .is_some_and(|rest| rest.trim_start().starts_with('T')))
        })
    }

    pub(crate) fn resume(&self, host: u8) -> Result<()> {
        self.lab.host(host).resume(DISCOVERD)?;
        self.serves(host, true);
        Ok(())
    }

    /// Takes the power of hosts away at one moment: none does anything when the first goes.
    pub(crate) fn power_cut(&self, hosts: &[u8]) -> Result<()> {
        for host in hosts {
            self.set(*host, None, false);
            self.lab.host(*host).pause(DISCOVERD)?;
        }
        for host in hosts {
            let before = self.lab.host(*host).status()?.power_cuts;
            self.lab.host(*host).power_cut()?;
            let now = self.lab.host(*host).status()?;
            ensure!(
                now.power_cuts == before + 1 && now.init.is_none(),
                "a host has power"
            );
        }
        Ok(())
    }

    pub(crate) fn boot(&self, host: u8) -> Result<()> {
        self.lab.host(host).boot()?;
        self.is_on(host)
    }

    /// A file of a host's disk, seen from outside.
    pub(crate) fn on_disk(&self, host: u8, name: &str) -> Result<PathBuf> {
        let init = self.condition(host).borrow().init.context("the host is off")?;
        Ok(format!("/proc/{init}/root{DISK}/{name}").into())
    }

    /// Fails when a discoverd has ended that nobody has told to.
    pub(crate) fn all_run_that_should(&self) -> Result<()> {
        for host in hosts().filter(|host| self.condition(*host).borrow().serves) {
            ensure!(
                self.lab.host(host).runs(DISCOVERD)?,
                "discoverd of {} has ended by itself",
                host_name(host)
            );
        }
        Ok(())
    }

    /// The last lines that each discoverd has written.
    pub(crate) fn said(&self, lines: usize) -> String {
        let mut text = String::new();
        for host in hosts() {
            let log = std::fs::read_to_string(self.lab.host(host).log(DISCOVERD)).unwrap_or_default();
            let all: Vec<&str> = log.lines().collect();
            let last = &all[all.len().saturating_sub(lines)..];
            text.push_str(&format!("--- {} ---\n{}\n", host_name(host), last.join("\n")));
        }
        text
    }
}

/// A client of a host's cluster listener.
pub(crate) fn client(identity: &Identity, host: u8) -> Result<DiscoveryClient> {
    let url = format!("https://{}:{}", host_address(host), flynn_api::discovery::PORT);
    let http = Http::new(&url)?.identity(identity)?;
    Ok(DiscoveryClient::new(http.timeout(Duration::from_secs(3))))
}

/// Does something on the network of the host whose process 1 this is, on a thread of its own.
pub(crate) fn within<T: Send>(init: i32, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = File::open(format!("/proc/{init}/ns/net")).context("cannot open a host's network")?;
    inside(namespace.as_fd(), work)
}
