//! What bootstrap does, one function per step. Each finds out what is done already and goes on from there.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use flynn_api::client::Http;
use flynn_api::client::controller::ControllerClient;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::controller::{Formation, JobState};
use flynn_api::discovery::{CA_SERVICE, ClusterCa, ServiceConfig, ServiceMeta};
use flynn_api::host::{ActiveJob, Job, JobState as HostJobState, NetworkConfig, label};
use flynn_api::tls::{Ca, Identity, PeerIdentity};
use flynn_api::{Error, ErrorCode};
use futures::StreamExt as _;
use ipnet::Ipv4Net;
use tokio::time::Instant;

use super::manifest::{self, SystemApp};
use super::state::State;
use super::{Bootstrap, images};
use crate::leases;

impl Bootstrap {
    /// Certificates: this host's, and one for each app of the platform, before there is anybody else to sign them.
    pub(super) fn certificates(&self, apps: &[SystemApp]) -> anyhow::Result<()> {
        if self.state.ca_key.is_empty() {
            return Ok(());
        }
        let ca = Ca::from_pem(&*self.state.ca_cert, &*self.state.ca_key)?;
        let address = self.address.to_string();
        let issue = |dir: &Path, identity: PeerIdentity, sans: &[String]| -> anyhow::Result<()> {
            if Identity::load(dir).is_ok_and(|found| found.ca_pem == self.state.ca_cert) {
                return Ok(());
            }
            Ok(ca.issue(&identity, sans)?.save(dir)?)
        };
        issue(
            &crate::identities::host_dir(&self.dir),
            PeerIdentity::Host(self.host_id.clone()),
            std::slice::from_ref(&address),
        )?;
        for app in apps {
            let sans = [address.clone(), format!("{}.discoverd", app.name)];
            issue(
                &crate::identities::app_dir(&self.dir, &app.name),
                PeerIdentity::Job(app.name.clone()),
                &sans,
            )?;
        }
        Ok(())
    }

    /// Starts an app through the host's API, unless it runs.
    pub(super) async fn start(&mut self, app: &SystemApp) -> anyhow::Result<()> {
        let image = images::find(&self.dir, &app.image)?;
        let ids = self.state.ids(&app.name).clone();
        self.state.save(&self.dir)?;
        let formation = app.formation(&ids, &image);
        for (process_type, count) in &app.scale {
            let running = self.running(&ids.app, process_type).await?;
            for index in running.len()..*count as usize {
                let id = format!("{}-{}", self.host_id, uuid::Uuid::new_v4());
                let index = u32::try_from(index)?;
                let mut job = formation
                    .job(process_type, &id, index)
                    .with_context(|| format!("{} has no process type {process_type}", app.name))?;
                first_of_its_kind(&app.name, &mut job);
                self.host
                    .add_job(&job)
                    .await
                    .with_context(|| format!("cannot start {}", app.name))?;
            }
            for job in self.running(&ids.app, process_type).await? {
                self.wait_healthy(&app.name, &job.job.id).await?;
            }
        }
        Ok(())
    }

    async fn running(&self, app_id: &str, process_type: &str) -> anyhow::Result<Vec<ActiveJob>> {
        let is = |job: &ActiveJob, name: &str, value: &str| {
            job.job.metadata.get(name).is_some_and(|is| is == value)
        };
        let jobs = self.host.jobs().await?.into_values();
        Ok(jobs
            .filter(|job| !job.status.is_terminal())
            .filter(|job| is(job, label::APP_ID, app_id) && is(job, label::PROCESS_TYPE, process_type))
            .collect())
    }

    async fn wait_healthy(&self, name: &str, id: &str) -> anyhow::Result<()> {
        let waited = self
            .wait(&format!("{name} is healthy"), async || {
                let job = self.host.job(id).await?;
                match job.status {
                    HostJobState::Running if job.healthy => Ok(Some(())),
                    HostJobState::Failed | HostJobState::Crashed | HostJobState::Done => {
                        let why = job
                            .error
                            .unwrap_or_else(|| format!("exit status {:?}", job.exit_status));
                        Err(Error::internal(format!("{name} did not stay up: {why}")))
                    }
                    _ => Ok(None),
                }
            })
            .await;
        match waited {
            Ok(()) => Ok(()),
            Err(error) => Err(error.context(format!("the end of its log:\n{}", self.log_end(id).await))),
        }
    }

