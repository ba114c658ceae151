//! The one cluster that the tests share, made as far as a test needs it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use flynn_cluster_tests::{Artifacts, Platform};
use libtest_mimic::Failed;

/// The app that the tests deploy.
pub(crate) const APP: &str = "example";

/// The hosts of the cluster once all have joined.
pub(crate) const MEMBERS: [u8; 3] = [1, 2, 3];

/// A host of the lab that never joins.
pub(crate) const STRANGER: u8 = 4;

/// The cluster, as far as it is there.
pub(crate) struct Cluster {
    artifacts: Option<Artifacts>,
    platform: Option<Platform>,
    /// What bootstrap took.
    pub(crate) took: Duration,
    app: bool,
    other: bool,
    echo: bool,
    joined: bool,
    /// Why it could not be made: said once more to each test that wants it, and not tried again.
    broken: Option<String>,
}

pub(crate) type Shared = Arc<Mutex<Cluster>>;

pub(crate) fn shared(artifacts: Option<Artifacts>) -> Shared {
    Arc::new(Mutex::new(Cluster {
        artifacts,
        platform: None,
        took: Duration::ZERO,
        app: false,
        other: false,
        echo: false,
        joined: false,
        broken: None,
    }))
}

/// Runs a test; shows what the platform's processes said when it fails.
pub(crate) fn run(shared: &Shared, test: crate::Test) -> Result<(), Failed> {
    let mut cluster = shared.lock().map_err(|_| "an earlier test panicked")?;
    test(&mut cluster).map_err(|error| {
        if let Some(platform) = &cluster.platform {
            platform.dump();
        }
        // After all that, for whoever sees the end alone.
        eprintln!("    it failed: {error:#}");
        format!("{error:#}").into()
    })
}

impl Cluster {
    /// A cluster that is up and known to the command line.
    pub(crate) fn platform(&mut self) -> Result<&Platform> {
        if let Some(why) = &self.broken {
            bail!("{why}");
        }
        if self.platform.is_none() {
            self.make()
                .inspect_err(|error| self.broken = Some(format!("there is no cluster: {error:#}")))?;
        }
        self.platform.as_ref().context("the cluster was taken down")
    }

    /// What was built.
    pub(crate) fn artifacts(&self) -> Result<&Artifacts> {
        self.artifacts.as_ref().context("nothing is built")
    }

    fn make(&mut self) -> Result<()> {
        let artifacts = self.artifacts()?;
        let name = format!("test-{}", std::process::id());
        let platform = self.platform.insert(Platform::boot(&name, artifacts, STRANGER)?);
        let made = platform.bootstrap().and_then(|took| {
            self.took = took;
            platform.cluster_add()
        });
        made.inspect_err(|_| platform.dump())
    }

    /// A cluster on which the example app answers.
    pub(crate) fn app(&mut self) -> Result<&Platform> {
        self.platform()?;
        let platform = self.platform.as_ref().ok_or_else(|| anyhow!("no cluster"))?;
        if !self.app {
            platform.push_example(APP)?;
            self.app = true;
        }
        Ok(platform)
    }

    /// A second app of the example.
    pub(crate) fn other(&mut self, name: &str) -> Result<&Platform> {
        self.platform()?;
        let platform = self.platform.as_ref().ok_or_else(|| anyhow!("no cluster"))?;
        if !self.other {
            platform.push_example(name)?;
            self.other = true;
        }
        Ok(platform)
    }

    /// A cluster of all hosts with an app that echoes TCP and UDP.
    pub(crate) fn echo(&mut self, name: &str) -> Result<&Platform> {
        self.members()?;
        let platform = self.platform.as_ref().ok_or_else(|| anyhow!("no cluster"))?;
        if !self.echo {
            crate::routes::push(platform, name)?;
            self.echo = true;
        }
        Ok(platform)
    }

    /// A cluster of all hosts.
    pub(crate) fn members(&mut self) -> Result<&Platform> {
        self.platform()?;
        let platform = self.platform.as_ref().ok_or_else(|| anyhow!("no cluster"))?;
        if !self.joined {
            for host in &MEMBERS[1..] {
                crate::join::join(platform, *host)?;
            }
            self.joined = true;
        }
        Ok(platform)
    }

    /// Takes the cluster away from the tests that follow.
    pub(crate) fn take(&mut self) -> Result<Platform> {
        self.platform()?;
        self.broken = Some("the cluster was taken down by an earlier test".into());
        self.platform.take().context("no cluster")
    }
}
