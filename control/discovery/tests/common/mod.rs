//! Members of a cluster on loopback addresses of their own: in this process, each with a runtime of its own, or as
//! processes ([`process`]).
#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    reason = "each test binary uses a part"
)]

pub mod process;

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{Instance, ServiceConfig};
use flynn_api::server::CancellationToken;
use flynn_api::tls::{self, Ca, Identity, PeerIdentity};
use flynn_discovery::Options;
use flynn_discovery::dns::Upstreams;
use flynn_discovery::raft::Timing;
use rustix::process::{Pid, WaitId, WaitIdOptions};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use self::process::Apart;

/// A cluster's CA and its members.
pub struct Cluster {
    pub ca: Ca,
    pub members: Vec<Member>,
    base: [u8; 2],
    apart: Option<Apart>,
}

/// One member.
pub struct Member {
    pub options: Options,
    pub dir: TempDir,
    /// How it is started as a process, if it is to be one.
    pub apart: Option<Apart>,
    running: Option<Running>,
}

enum Running {
    Here {
        runtime: Runtime,
        stop: CancellationToken,
        ended: Arc<AtomicBool>,
    },
    Apart(std::process::Child),
}

/// Short times, so that tests are.
pub fn timing() -> Timing {
    Timing {
        heartbeat: Duration::from_millis(50),
        election: Duration::from_millis(310),
        snapshot_after: 100,
        lease: Duration::from_mins(1),
        beat: Duration::from_millis(100),
        silence: Duration::from_millis(1400),
        settle: Duration::from_millis(100),
        ca_settle: Duration::from_millis(300),
        ..Timing::default()
    }
}

impl Cluster {
    /// A CA and no members.
    pub fn new() -> Self {
        tls::install_provider();
        let base = [rand::random_range(1..255), rand::random_range(1..255)];
        Self {
            ca: Ca::create("test cluster").unwrap(),
            members: Vec::new(),
            base,
            apart: None,
        }
    }

    /// A CA and no members, which will be processes.
    pub fn apart(apart: Apart) -> Self {
        Self {
            apart: Some(apart),
            ..Self::new()
        }
    }

    /// A running cluster of one.
    pub fn one() -> Self {
        let mut cluster = Self::new();
        cluster.add();
        cluster
    }

    /// Three running voters.
    pub async fn three() -> Self {
        Self::three_with(|_| ()).await
    }

    /// [`Cluster::three`] with other options.
    pub async fn three_with(change: impl Fn(&mut Options)) -> Self {
        let mut cluster = Self::new();
        cluster.grow(3, change).await;
        cluster
    }

    /// Adds members until there are `size`, all of them voters.
    pub async fn grow(&mut self, size: usize, change: impl Fn(&mut Options)) {
        while self.members.len() < size {
            let at = self.add_with(&change);
            if at == 0 {
                self.ready(0).await;
            }
        }
        eventually("all vote", async || {
            let peers = self.client(0).peers().await.ok()?;
            (peers.iter().filter(|peer| peer.voter).count() == size).then_some(())
        })
        .await;
    }

    /// Adds a member that makes the cluster, or joins it, and starts it.
    pub fn add(&mut self) -> usize {
        self.add_with(|_| ())
    }

    /// [`Cluster::add`] with other options.
    pub fn add_with(&mut self, change: impl FnOnce(&mut Options)) -> usize {
        let at = self.prepare(change);
        self.members[at].start();
        at
    }

    /// [`Cluster::add_with`], but does not start it.
    pub fn prepare(&mut self, change: impl FnOnce(&mut Options)) -> usize {
        let at = self.members.len();
        let host_ip = Ipv4Addr::new(127, self.base[0], self.base[1], u8::try_from(at).unwrap() + 1);
        let dir = tempfile::tempdir().unwrap();
        let api_port = self
            .members
            .first()
            .map_or_else(|| free_port(host_ip), |first| first.options.api_port);
        let dns_port = self
            .members
            .first()
            .map_or_else(|| free_port(host_ip), |first| first.options.dns_port);
        let mut options = Options {
            data: dir.path().join("data"),
            host_id: format!("h{at}"),
            host_ip,
            tls: dir.path().join("tls"),
            init: at == 0,
            join: self
                .members
                .iter()
                .map(|member| member.addr().to_string())
                .collect(),
            upstreams: Upstreams::default(),
            api_port,
            dns_port,
            timing: timing(),
        };
        change(&mut options);
        std::fs::create_dir(&options.data).unwrap();
        self.members.push(Member {
            options,
            dir,
            apart: self.apart,
            running: None,
        });
        self.move_to(at, host_ip);
        at
    }

    /// Gives a member that is not running another address.
    pub fn move_to(&mut self, at: usize, ip: Ipv4Addr) {
        let identity = PeerIdentity::Job("discoverd".into());
        let identity = self.ca.issue(&identity, &[ip.to_string()]).unwrap();
        let options = &mut self.members[at].options;
        identity.save(&options.tls).unwrap();
        options.host_ip = ip;
    }