    async fn log_end(&self, id: &str) -> String {
        let Ok(lines) = self.host.log(id, Some(20), false).await else {
            return "(no log)".into();
        };
        let lines = lines
            .take(20)
            .filter_map(async |line| line.ok().map(|(_, line)| format!("  {}\n", line.msg)));
        tokio::time::timeout(Duration::from_secs(5), lines.collect::<String>())
            .await
            .unwrap_or_default()
    }

    /// Discoverd over mutual TLS, as this host.
    pub(super) fn discoverd(&self) -> anyhow::Result<DiscoveryClient> {
        let identity = Identity::load(&crate::identities::host_dir(&self.dir))?;
        let url = format!("https://{}:{}", self.address, flynn_api::discovery::PORT);
        Ok(DiscoveryClient::new(
            Http::new(&url)?
                .identity(&identity)?
                .timeout(Duration::from_secs(10)),
        ))
    }

    /// Hands the CA to discoverd; from then on its leader signs.
    pub(super) async fn hand_over_ca(&mut self) -> anyhow::Result<()> {
        let discoverd = self.discoverd()?;
        self.wait("discoverd answers", async || discoverd.ping().await.map(Some))
            .await?;
        if self.state.ca_key.is_empty() {
            return Ok(());
        }
        self.wait("discoverd takes the CA", async || {
            discoverd
                .ensure_service(CA_SERVICE, &ServiceConfig::default())
                .await?;
            if discoverd.find_meta(CA_SERVICE).await?.is_none() {
                let ca = ClusterCa::new(&*self.state.ca_cert, &*self.state.ca_key);
                let data = serde_json::to_value(ca).map_err(|why| Error::internal(why.to_string()))?;
                discoverd
                    .set_meta(
                        CA_SERVICE,
                        &ServiceMeta {
                            data,
                            index: 0,
                            leader_id: None,
                        },
                    )
                    .await?;
            }
            Ok(Some(()))
        })
        .await?;
        self.state.ca_key.clear();
        self.state.save(&self.dir)?;
        Ok(())
    }

    /// Says where services' virtual addresses are from.
    pub(super) async fn set_virtual_networks(&self) -> anyhow::Result<()> {
        let discoverd = self.discoverd()?;
        self.wait("discoverd knows the services' network", async || {
            discoverd
                .set_virtual_networks(&self.virtual_networks)
                .await
                .map(Some)
        })
        .await
    }

    /// Takes a subnet for this host and brings its network up.
    pub(super) async fn network(&mut self) -> anyhow::Result<Ipv4Addr> {
        let discoverd = self.discoverd()?;
        let networks = Some(&self.networks);
        let (leases, lease, _) = self
            .wait("this host holds a subnet", async || {
                leases::take_in(&discoverd, networks, &self.host_id, self.address)
                    .await
                    .map(Some)
            })
            .await?;
        let config = NetworkConfig {
            network: leases.network,
            subnet: lease.subnet.clone(),
            network6: leases.network6,
        };
        self.host
            .configure_network(&config)
            .await
            .context("cannot bring the host's network up")?;
        let subnet: Ipv4Net = lease
            .subnet
            .parse()
            .map_err(|why| anyhow::anyhow!("{}: {why}", lease.subnet))?;
        let gateway = Ipv4Addr::from(u32::from(subnet.network()) + 1);
        let plain = DiscoveryClient::new(Http::new(&format!(
            "http://{gateway}:{}",
            flynn_api::discovery::PORT
        ))?);
        self.wait("discoverd answers on the gateway address", async || {
            plain.ping().await.map(Some)
        })
        .await?;
        self.gateway = Some(plain);
        Ok(gateway)
    }

    /// Waits until a service has a leader.
    pub(super) async fn wait_leader(&self, service: &str) -> anyhow::Result<()> {
        let discoverd = self.gateway.as_ref().context("the network is not up")?;
        self.wait(&format!("{service} has a leader"), async || {
            found(discoverd.leader(service).await)
        })
        .await
        .map(drop)
    }

