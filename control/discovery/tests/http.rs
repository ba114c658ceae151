//! The HTTP API: who may do what, what is refused, joining and renewing, streams.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use common::{Cluster, block_on, create, eventually, instance};
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{
    CA_SERVICE, ClusterCa, EventKind, FLOATING_SERVICE, HOST_SERVICE, JoinRequest, LateRequest, LeaderType,
    RenewRequest, ServiceConfig, ServiceMeta, Status,
};
use flynn_api::network::{IDENTITIES_SERVICE, POLICY_SERVICE, endpoints_service};
use flynn_api::server::Peer;
use flynn_api::tls::{self, Identity, KeyRequest, PeerIdentity};
use flynn_api::{Digest, Error, ErrorCode};
use flynn_discovery::command::Command;
use flynn_discovery::http::auth::{Action, Door};
use flynn_discovery::view::View;
use futures::StreamExt as _;
use serde_json::json;

fn meta(data: serde_json::Value, index: u64) -> ServiceMeta {
    ServiceMeta {
        data,
        index,
        leader_id: None,
    }
}

/// A cluster whose CA is in the registry, as after bootstrap.
async fn bootstrapped() -> Cluster {
    let cluster = Cluster::one();
    cluster.ready(0).await;
    let client = cluster.client(0);
    create(&client, CA_SERVICE).await;
    create(&client, HOST_SERVICE).await;
    let ca = ClusterCa::new(cluster.ca.cert_pem(), cluster.ca.key_pem());
    client
        .set_meta(CA_SERVICE, &meta(serde_json::to_value(ca).unwrap(), 0))
        .await
        .unwrap();
    cluster
}