    /// A client with this identity.
    pub fn client_as(&self, at: usize, identity: &PeerIdentity) -> DiscoveryClient {
        DiscoveryClient::new(self.http_as(at, Some(identity)))
    }

    /// A client with a host's identity.
    pub fn client(&self, at: usize) -> DiscoveryClient {
        self.client_as(at, &PeerIdentity::Host("tester".into()))
    }

    /// A transport with this identity, or with none.
    pub fn http_as(&self, at: usize, identity: Option<&PeerIdentity>) -> Http {
        let http = Http::new(&format!("https://{}", self.members[at].addr())).unwrap();
        match identity {
            Some(identity) => http.identity(&self.ca.issue(identity, &[]).unwrap()).unwrap(),
            None => http.tls(tls::joining_client_config(self.ca.fingerprint().unwrap())),
        }
        .timeout(Duration::from_secs(15))
    }

    /// Who leads, by what `at` says.
    pub async fn leader(&self, at: usize) -> Option<usize> {
        let peers = self.client(at).peers().await.ok()?;
        let leader = peers.into_iter().find(|peer| peer.leader)?;
        self.members
            .iter()
            .position(|member| member.addr().to_string() == leader.addr)
    }

    /// Waits until `at` answers and knows a leader.
    pub async fn ready(&self, at: usize) -> usize {
        eventually("a leader", async || self.leader(at).await).await
    }
}

impl Member {
    /// Its cluster listener.
    pub fn addr(&self) -> SocketAddr {
        SocketAddr::from((self.options.host_ip, self.options.api_port))
    }

    /// Starts it.
    pub fn start(&mut self) {
        assert!(self.running.is_none());
        if let Some(apart) = self.apart {
            self.running = Some(Running::Apart(process::spawn(&self.options, apart)));
            return;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let stop = CancellationToken::new();
        let ended = Arc::<AtomicBool>::default();
        let (options, stopped, end) = (self.options.clone(), stop.clone(), Arc::clone(&ended));
        runtime.spawn(async move {
            let host = options.host_id.clone();
            if let Err(error) = flynn_discovery::run(options, stopped).await {
                eprintln!("{host} ended: {error:#}");
            }
            end.store(true, Ordering::Relaxed);
        });
        self.running = Some(Running::Here { runtime, stop, ended });
    }

    /// Ends it in an orderly way.
    pub fn stop(&mut self) {
        match &self.running {
            Some(Running::Here { stop, .. }) => stop.cancel(),
            Some(Running::Apart(child)) => {
                rustix::process::kill_process(Pid::from_child(child), rustix::process::Signal::TERM).unwrap();
            }
            None => {}
        }
        let began = Instant::now();
        while !self.has_ended() {
            assert!(began.elapsed() < Duration::from_secs(20), "it does not stop");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill();
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&self) -> bool {
        match &self.running {
            Some(Running::Here { ended, .. }) => ended.load(Ordering::Relaxed),
            Some(Running::Apart(child)) => {
                let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
                let dead = rustix::process::waitid(WaitId::Pid(Pid::from_child(child)), look).unwrap();
                dead.is_some()
            }
            None => true,
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        match &self.running {
            Some(Running::Apart(child)) => child.id(),
            _ => panic!("it is not a process that runs"),
        }
    }

    /// Ends it without any notice.
    pub fn kill(&mut self) {
        self.strike();
        match self.running.take() {
            // Not from within the test's own runtime.
            Some(Running::Here { runtime, .. }) => {
                std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(5)))
                    .join()
                    .unwrap();
            }
            Some(Running::Apart(mut child)) => {
                child.wait().unwrap();
            }
            None => {}
        }
    }

    /// Kills the process and does not wait until it is gone.
    pub fn strike(&mut self) {
        if let Some(Running::Apart(child)) = &mut self.running {
            child.kill().unwrap();
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        match self.running.take() {
            Some(Running::Here { runtime, .. }) => runtime.shutdown_background(),
            Some(Running::Apart(mut child)) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            None => {}
        }
    }
}

pub fn free_port(ip: Ipv4Addr) -> u16 {
    TcpListener::bind((ip, 0)).unwrap().local_addr().unwrap().port()
}

/// Asks again until there is an answer; fails the test after a minute.
pub async fn eventually<T>(what: &str, ask: impl AsyncFn() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(
            began.elapsed() < Duration::from_mins(1),
            "waited too long for {what}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Makes a service.
pub async fn create(client: &DiscoveryClient, service: &str) {
    client
        .create_service(service, &ServiceConfig::default())
        .await
        .unwrap();
}

/// An instance at this address.
pub fn instance(addr: &str) -> Instance {
    Instance::new("http", addr, flynn_api::Meta::new())
}

/// The identity in a directory.
pub fn identity(dir: &Path) -> Identity {
    Identity::load(dir).unwrap()
}

/// Runs a test's future.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}
