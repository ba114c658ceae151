//! Three members of either, as processes, on addresses of their own of the loopback device.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{MemberStatus, Peer};
use flynn_api::tls::{Ca, Identity, PeerIdentity};
use hyper::Method;

use super::client::Client;
use super::wire::{self, Grpc, Http1};

/// Members of a cluster.
pub(crate) const MEMBERS: usize = 3;
/// How long a cluster may take until it is as it should be.
const PATIENCE: Duration = Duration::from_mins(1);

/// Whose cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Ours,
    Etcd,
}

/// Whether a member votes and is as far as the leader.
fn well(member: &MemberStatus) -> bool {
    /// Entries that may be under way.
    const LAG: u64 = 20;
    member.peer.voter
        && member.lag.is_some_and(|lag| lag < LAG)
        && member.silent_ms.is_some_and(|silent| silent < 1_000)
}

/// A cluster, until dropped.
pub(crate) struct Cluster {
    pub(crate) kind: Kind,
    pub(crate) identity: Identity,
    ca: Ca,
    dir: PathBuf,
    members: Vec<Member>,
}

struct Member {
    ip: Ipv4Addr,
    child: Child,
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Cluster {
    /// Starts the members in `dir`.
    pub(crate) async fn start(kind: Kind, dir: &Path) -> Result<Self> {
        let ca = Ca::create("bench")?;
        let identity = ca.issue(&PeerIdentity::Host("bench".into()), &["127.0.0.1".to_owned()])?;
        let mut cluster = Self {
            kind,
            identity,
            ca,
            dir: dir.to_owned(),
            members: Vec::new(),
        };
        for at in 0..MEMBERS {
            cluster.add(cluster.ip(at))?;
            if at == 0 && kind == Kind::Ours {
                cluster.wait(1).await?;
            }
        }
        cluster.wait(MEMBERS).await?;
        Ok(cluster)
    }

    /// The address of the member `at`.
    pub(crate) fn ip(&self, at: usize) -> Ipv4Addr {
        let net = if self.kind == Kind::Ours { 1 } else { 2 };
        Ipv4Addr::new(127, 0, net, u8::try_from(at + 1).unwrap_or(u8::MAX))
    }

    /// Starts one more.
    fn add(&mut self, ip: Ipv4Addr) -> Result<()> {
        let dir = self.dir.join(ip.to_string());
        let identity = self.ca.issue(
            &PeerIdentity::Job("discoverd".into()),
            // etcd wants clients to come from an address of their certificate.
            &[ip.to_string(), "127.0.0.1".to_owned()],
        )?;
        identity.save(&dir.join("tls"))?;
        let child = self.spawn(ip)?;
        self.members.push(Member { ip, child });
        Ok(())
    }

    /// Starts so many more of ours in one process, and says where they are.
    pub(crate) fn add_crowd(&mut self, count: u32, dir: &Path) -> Result<Vec<SocketAddr>> {
        let first = Ipv4Addr::new(127, 0, 3, 1);
        let ips = (0..count).map(|at| Ipv4Addr::from_bits(first.to_bits() + at));
        let mut addrs = Vec::new();
        for ip in ips {
            let identity = self
                .ca
                .issue(&PeerIdentity::Job("discoverd".into()), &[ip.to_string()])?;
            identity.save(&dir.join(ip.to_string()).join("tls"))?;
            addrs.push(SocketAddr::from((ip, 1111)));
        }
        let child = Command::new(std::env::current_exe()?)
            .args(["inside", "discoverd", "--ip", &first.to_string(), "--dir"])
            .arg(dir)
            .args(["--count", &count.to_string()])
            .args(["--join", &format!("{}:1111", self.ip(0))])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.join("log"))?)
            .spawn()
            .context("cannot start many members")?;
        self.members.push(Member { ip: first, child });
        Ok(addrs)
    }

    fn spawn(&self, ip: Ipv4Addr) -> Result<Child> {
        let dir = self.dir.join(ip.to_string());
        let command = match self.kind {
            Kind::Ours => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["inside", "discoverd", "--ip", &ip.to_string(), "--dir"]);
                command.arg(&dir);
                if ip != self.ip(0) {
                    command.args(["--join", &format!("{}:1111", self.ip(0))]);
                }
                command
            }
            Kind::Etcd => self.etcd(ip, &dir),
        };
        // A benchmark that is broken off leaves nothing behind that would disturb the next one.
        let mut guarded = Command::new("setpriv");
        guarded
            .args(["--pdeathsig", "KILL", "--"])
            .arg(command.get_program())
            .args(command.get_args());
        guarded
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::options().create(true).append(true).open(dir.join("log"))?)
            .spawn()
            .with_context(|| format!("cannot start a member of {:?}", self.kind))
    }

    /// etcd as it is by default, with the same security as ours.
    fn etcd(&self, ip: Ipv4Addr, dir: &Path) -> Command {
        let peers: Vec<String> = (0..MEMBERS)
            .map(|at| format!("{0}=https://{0}:2380", self.ip(at)))
            .collect();
        let tls = |name: &str| dir.join("tls").join(name);
        let mut command = Command::new("etcd");
        command
            .args(["--name", &ip.to_string(), "--initial-cluster", &peers.join(",")])
            .args(["--listen-client-urls", &format!("https://{ip}:2379")])
            .args(["--advertise-client-urls", &format!("https://{ip}:2379")])
            .args(["--listen-peer-urls", &format!("https://{ip}:2380")])
            .args(["--initial-advertise-peer-urls", &format!("https://{ip}:2380")])
            .args(["--logger", "zap", "--client-cert-auth", "--peer-client-cert-auth"])
            .arg("--data-dir")
            .arg(dir.join("data"));
        for of in ["", "peer-"] {
            command
                .arg(format!("--{of}cert-file"))
                .arg(tls("cert.pem"))
                .arg(format!("--{of}key-file"))
                .arg(tls("key.pem"))
                .arg(format!("--{of}trusted-ca-file"))
                .arg(tls("ca.pem"));
        }
        command
    }

    /// The process of the member `at`.
    pub(crate) fn pid(&self, at: usize) -> u32 {
        self.members[at].child.id()
    }

    /// Ends the member `at` without any notice.
    pub(crate) fn kill(&mut self, at: usize) -> Result<()> {
        let child = &mut self.members[at].child;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Starts the member `at` again after it was killed.
    pub(crate) fn restart(&mut self, at: usize) -> Result<()> {
        let ip = self.members[at].ip;
        self.members[at].child = self.spawn(ip)?;
        Ok(())
    }

    /// A client of our members as the platform's are, which asks the member `first` first.
    pub(crate) fn client(&self, first: usize) -> Result<DiscoveryClient> {
        let http = |at: usize| {
            let http = Http::new(&format!("https://{}", self.addr((first + at) % MEMBERS)))?;
            anyhow::Ok(http.identity(&self.identity)?.timeout(Duration::from_secs(5)))
        };
        let others = (1..MEMBERS).map(http).collect::<Result<_>>()?;
        Ok(DiscoveryClient::over(http(0)?, others))
    }

    /// Waits until all of ours are voters, well, and as far as the leader, and says who that is.
    pub(crate) async fn settled(&self) -> Result<usize> {
        let client = self.client(0)?;
        let begun = Instant::now();
        loop {
            let members = client.members().await;
            if let Ok(members) = &members
                && members.len() >= MEMBERS
                && members.iter().all(well)
                && let Some(leader) = members.iter().find(|member| member.peer.leader)
                && let Some(at) = (0..MEMBERS).find(|at| self.addr(*at).to_string() == leader.peer.addr)
            {
                return Ok(at);
            }
            if begun.elapsed() > PATIENCE {
                bail!("the cluster does not settle: {members:?}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Where clients of the member `at` go.
    pub(crate) fn addr(&self, at: usize) -> SocketAddr {
        let port = if self.kind == Kind::Ours { 1111 } else { 2379 };
        (self.members[at].ip, port).into()
    }

    /// Who leads, by what the first member says, and how many vote.
    async fn look(&self) -> Result<(Option<usize>, usize)> {
        match self.kind {
            Kind::Ours => {
                let mut http = Http1::open(&self.identity, self.addr(0)).await?;
                let answer = http.call(Method::GET, "/raft/peers", Bytes::new()).await?;
                let peers: Vec<Peer> = serde_json::from_slice(&answer)?;
                let leader = peers
                    .iter()
                    .find(|peer| peer.leader)
                    .map(|peer| peer.addr.clone());
                let leader = (0..self.members.len()).find(|at| Some(self.addr(*at).to_string()) == leader);
                Ok((leader, peers.iter().filter(|peer| peer.voter).count()))
            }
            Kind::Etcd => {
                let mut leader = None;
                for at in 0..self.members.len() {
                    let mut grpc = Grpc::open(&self.identity, self.addr(at)).await?;
                    let status = grpc.call("Maintenance/Status", &[]).await?;
                    let id = wire::number(wire::bytes(&status, 1)?, 2)?;
                    if id != 0 && wire::number(&status, 4)? == id {
                        leader = Some(at);
                    }
                }
                Ok((leader, self.members.len()))
            }
        }
    }

    /// Waits until a leader is known and `voters` vote, and says who leads.
    async fn wait(&self, voters: usize) -> Result<usize> {
        let begun = Instant::now();
        loop {
            let looked = tokio::time::timeout(Duration::from_secs(5), self.look()).await;
            if let Ok(Ok((Some(leader), there))) = &looked
                && *there >= voters
            {
                return Ok(*leader);
            }
            if begun.elapsed() > PATIENCE {
                bail!("the cluster of {:?} does not come up: {looked:?}", self.kind);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A client for each of `count` registers, over the members in turn, beginning with the leader. etcd's share
    /// connections, as they do in its own benchmarks.
    pub(crate) async fn clients(&self, count: usize) -> Result<Vec<Client>> {
        const SHARE: usize = 8;
        let leader = self.wait(MEMBERS).await?;
        let mut shared: [Option<Grpc>; MEMBERS] = std::array::from_fn(|_| None);
        let mut clients = Vec::with_capacity(count);
        for number in 0..count {
            let at = (leader + number) % MEMBERS;
            let register = format!("register-{count}-{number}");
            clients.push(match self.kind {
                Kind::Ours => Client::Ours {
                    connection: Http1::open(&self.identity, self.addr(at)).await?,
                    service: register,
                    index: 0,
                },
                Kind::Etcd => {
                    if (number / MEMBERS).is_multiple_of(SHARE) {
                        shared[at] = Some(Grpc::open(&self.identity, self.addr(at)).await?);
                    }
                    Client::Etcd {
                        connection: shared[at].clone().context("no connection")?,
                        key: register,
                    }
                }
            });
        }
        Ok(clients)
    }
}