/// What each caller may do at each door: every action, every caller.
#[test]
fn authorisation() {
    const WEB: &str = "web";
    let endpoints = endpoints_service("100.100.1.0/24");
    let subnet = "100.100.1.0/24".parse().unwrap();
    let host = Ipv4Addr::new(192, 0, 2, 1);
    let gateway = Door::Gateway { subnet, host };
    let by = |identity| Peer {
        addr: Some(SocketAddr::from((host, 1))),
        identity,
        unix: false,
    };
    let from = |ip: [u8; 4]| Peer {
        addr: Some(SocketAddr::from((ip, 1))),
        identity: None,
        unix: false,
    };
    // The door, and a caller there: nobody, a host, discoverd, another job; a container, its neighbour, the host.
    let callers = [
        (Door::Cluster, by(None)),
        (Door::Cluster, by(Some(PeerIdentity::Host("h1".into())))),
        (Door::Cluster, by(Some(PeerIdentity::Job("discoverd".into())))),
        (Door::Cluster, by(Some(PeerIdentity::Job("router".into())))),
        (gateway, from([100, 100, 1, 5])),
        (gateway, from([100, 100, 1, 6])),
        (gateway, from([100, 100, 1, 1])),
        (gateway, from([192, 0, 2, 1])),
    ];
    let own = [IpAddr::from([100, 100, 1, 5])];
    let taken = [IpAddr::from([100, 100, 1, 6]), IpAddr::from([100, 100, 1, 5])];
    let of_host = [IpAddr::from([192, 0, 2, 1])];
    let elsewhere = [IpAddr::from([100, 100, 2, 5])];
    let table: &[(Action<'_>, &str)] = &[
        (Action::Status, "11111111"),
        (Action::Join, "11110000"),
        (Action::Raft, "01100000"),
        (Action::MakeToken, "01000000"),
        (Action::Recover, "01000000"),
        (Action::RotateCa, "01000000"),
        (Action::Renew, "01110000"),
        (Action::ReadMembers, "01111111"),
        (Action::ChangeMembers, "01100000"),
        (Action::Read(WEB), "01111111"),
        (Action::Read(HOST_SERVICE), "01111111"),
        (Action::Read(CA_SERVICE), "01100000"),
        (Action::Read(FLOATING_SERVICE), "01100000"),
        (Action::CreateService(WEB), "01111111"),
        (Action::CreateService(CA_SERVICE), "01100000"),
        (Action::DeleteService(WEB), "01110000"),
        (Action::DeleteService(CA_SERVICE), "01100000"),
        (Action::Govern(WEB), "01110000"),
        (Action::Govern(HOST_SERVICE), "01100000"),
        (Action::Govern(CA_SERVICE), "01100000"),
        (Action::Govern(FLOATING_SERVICE), "01100000"),
        (Action::Register(WEB, &own), "01111011"),
        (Action::Register(WEB, &taken), "01110011"),
        (Action::Register(WEB, &of_host), "01110011"),
        (Action::Register(WEB, &elsewhere), "01110000"),
        (Action::Register(HOST_SERVICE, &own), "01100000"),
        (Action::Govern(IDENTITIES_SERVICE), "01100000"),
        (Action::Govern(POLICY_SERVICE), "01100000"),
        (Action::CreateService(&endpoints), "01100000"),
        (Action::Govern(&endpoints), "01100000"),
        (Action::Read(&endpoints), "01111111"),
    ];
    for (action, want) in table {
        let got: String = callers
            .iter()
            .map(|(door, peer)| {
                if door.check(peer, action).is_ok() {
                    '1'
                } else {
                    '0'
                }
            })
            .collect();
        assert_eq!(got, *want, "{action:?}");
    }
    let scheduler = Peer {
        identity: Some(PeerIdentity::Job("scheduler".into())),
        ..Peer::default()
    };
    for action in [
        Action::CreateService(POLICY_SERVICE),
        Action::Govern(POLICY_SERVICE),
    ] {
        assert!(Door::Cluster.check(&scheduler, &action).is_ok());
    }
    for action in [
        Action::Govern(IDENTITIES_SERVICE),
        Action::DeleteService(POLICY_SERVICE),
    ] {
        assert!(Door::Cluster.check(&scheduler, &action).is_err());
    }
}

/// The same over the wire: no call of the cluster port is open to a caller without a certificate but three.
#[test]
fn every_route_asks() {
    block_on(async {
        let cluster = bootstrapped().await;
        let nobody = cluster.http_as(0, None);
        let body = json!({});
        let calls = [
            ("GET", "/services"),
            ("PUT", "/services/x"),
            ("DELETE", "/services/x"),
            ("GET", "/services/flynn-host"),
            ("GET", "/services/flynn-host/meta"),
            ("PUT", "/services/flynn-host/meta"),
            ("GET", "/services/flynn-host/instances"),
            ("PUT", "/services/flynn-host/instances/x"),
            ("DELETE", "/services/flynn-host/instances/x"),
            ("GET", "/services/flynn-host/leader"),
            ("PUT", "/services/flynn-host/leader"),
            ("GET", "/raft/leader"),
            ("GET", "/raft/peers"),
            ("GET", "/cluster/members"),
            ("GET", "/cluster/status"),
            ("GET", "/metrics"),
            ("PUT", "/raft/peers/x/vote"),
            ("DELETE", "/raft/peers/x"),
            ("POST", "/raft/members"),
            ("POST", "/raft/1/append"),
            ("POST", "/cluster/tokens"),
            ("POST", "/cluster/renew"),
            ("GET", "/cluster/ca"),
            ("POST", "/cluster/ca/rotate"),
            ("GET", "/cluster/virtual-networks"),
            ("GET", "/cluster/snapshot"),
            ("GET", "/cluster/recovery"),
            ("POST", "/cluster/recover"),
            ("POST", "/cluster/restore"),
            ("POST", "/cluster/rejoin"),
        ];
        for (method, path) in calls {
            let body = match (method, path) {
                ("PUT", path) if path.ends_with("meta") => json!({ "data": 1 }),
                ("PUT", path) if path.ends_with("leader") => json!(instance("10.0.0.1:80")),
                ("PUT", path) if path.contains("instances") => {
                    json!({ "id": "x", "addr": "10.0.0.1:1", "proto": "tcp" })
                }
                (_, "/cluster/renew") => json!({ "csr": "x" }),
                (_, "/cluster/rejoin") => json!({ "members": ["x"] }),
                (_, "/raft/members") => json!({ "remove": { "peer": "x" } }),
                (_, path) if path.ends_with("vote") => json!("promoted"),
                _ => body.clone(),
            };
            let request = http::Request::builder().method(method).uri(path);
            let request = request.body(flynn_api::client::full(body.to_string())).unwrap();
            let error = nobody.send(request).await.unwrap_err();
            assert_eq!(error.code, ErrorCode::Unauthorized, "{method} {path}: {error}");
        }
        nobody.get::<()>("/ping").await.unwrap();
        let status: Status = nobody.get("/.well-known/status").await.unwrap();
        assert_eq!(status.status, "healthy");
        let job = cluster.client_as(0, &PeerIdentity::Job("controller".into()));
        assert_eq!(job.meta(CA_SERVICE).await.unwrap_err().code, ErrorCode::Forbidden);
        assert_eq!(
            job.watch(CA_SERVICE).await.err().unwrap().code,
            ErrorCode::Forbidden
        );
        assert_eq!(job.join_token().await.unwrap_err().code, ErrorCode::Forbidden);
        assert!(job.meta(HOST_SERVICE).await.unwrap_err().code == ErrorCode::NotFound);
    });
}

#[test]
fn a_host_joins_once_and_renews() {
    block_on(async {
        let cluster = bootstrapped().await;
        let token = cluster.client(0).join_token().await.unwrap().token;
        let (secret, fingerprint) = token.split_once('.').unwrap();
        let fingerprint: Digest = fingerprint.parse().unwrap();
        assert_eq!(fingerprint, cluster.ca.fingerprint().unwrap());
        let http = Http::new(&format!("https://{}", cluster.members[0].addr())).unwrap();
        let stranger = DiscoveryClient::new(http.clone().tls(tls::joining_client_config(fingerprint)));

        let key = KeyRequest::generate().unwrap();
        let request = JoinRequest {
            secret: secret.into(),
            host_id: "h2".into(),
            address: Ipv4Addr::new(192, 0, 2, 2),
            csr: key.csr_pem.clone(),
        };
        // A request that cannot be signed does not cost the token.
        let broken = JoinRequest {
            csr: "nonsense".into(),
            ..request.clone()
        };
        assert_eq!(
            stranger.join(&broken).await.unwrap_err().code,
            ErrorCode::Validation
        );
        let guessed = JoinRequest {
            secret: "0".repeat(64),
            ..request.clone()
        };
        assert_eq!(
            stranger.join(&guessed).await.unwrap_err().code,
            ErrorCode::Unauthorized
        );
        let signed = stranger.join(&request).await.unwrap();
        let identity = Identity {
            ca_pem: signed.ca,
            cert_pem: signed.cert,
            key_pem: key.key_pem,
        };
        assert_eq!(identity.name(), Some(PeerIdentity::Host("h2".into())));
        assert_eq!(signed.peers, [cluster.members[0].addr().to_string()]);
        // The same request may come again (its answer was lost), another may not.
        stranger.join(&request).await.unwrap();
        let other = JoinRequest {
            host_id: "h3".into(),
            ..request.clone()
        };
        assert_eq!(
            stranger.join(&other).await.unwrap_err().code,
            ErrorCode::Unauthorized
        );

        // The new host is one of the cluster, and asks for its jobs' certificates.
        let joined = DiscoveryClient::new(http.clone().identity(&identity).unwrap());
        joined.services().await.unwrap();
        let key = KeyRequest::generate().unwrap();
        let request = RenewRequest {
            csr: key.csr_pem.clone(),
            job: Some("router".into()),
        };
        let signed = joined.renew(&request).await.unwrap();
        let job = Identity {
            ca_pem: signed.ca,
            cert_pem: signed.cert,
            key_pem: key.key_pem.clone(),
        };
        assert_eq!(job.name(), Some(PeerIdentity::Job("router".into())));
        // A job renews its own certificate and no other.
        let job = DiscoveryClient::new(http.identity(&job).unwrap());
        let signed = job
            .renew(&RenewRequest {
                csr: key.csr_pem.clone(),
                job: None,
            })
            .await
            .unwrap();
        let renewed = Identity {
            ca_pem: signed.ca,
            cert_pem: signed.cert,
            key_pem: key.key_pem.clone(),
        };
        assert_eq!(renewed.name(), Some(PeerIdentity::Job("router".into())));
        let other = RenewRequest {
            csr: key.csr_pem,
            job: Some("controller".into()),
        };
        assert_eq!(job.renew(&other).await.unwrap_err().code, ErrorCode::Forbidden);
    });
}

/// All hosts were off for months: nobody has a certificate that is good for anything.
#[test]
fn a_discoverd_whose_certificate_ran_out_signs_for_itself() {
    block_on(async {
        let mut cluster = bootstrapped().await;
        let member = &mut cluster.members[0];
        member.kill();
        let long_ago = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24 * 500);
        let names = [member.options.host_ip.to_string()];
        let old = |identity| cluster.ca.issue_for(&identity, &names, long_ago, 90).unwrap();
        let discoverd = old(PeerIdentity::Job("discoverd".into()));
        discoverd.save(&member.options.tls).unwrap();
        member.start();
        let made = eventually("it to answer", async || cluster.client(0).ca().await.ok()).await;
        let loaded = made.loaded.unwrap();
        assert!(loaded.not_after > jiff::Timestamp::now() && made.roots.len() == 1);
        // It is for itself alone: the file is its host's to renew.
        assert_eq!(common::identity(&cluster.members[0].options.tls), discoverd);
        // Its host is too late by now, and is told what to do.
        let host = old(PeerIdentity::Host("h0".into()));
        let http = Http::new(&format!("https://{}", cluster.members[0].addr())).unwrap();
        let asks = DiscoveryClient::new(http.tls(host.late_client_config().unwrap()));
        let request = LateRequest {
            csr: KeyRequest::of(&host.key_pem).unwrap().csr_pem,
            cert: host.cert_pem,
        };
        let error = asks.renew_late(&request).await.unwrap_err();
        assert!(
            error.code == ErrorCode::Unauthorized && error.message.contains("too long ago"),
            "{error}"
        );
    });
}

