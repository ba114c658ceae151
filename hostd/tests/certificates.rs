//! The cluster's CA takes another root while three discoverds are under load, and a host comes back that was away.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{
    CA_SERVICE, CaStatus, HOST_SERVICE, Instance, JoinRequest, NetworkLeases, ServiceConfig, ServiceMeta,
    Stage, SubnetLease,
};
use flynn_api::server::CancellationToken;
use flynn_api::tls::{self, Ca, IDENTITY_DAYS, Identity, KeyRequest, PeerIdentity};
use flynn_api::{Digest, ErrorCode, Meta};
use flynn_discovery::Options;
use flynn_discovery::dns::Upstreams;
use flynn_discovery::raft::Timing;
use flynn_hostd::identities;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tempfile::TempDir;

/// Three hosts, and a fourth that is away.
const HOSTS: u8 = 3;
const AWAY: u8 = 3;

struct Cluster {
    dir: TempDir,
    ca: Ca,
    base: [u8; 2],
    port: u16,
    /// Ends the load, then the cluster.
    enough: CancellationToken,
    stop: CancellationToken,
}

impl Cluster {
    fn new() -> Self {
        tls::install_provider();
        let base = [rand::random_range(1..255), rand::random_range(1..255)];
        let ip = Ipv4Addr::new(127, base[0], base[1], 1);
        let port = TcpListener::bind((ip, 0)).unwrap().local_addr().unwrap().port();
        Self {
            dir: tempfile::tempdir().unwrap(),
            ca: Ca::create("test cluster").unwrap(),
            base,
            port,
            enough: CancellationToken::new(),
            stop: CancellationToken::new(),
        }
    }

