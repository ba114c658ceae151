//! Subnet leases in a real discoverd.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use flynn_api::ErrorCode;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{HOST_SERVICE, NetworkLeases};
use flynn_api::server::CancellationToken;
use flynn_api::tls::{self, Ca, PeerIdentity};
use flynn_discovery::Options;
use flynn_discovery::dns::Upstreams;
use flynn_discovery::raft::Timing;
use flynn_hostd::leases::{self, Networks};
use tempfile::TempDir;

/// A discoverd of one member.
struct Discoverd {
    ca: Ca,
    addr: SocketAddr,
    stop: CancellationToken,
    _dir: TempDir,
}

impl Discoverd {
    async fn start() -> Self {
        tls::install_provider();
        let ca = Ca::create("test cluster").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let host_ip = Ipv4Addr::LOCALHOST;
        let identity = PeerIdentity::Job("discoverd".into());
        let issued = ca.issue(&identity, &[host_ip.to_string()]).unwrap();
        issued.save(&dir.path().join("tls")).unwrap();
        let port = || {
            let socket = TcpListener::bind((host_ip, 0)).unwrap();
            socket.local_addr().unwrap().port()
        };
        let options = Options {
            data: dir.path().join("data"),
            host_id: "h0".into(),
            host_ip,
            tls: dir.path().join("tls"),
            init: true,
            join: Vec::new(),
            upstreams: Upstreams::default(),
            api_port: port(),
            dns_port: port(),
            timing: Timing {
                heartbeat: Duration::from_millis(50),
                election: Duration::from_millis(250),
                snapshot_after: 100,
                lease: Duration::from_mins(1),
                ..Timing::default()
            },
        };
        let discoverd = Self {
            ca,
            addr: SocketAddr::from((host_ip, options.api_port)),
            stop: CancellationToken::new(),
            _dir: dir,
        };
        let stop = discoverd.stop.clone();
        tokio::spawn(async move { flynn_discovery::run(options, stop).await.unwrap() });
        let client = discoverd.client("h0");
        while client.services().await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        discoverd
    }

    fn client(&self, host: &str) -> DiscoveryClient {
        let identity = self.ca.issue(&PeerIdentity::Host(host.into()), &[]).unwrap();
        let http = Http::new(&format!("https://{}", self.addr)).unwrap();
        DiscoveryClient::new(http.identity(&identity).unwrap())
    }
}

fn networks() -> Networks {
    Networks {
        network: "100.100.0.0/20".parse().unwrap(),
        subnet_length: 26,
        network6: NetworkLeases::DEFAULT_NETWORK6.parse().unwrap(),
        direct: false,
    }
}

fn address(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, host)
}

/// 63 subnets, 70 hosts that ask at the same time, twice each: seven get none, and nobody gets another's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_hosts_never_share_a_subnet() {
    let discoverd = Discoverd::start().await;
    let networks = networks();
    let racers = (1..=70_u8).map(|host| {
        let (client, networks) = (discoverd.client(&format!("h{host}")), networks.clone());
        tokio::spawn(async move {
            let id = format!("h{host}");
            let take = || leases::take_in(&client, Some(&networks), &id, address(host));
            let (one, other) = tokio::join!(take(), take());
            let subnet = |taken: flynn_api::Result<(NetworkLeases, _, _)>| {
                taken.map(|(_, lease, _): (_, flynn_api::discovery::SubnetLease, _)| lease.subnet)
            };
            (subnet(one), subnet(other))
        })
    });
    let racers: Vec<_> = racers.collect();
    let (mut held, mut refused) = (BTreeSet::new(), 0);
    for racer in racers {
        match racer.await.unwrap() {
            (Ok(one), Ok(other)) => {
                assert_eq!(one, other, "one host, two subnets");
                assert!(held.insert(one.clone()), "{one} was given twice");
            }
            (Err(one), Err(_)) => {
                assert_eq!(one.code, ErrorCode::LimitExceeded);
                refused += 1;
            }
            (one, other) => panic!("{one:?} {other:?}"),
        }
    }
    assert_eq!((held.len(), refused), (63, 7));

    // A host that is removed makes room for one; one that comes back finds what it had.
    let client = discoverd.client("h1");
    let (gone, meta) = client
        .change_meta(HOST_SERVICE, |leases: &mut NetworkLeases| {
            let id = leases.leases.keys().next().unwrap().clone();
            let lease = leases::release(leases, &id).unwrap();
            Ok((id, lease))
        })
        .await
        .unwrap();
    let (_, lease, _) = leases::take_in(&client, None, "h99", address(99)).await.unwrap();
    assert_eq!(lease.subnet, gone.1.subnet, "{}", gone.0);
    let before = client.meta(HOST_SERVICE).await.unwrap();
    assert!(before.index > meta.index);
    let (_, again, _) = leases::take_in(&client, None, "h99", address(99)).await.unwrap();
    assert_eq!(again, lease);
    assert_eq!(
        client.meta(HOST_SERVICE).await.unwrap(),
        before,
        "nothing was written for what is held already"
    );
    discoverd.stop.cancel();
}