#[test]
fn nobody_joins_as_a_host_that_is_there() {
    block_on(async {
        let cluster = bootstrapped().await;
        let client = cluster.client(0);
        let leases = json!({ "network": "100.100.0.0/16", "leases": {
            "h9": { "subnet": "100.100.9.0/24", "address": "192.0.2.9" } } });
        client.set_meta(HOST_SERVICE, &meta(leases, 0)).await.unwrap();
        let token = client.join_token().await.unwrap().token;
        let request = JoinRequest {
            secret: token.split_once('.').unwrap().0.into(),
            host_id: "h9".into(),
            address: Ipv4Addr::new(192, 0, 2, 66),
            csr: KeyRequest::generate().unwrap().csr_pem,
        };
        assert_eq!(client.join(&request).await.unwrap_err().code, ErrorCode::Conflict);
        client
            .join(&JoinRequest {
                address: Ipv4Addr::new(192, 0, 2, 9),
                ..request
            })
            .await
            .unwrap();
    });
}

#[test]
fn metadata_and_leaders() {
    use EventKind::{Current, Leader, ServiceMeta as Meta, Up};
    block_on(async {
        let cluster = Cluster::one();
        cluster.ready(0).await;
        let client = cluster.client(0);
        assert_eq!(client.meta("pg").await.unwrap_err().code, ErrorCode::NotFound);
        assert_eq!(
            client.set_meta("pg", &meta(json!(1), 0)).await.unwrap_err().code,
            ErrorCode::NotFound
        );
        let config = ServiceConfig {
            leader_type: LeaderType::Manual,
        };
        client.create_service("pg", &config).await.unwrap();
        let one = client.set_meta("pg", &meta(json!(1), 0)).await.unwrap();
        assert_eq!(
            client.set_meta("pg", &meta(json!(2), 0)).await.unwrap_err().code,
            ErrorCode::ObjectExists
        );
        let two = client.set_meta("pg", &meta(json!(2), one.index)).await.unwrap();
        let stale = client
            .set_meta("pg", &meta(json!(3), one.index))
            .await
            .unwrap_err();
        assert!(stale.surely_undone(), "it is known who replaced it");
        assert_eq!(stale.code, ErrorCode::PreconditionFailed);
        assert_eq!(stale.detail.unwrap()["index"], two.index);
        assert_eq!(client.meta("pg").await.unwrap(), two);

        let (a, b) = (instance("10.0.0.1:5432"), instance("10.0.0.2:5432"));
        client.register("pg", &a).await.unwrap();
        client.register("pg", &b).await.unwrap();
        assert_eq!(client.leader("pg").await.unwrap_err().code, ErrorCode::NotFound);
        client.set_leader("pg", &a).await.unwrap();
        assert_eq!(client.leader("pg").await.unwrap().id, a.id);
        // Metadata and leader change in one step.
        let mut watch = client.watch("pg").await.unwrap();
        let three = ServiceMeta {
            data: json!(3),
            index: two.index,
            leader_id: Some(b.id.clone()),
        };
        let three = client.set_meta("pg", &three).await.unwrap();
        assert_eq!(client.leader("pg").await.unwrap().id, b.id);
        let (mut kinds, mut ids) = (Vec::new(), Vec::new());
        while let Some(Ok((id, event))) = watch.next().await {
            ids.extend(id);
            kinds.push(event.kind);
            if event.kind == EventKind::Leader && event.index == three.index {
                break;
            }
        }
        assert_eq!(kinds, [Up, Up, Leader, Meta, Current, Meta, Leader]);
        // What is there has none; then each is behind its change, the last of a write behind all of it.
        let (before, at) = (three.index - 1, three.index);
        assert_eq!(ids, [before.to_string(), format!("{at}.0"), at.to_string()]);
        let gone = ServiceMeta {
            leader_id: Some("nobody".into()),
            ..meta(json!(4), three.index)
        };
        assert_eq!(
            client.set_meta("pg", &gone).await.unwrap_err().code,
            ErrorCode::NotFound
        );
        assert_eq!(client.meta("pg").await.unwrap().data, json!(3));

        client.deregister("pg", &b.id).await.unwrap();
        assert_eq!(
            client.deregister("pg", &b.id).await.unwrap_err().code,
            ErrorCode::NotFound
        );
        client.remove_service("pg").await.unwrap();
        assert_eq!(client.services().await.unwrap(), Vec::<String>::new());
        create(&client, "old").await;
        client.register("old", &a).await.unwrap();
        assert_eq!(
            client.set_leader("old", &a).await.unwrap_err().code,
            ErrorCode::Validation
        );
    });
}