    fn ip(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.base[0], self.base[1], host + 1)
    }

    /// A host's state directory.
    fn state(&self, host: u8) -> PathBuf {
        self.dir.path().join(id(host))
    }

    fn addr(&self, host: u8) -> String {
        format!("{}:{}", self.ip(host), self.port)
    }

    /// The certificates of a host and of its discoverd, made so many days ago.
    fn issue(&self, host: u8, age: i64) {
        let from = Timestamp::now() - SignedDuration::from_hours(24 * age);
        let names = [self.ip(host).to_string()];
        let issue = |identity: PeerIdentity, dir: &Path| {
            let issued = self.ca.issue_for(&identity, &names, from, IDENTITY_DAYS);
            issued.unwrap().save(dir).unwrap();
        };
        let state = self.state(host);
        issue(PeerIdentity::Host(id(host)), &identities::host_dir(&state));
        issue(
            PeerIdentity::Job("discoverd".into()),
            &identities::app_dir(&state, "discoverd"),
        );
    }

    fn start(&self, host: u8) {
        let options = Options {
            data: self.state(host).join("data"),
            host_id: id(host),
            host_ip: self.ip(host),
            tls: identities::app_dir(&self.state(host), "discoverd"),
            init: host == 0,
            join: (0..host).map(|other| self.addr(other)).collect(),
            upstreams: Upstreams::default(),
            api_port: self.port,
            dns_port: self.port,
            timing: Timing {
                // So that nobody is taken for dead on a machine that has much else to do.
                heartbeat: Duration::from_millis(300),
                election: Duration::from_secs(3),
                silence: Duration::from_secs(15),
                lease: Duration::from_mins(1),
                settle: Duration::from_millis(100),
                ca_settle: Duration::from_millis(1500),
                ..Timing::default()
            },
        };
        let stop = self.stop.clone();
        tokio::spawn(async move { flynn_discovery::run(options, stop).await.unwrap() });
    }

    /// Discoverd at a host, by what the host has in its files now.
    fn client(&self, host: u8) -> DiscoveryClient {
        client(&self.state(host), &self.addr(host))
    }

    /// What a host's daemon does.
    fn keep(&self, host: u8) {
        let (state, addr, id, stop) = (self.state(host), self.addr(host), id(host), self.stop.clone());
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            let live = tls::Live::open(&identities::host_dir(&state), tls::ClientAuth::Required).unwrap();
            loop {
                let _ = live.look();
                let discoverd = client(&state, &addr);
                let present = Instance::new("https", addr.clone(), Meta::from([("id".into(), id.clone())]));
                let _ = discoverd.register(HOST_SERVICE, &present).await;
                let serving = live.current();
                let looked = identities::look(&state, &discoverd, Some(&serving.identity)).await;
                for error in looked.failed {
                    eprintln!("{id}: {error}");
                }
                if let Some(held) = looked.held {
                    let _ = identities::tell(&discoverd, &id, &addr, &held).await;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }));
    }

    /// As the CA, and bootstrap, of an earlier release left it.
    async fn bootstrap(&self) {
        let discoverd = self.client(0);
        let meta = |data| ServiceMeta {
            data,
            index: 0,
            leader_id: None,
        };
        let ca = json!({ "cert": self.ca.cert_pem(), "key": self.ca.key_pem() });
        let leases = NetworkLeases {
            network: "100.100.0.0/16".into(),
            leases: (0..=AWAY)
                .map(|host| {
                    let lease = SubnetLease {
                        subnet: format!("100.100.{host}.0/24"),
                        address: self.ip(host),
                        renewed_at: None,
                    };
                    (id(host), lease)
                })
                .collect(),
            ..NetworkLeases::default()
        };
        for (service, data) in [(CA_SERVICE, ca), (HOST_SERVICE, json!(leases))] {
            discoverd
                .create_service(service, &ServiceConfig::default())
                .await
                .unwrap();
            discoverd.set_meta(service, &meta(data)).await.unwrap();
        }
    }

    /// A host joins by a token that is made now.
    async fn join(&self, host: u8) -> Result<Identity, flynn_api::Error> {
        let token = self.client(host).join_token().await?.token;
        let (secret, root) = token.split_once('.').unwrap();
        let root: Digest = root.parse().unwrap();
        let http = Http::new(&format!("https://{}", self.addr(host)))?;
        let key = KeyRequest::generate().unwrap();
        let request = JoinRequest {
            secret: secret.to_owned(),
            host_id: "newcomer".into(),
            address: Ipv4Addr::new(192, 0, 2, 99),
            csr: key.csr_pem,
        };
        let stranger = DiscoveryClient::new(http.tls(tls::joining_client_config(root)));
        let signed = stranger.join(&request).await?;
        Ok(Identity {
            ca_pem: signed.ca,
            cert_pem: signed.cert,
            key_pem: key.key_pem,
        })
    }

    async fn ca_when(&self, what: &str, wanted: impl Fn(&CaStatus) -> bool) -> CaStatus {
        let began = Instant::now();
        loop {
            let ca = self.client(1).ca().await;
            match ca {
                Ok(ca) if wanted(&ca) => return ca,
                other => assert!(
                    began.elapsed() < Duration::from_mins(1),
                    "waited for {what}: {other:?}"
                ),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn id(host: u8) -> String {
    format!("h{host}")
}

fn client(state: &Path, addr: &str) -> DiscoveryClient {
    let identity = Identity::load(&identities::host_dir(state)).unwrap();
    let http = Http::new(&format!("https://{addr}")).unwrap();
    DiscoveryClient::new(http.identity(&identity).unwrap().timeout(Duration::from_secs(10)))
}

async fn eventually(what: &str, done: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !done().await {
        assert!(
            began.elapsed() < Duration::from_mins(1),
            "waited too long for {what}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_root_changes_under_load() {
    let cluster = Arc::new(Cluster::new());
    for host in 0..HOSTS {
        cluster.issue(host, 0);
    }
    cluster.start(0);
    eventually("a leader", async || cluster.client(0).services().await.is_ok()).await;
    cluster.bootstrap().await;
    cluster.start(1);
    cluster.start(2);
    eventually("three voters", async || {
        let peers = cluster.client(0).peers().await.unwrap_or_default();
        peers.iter().filter(|peer| peer.voter).count() == 3
    })
    .await;
    // It went before any of this, and its certificate ran out a month ago.
    cluster.issue(AWAY, IDENTITY_DAYS + 30);
    let shown = identities::metrics(&cluster.state(AWAY));
    assert!(
        shown
            .lines()
            .any(|line| line.contains("{certificate=\"job:discoverd\"} 1")),
        "{shown}"
    );
    let first = Identity::load(&identities::host_dir(&cluster.state(0))).unwrap();
    for host in 0..HOSTS {
        cluster.keep(host);
    }

    // Whoever calls reads the files anew now and then, as the platform's jobs do, and keeps connections in between.
    let (calls, failures) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    cluster
        .client(0)
        .create_service("load", &ServiceConfig::default())
        .await
        .unwrap();
    let mut load = Vec::new();
    for host in 0..HOSTS {
        let (cluster, calls, failures) = (Arc::clone(&cluster), Arc::clone(&calls), Arc::clone(&failures));
        load.push(tokio::spawn(async move {
            while !cluster.enough.is_cancelled() {
                // Of another host as well: its certificate is verified by this one's roots.
                for server in [host, (host + 1) % HOSTS] {
                    let discoverd = client(&cluster.state(host), &cluster.addr(server));
                    for port in 0..10 {
                        let instance = Instance::new("http", format!("10.0.{host}.{port}:80"), Meta::new());
                        let call = discoverd.register("load", &instance).await;
                        let call = call.and(discoverd.instances("load").await);
                        calls.fetch_add(1, Ordering::Relaxed);
                        if let Err(error) = call {
                            eprintln!("h{host} at h{server}: {error}");
                            failures.fetch_add(1, Ordering::Relaxed);
                        }
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            }
        }));
    }

    let before = cluster.ca_when("the CA", |ca| ca.rotation.is_none()).await;
    assert_eq!(before.roots.len(), 1);
    // Asked for twice, it happens once.
    cluster.client(0).rotate_ca().await.unwrap();
    cluster.client(2).rotate_ca().await.unwrap();
    let stage = |ca: &CaStatus| ca.rotation.as_ref().map(|rotation| rotation.stage);
    let spread = cluster
        .ca_when("a root beside the other", |ca| stage(ca) == Some(Stage::Spread))
        .await;
    assert_eq!(spread.roots.len(), 2);
    assert!(spread.signer() == before.signer() || stage(&spread) != Some(Stage::Spread));
    cluster.join(0).await.unwrap();

    // All but the one that is away.
    let waits_for_one = |ca: &CaStatus| {
        let waits = ca.rotation.as_ref().map(|rotation| rotation.waits.as_slice());
        stage(ca) == Some(Stage::Renew) && matches!(waits, Some([wait]) if wait.away && wait.host == id(AWAY))
    };
    let renewed = cluster
        .ca_when("all certificates of the new root", waits_for_one)
        .await;
    assert_eq!((renewed.roots.len(), renewed.trusts().len()), (2, 2));
    assert_ne!(renewed.signer(), before.signer());
    for host in 0..HOSTS {
        for kept in identities::kept(&cluster.state(host)) {
            assert!(renewed.fits(&kept.identity.held().unwrap()));
        }
    }
    let newcomer = cluster.join(1).await.unwrap();
    assert!(renewed.fits(&newcomer.held().unwrap()));

    // It is back, and knows the old root alone. A certificate that is of nobody is no help.
    let state = cluster.state(AWAY);
    let host_dir = identities::host_dir(&state);
    let mut addresses = vec![cluster.addr(HOSTS + 5)];
    assert!(identities::is_over(&state, Timestamp::now()));
    assert!(!identities::warnings(&state, Timestamp::now()).is_empty());
    let error = identities::renew_late(&state, &addresses).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable);
    addresses.push(cluster.addr(1));
    let own = Identity::load(&host_dir).unwrap();
    let stolen = Identity {
        key_pem: KeyRequest::generate().unwrap().key_pem,
        ..own.clone()
    };
    stolen.save(&host_dir).unwrap();
    let error = identities::renew_late(&state, &addresses).await.unwrap_err();
    assert!(
        error.code == ErrorCode::Unauthorized && error.message.contains("another key"),
        "{error}"
    );
    own.save(&host_dir).unwrap();
    let late = identities::renew_late(&state, &addresses).await.unwrap();
    assert_eq!(late, ["this host", "discoverd"]);
    assert!(identities::warnings(&state, Timestamp::now()).is_empty());
    cluster.start(AWAY);
    cluster.keep(AWAY);
    let after = cluster
        .ca_when("the old root to go", |ca| ca.rotation.is_none() && !ca.requested)
        .await;
    assert_eq!(after.signer(), renewed.signer());
    assert_eq!(after.trusts().len(), 1);

    // Everywhere: nobody takes a certificate of the old root any more.
    eventually("all to trust the new root alone", async || {
        let mut all = true;
        for host in 0..=AWAY {
            let kept = identities::kept(&cluster.state(host));
            all &= kept
                .iter()
                .all(|kept| kept.identity.held().is_some_and(|held| after.fits(&held)));
            let http = Http::new(&format!("https://{}", cluster.addr(host))).unwrap();
            let old = DiscoveryClient::new(http.identity(&first).unwrap());
            all &= old.services().await.is_err();
        }
        all
    })
    .await;

    // One that another machine has taken the place of does not come back by its old certificate.
    let elsewhere = |leases: &mut NetworkLeases| {
        leases.leases.get_mut(&id(AWAY)).unwrap().address = "192.0.2.77".parse().unwrap();
        Ok(())
    };
    cluster
        .client(0)
        .change_meta(HOST_SERVICE, elsewhere)
        .await
        .unwrap();
    own.save(&host_dir).unwrap();
    let error = identities::renew_late(&state, &addresses).await.unwrap_err();
    assert!(
        error.code == ErrorCode::Unauthorized && error.message.contains("another machine"),
        "{error}"
    );

    // Nor does one that was removed.
    let remove = |leases: &mut NetworkLeases| {
        leases.leases.remove(&id(AWAY));
        Ok(())
    };
    let discoverd = cluster.client(0);
    discoverd.change_meta(HOST_SERVICE, remove).await.unwrap();
    own.save(&host_dir).unwrap();
    let error = identities::renew_late(&state, &addresses).await.unwrap_err();
    assert!(
        error.code == ErrorCode::Unauthorized && error.message.contains("flynn-host token"),
        "{error}"
    );

    cluster.enough.cancel();
    for task in load {
        task.await.unwrap();
    }
    cluster.stop.cancel();
    let (calls, failures) = (calls.load(Ordering::Relaxed), failures.load(Ordering::Relaxed));
    assert_eq!(failures, 0, "of {calls} calls");
    assert!(calls > 100, "there was no load: {calls} calls");
}