    /// The controller, by the address that discoverd knows.
    pub(super) async fn controller(&self) -> anyhow::Result<ControllerClient> {
        let discoverd = self.gateway.as_ref().context("the network is not up")?;
        let instance = self
            .wait("the controller is found", async || {
                found(discoverd.leader("controller").await)
            })
            .await?;
        let http =
            Http::new(&format!("http://{}", instance.addr))?.password(self.state.secret("CONTROLLER_KEY"));
        let controller = ControllerClient::new(http);
        self.wait("the controller answers", async || {
            controller.ping().await.map(Some)
        })
        .await?;
        Ok(controller)
    }

    /// Tells the controller of an app, its release, its formation and its routes.
    pub(super) async fn adopt(
        &mut self,
        controller: &ControllerClient,
        app: &SystemApp,
    ) -> anyhow::Result<()> {
        let image = images::find(&self.dir, &app.image)?;
        let ids = self.state.ids(&app.name).clone();
        self.state.save(&self.dir)?;
        let context = || format!("cannot make {} known to the controller", app.name);
        let artifact = controller
            .create_artifact(&manifest::artifact(&image))
            .await
            .with_context(context)?;
        controller
            .create_app(&app.app(&ids))
            .await
            .with_context(context)?;
        controller
            .create_release(&app.release(&ids, &artifact.id))
            .await
            .with_context(context)?;
        // A bootstrap that goes on must not undo what an operator has deployed since.
        let current = controller.app(&ids.app).await?.release_id;
        if current.is_some_and(|current| current != ids.release) {
            return Ok(());
        }
        controller
            .set_app_release(&ids.app, &ids.release)
            .await
            .with_context(context)?;
        let formation = Formation {
            app_id: ids.app.clone(),
            release_id: ids.release.clone(),
            processes: app.scale.clone(),
            ..Formation::default()
        };
        controller.put_formation(&formation).await.with_context(context)?;
        for route in &app.routes {
            match controller.create_route(&ids.app, route).await {
                Err(error) if matches!(error.code, ErrorCode::ObjectExists | ErrorCode::Conflict) => {}
                result => drop(result.with_context(context)?),
            }
        }
        Ok(())
    }

    /// Waits until the scheduler reports an app's jobs as up.
    pub(super) async fn wait_up(&self, controller: &ControllerClient, app: &SystemApp) -> anyhow::Result<()> {
        let Some(ids) = self.state.apps.get(&app.name) else {
            bail!("{} has no id", app.name)
        };
        self.wait(&format!("{} is up", app.name), async || {
            let mut up: BTreeMap<String, u32> = BTreeMap::new();
            for job in controller.jobs(&ids.app).await? {
                if job.state == JobState::Up {
                    *up.entry(job.process_type).or_default() += 1;
                }
            }
            let all = app
                .scale
                .iter()
                .all(|(name, count)| up.get(name).is_some_and(|up| up >= count));
            Ok(all.then_some(()))
        })
        .await
    }

    /// Asks until there is an answer. Failures that may pass are asked again until the time limit.
    async fn wait<T, F>(&self, what: &str, mut ask: impl FnMut() -> F) -> anyhow::Result<T>
    where
        F: Future<Output = Result<Option<T>, Error>>,
    {
        let deadline = Instant::now() + self.step_timeout;
        let mut pause = Duration::from_millis(20);
        loop {
            let last = match ask().await {
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) => None,
                Err(error)
                    if error.retry
                        || matches!(error.code, ErrorCode::Conflict | ErrorCode::PreconditionFailed) =>
                {
                    Some(error)
                }
                Err(error) => return Err(anyhow::Error::from(error).context(format!("waited until {what}"))),
            };
            if Instant::now() >= deadline {
                let seconds = self.step_timeout.as_secs();
                let why = last.map_or(String::new(), |error| format!("; the last answer: {error}"));
                bail!("gave up after {seconds} s of waiting until {what}{why}");
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(250));
        }
    }
}

/// Takes not-found for not yet.
fn found<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Err(error) if error.code == ErrorCode::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// Discoverd's very first process makes the Raft cluster that all later ones find or join.
fn first_of_its_kind(app: &str, job: &mut Job) {
    if app == "discoverd" {
        job.config.env.insert("DISCOVERD_INIT".into(), "true".into());
    }
}

impl State {
    /// What the operator types to use the cluster.
    pub(super) fn cluster_add(&self) -> anyhow::Result<String> {
        Ok(format!(
            "flynn cluster add -p {} default {} {}",
            self.tls_pin()?,
            self.domain,
            self.secret("CONTROLLER_KEY")
        ))
    }
}