#[test]
fn bad_input_is_refused_and_named() {
    block_on(async {
        let cluster = Cluster::one();
        cluster.ready(0).await;
        let (client, http) = (
            cluster.client(0),
            cluster.http_as(0, Some(&PeerIdentity::Host("t".into()))),
        );
        create(&client, "web").await;
        for name in ["Web", "a_b", "-a", "a-", &"a".repeat(64), "a.b", "%2e%2e"] {
            let error = client
                .create_service(name, &ServiceConfig::default())
                .await
                .unwrap_err();
            assert_eq!(error.code, ErrorCode::Validation, "{name}");
        }
        let good = json!({ "id": "x", "addr": "10.0.0.1:80", "proto": "tcp" });
        let put = async |change: &dyn Fn(&mut serde_json::Value)| -> Error {
            let mut body = good.clone();
            change(&mut body);
            http.put::<()>("/services/web/instances/x", &body)
                .await
                .unwrap_err()
        };
        let changes: [(&str, serde_json::Value); 9] = [
            ("id", json!("y")),
            ("addr", json!("example.com:80")),
            ("addr", json!("10.0.0.1")),
            ("addr", json!("10.0.0.1:0")),
            ("addr", json!("0.0.0.0:80")),
            ("proto", json!("")),
            ("proto", json!("T C P")),
            ("meta", json!({ "k": "v".repeat(20_000) })),
            ("colour", json!("red")),
        ];
        for (field, value) in changes {
            let error = put(&|body| body[field] = value.clone()).await;
            assert_eq!(error.code, ErrorCode::Validation, "{field}: {value}");
            assert_eq!(error.detail, Some(json!({ "field": field })));
        }
        let long = meta(json!("x".repeat(2 << 20)), 0);
        assert_eq!(
            client.set_meta("web", &long).await.unwrap_err().code,
            ErrorCode::Validation
        );
        let request = http::Request::put("/services/cut")
            .body(flynn_api::client::full("{\"leader_"))
            .unwrap();
        assert_eq!(http.send(request).await.unwrap_err().code, ErrorCode::Validation);
        assert_eq!(
            http.get::<()>("/nothing").await.unwrap_err().code,
            ErrorCode::NotFound
        );
        assert_eq!(client.services().await.unwrap(), ["web"]);
        assert!(client.instances("web").await.unwrap().is_empty());
        // The last voter stays.
        let addr = cluster.members[0].addr();
        let error = http.delete(&format!("/raft/peers/{addr}")).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Conflict);
    });
}

#[test]
fn a_watcher_that_does_not_read_is_cut_off_and_others_are_not() {
    let view = View::default();
    view.apply(
        1,
        &Command::CreateService {
            service: "web".into(),
            leader_type: LeaderType::Oldest,
        },
    );
    let (mut slow, mut quick) = (view.watch("web", None).unwrap(), view.watch("web", None).unwrap());
    for index in 2..3000_u64 {
        let instance = instance(&format!("10.0.{}.{}:80", index / 250, index % 250 + 1));
        view.apply(
            index,
            &Command::PutInstance {
                service: "web".into(),
                instance: instance.into(),
                member: 1,
            },
        );
        while quick.changes.try_recv().is_ok() {}
    }
    let told = std::iter::from_fn(|| slow.changes.try_recv().ok()).count();
    assert_eq!(told, 1024, "what fits in the queue");
    assert!(slow.changes.is_closed() && !quick.changes.is_closed());
    let cut_off = view.cut_off().load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((cut_off, view.watches()), (1, (1, 0)));
}
