//! Containers in the cluster's network.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::Path;
use axum::routing::put;
use flynn_api::discovery::{HOST_SERVICE, Instance, NetworkLeases, ServiceMeta, SubnetLease};
use flynn_api::host::{Job, JobState, NetworkConfig, Port, Service};
use flynn_api::network::{HostEndpoints, WireguardPeer, endpoints_service};
use flynn_api::server::{Json, Listener, serve};

use crate::host::{Host, kill, lives};

pub(crate) fn config() -> NetworkConfig {
    NetworkConfig {
        network: "100.100.0.0/16".into(),
        subnet: "100.100.7.0/24".into(),
        network6: flynn_api::discovery::NetworkLeases::default_network6(),
    }
}

const GATEWAY: Ipv4Addr = Ipv4Addr::new(100, 100, 7, 1);

pub(crate) fn networked(host: &Host, script: &str) -> Job {
    let mut job = host.job(script);
    job.config.host_network = false;
    job
}

/// A network that came up while the disk was full is remembered when it is asked for again.
pub(crate) async fn a_network_is_remembered_in_the_end() {
    let host = Host::boot().await;
    let in_the_way = host.state.join("host.json.tmp");
    fs::create_dir(&in_the_way).unwrap();
    assert!(host.api.configure_network(&config()).await.is_err());
    fs::remove_dir(&in_the_way).unwrap();
    host.api.configure_network(&config()).await.unwrap();
    host.kill_daemon();
    host.start().await;
    assert_eq!(
        host.api.status().await.unwrap().subnet.as_deref(),
        Some("100.100.7.0/24")
    );
}

pub(crate) async fn containers_have_addresses() {
    let host = Host::boot().await;
    host.api.configure_network(&config()).await.unwrap();
    host.api.configure_network(&config()).await.unwrap();
    let other = NetworkConfig {
        subnet: "100.100.8.0/24".into(),
        ..config()
    };
    assert!(host.api.configure_network(&other).await.is_err());

    let server = networked(
        &host,
        "cat /etc/resolv.conf; while :; do echo I am $EXTERNAL_IP | nc -l -p 80; done",
    );
    let one = host.run(&server).await;
    let address = one.internal_ip.unwrap();
    let ask = format!("while ! nc {address} 80; do sleep 0.05; done");
    let (_, lines) = host.finish(&networked(&host, &ask)).await;
    assert_eq!(lines.last().unwrap(), &format!("I am {address}"));
    host.says(&server.id, &format!("nameserver {GATEWAY}")).await;

    // The address stays with the job when its program, and when the daemon is started anew.
    host.kill_daemon();
    host.start().await;
    let status = host.api.status().await.unwrap();
    assert_eq!(
        (status.gateway, status.subnet.as_deref()),
        (Some(GATEWAY), Some("100.100.7.0/24"))
    );
    assert_eq!(
        host.wait(&server.id, |job| job.status == JobState::Running)
            .await
            .internal_ip,
        Some(address)
    );
    let (_, lines) = host.finish(&networked(&host, &ask)).await;
    assert_eq!(lines.last().unwrap(), &format!("I am {address}"));
    let network = host.api.network().await.unwrap();
    let endpoint = network
        .endpoints
        .iter()
        .find(|endpoint| endpoint.address == address)
        .unwrap();
    assert!(
        endpoint.job_id == server.id && endpoint.tx_packets > 0,
        "{endpoint:?}"
    );

    let supervisor = one.supervisor_pid.unwrap();
    host.api.stop_job(&server.id).await.unwrap();
    host.end(&server.id).await;
    assert!(
        host.until(async || (!lives(supervisor)).then_some(()))
            .await
            .is_some()
    );
    let gone = host
        .until(async || host.api.network().await.ok()?.endpoints.is_empty().then_some(()))
        .await;
    assert!(gone.is_some(), "{:?}", host.api.network().await);
}

/// What a supervisor that waits for a job has reserved is not lost, however the daemon ends, nor kept from a job.
pub(crate) async fn addresses_of_spares_come_back() {
    let host = Host::boot().await;
    let few = NetworkConfig {
        subnet: "100.100.7.0/29".into(),
        ..config()
    };
    host.api.configure_network(&few).await.unwrap();
    let fill = async || {
        let mut running = Vec::new();
        // Of eight addresses one is the network's, one the gateway's, one the broadcast's.
        for _ in 0..5 {
            let job = host.run(&networked(&host, "sleep 1000")).await;
            assert_eq!(job.status, JobState::Running, "{job:?}");
            running.push(job.job.id);
        }
        let refused = host.api.add_job(&networked(&host, "true")).await.unwrap_err();
        assert!(refused.message.contains("addresses"), "{refused:?}");
        for id in running {
            host.api.stop_job(&id).await.unwrap();
            host.end(&id).await;
        }
        let gone = host.until(async || host.api.network().await.ok()?.endpoints.is_empty().then_some(()));
        assert!(gone.await.is_some(), "{:?}", host.api.network().await);
    };
    fill().await;
    host.kill_daemon();
    host.start().await;
    fill().await;
    host.update(None).await.unwrap();
    fill().await;
}

type Registry = Arc<Mutex<BTreeMap<String, Instance>>>;

/// As much of discoverd as a supervisor needs.
fn discoverd(registry: &Registry) -> Router {
    let (registered, deregistered) = (Arc::clone(registry), Arc::clone(registry));
    let register = async move |Path((service, _)): Path<(String, String)>, Json(instance): Json<Instance>| {
        registered.lock().unwrap().insert(service, instance);
        Json(serde_json::json!({}))
    };
    let deregister = async move |Path((service, _)): Path<(String, String)>| {
        deregistered.lock().unwrap().remove(&service);
        Json(serde_json::json!({}))
    };
    Router::new().route(
        "/services/{service}/instances/{id}",
        put(register).delete(deregister),
    )
}

pub(crate) async fn services_are_registered() {
    let host = Host::boot().await;
    let port = |name: &str, number| Port {
        port: number,
        proto: "tcp".into(),
        service: Some(Service {
            name: name.into(),
            create: true,
            ..Service::default()
        }),
    };
    // In the host's network before there is a gateway to register at.
    let mut early = host.job("while :; do nc -l -p 7001 < /dev/null; done");
    early.config.ports = vec![port("early", 7001)];
    host.run(&early).await;
    host.api.configure_network(&config()).await.unwrap();
    let registry = Registry::default();
    let listener = Listener::tcp((GATEWAY, flynn_api::discovery::PORT).into())
        .await
        .unwrap();
    tokio::spawn(serve(listener, discoverd(&registry), std::future::pending()));
    let registered = |name: &str| registry.lock().unwrap().get(name).cloned();
    let instance = host.until(async || registered("early")).await.unwrap();
    assert_eq!(instance.addr, "192.0.2.1:7001");

    let mut job = networked(
        &host,
        "sleep 0.3; touch /up; trap 'exit 0' TERM; while :; do nc -l -p $PORT < /dev/null; done",
    );
    job.config.ports = vec![port("web", 0)];
    // The shell waits for its nc, which waits for a client.
    job.stop_timeout = Some(1);
    let running = host.run(&job).await;
    assert!(!running.healthy && registered("web").is_none());
    let instance = host.until(async || registered("web")).await.unwrap();
    assert_eq!(instance.addr, format!("{}:5000", running.internal_ip.unwrap()));
    assert_eq!(instance.meta["FLYNN_JOB_ID"], job.id);
    host.wait(&job.id, |job| job.healthy).await;
    // What discoverd has lost comes back with a heartbeat.
    registry.lock().unwrap().clear();
    assert!(host.until(async || registered("web")).await.is_some());
    host.api.deregister_job(&job.id).await.unwrap();
    assert!(registered("web").is_none());
    // A supervisor that stands still answers nobody, and nobody hangs.
    kill(running.supervisor_pid.unwrap(), 19);
    host.api.status().await.unwrap();
    kill(running.supervisor_pid.unwrap(), 18);
    host.api.stop_job(&job.id).await.unwrap();
    host.end(&job.id).await;
}

pub(crate) async fn missing_layers_are_fetched() {
    let host = Host::new(|_| {});
    host.start().await;
    let bytes = std::fs::read(&host.layer_file).unwrap();
    let fetches = Arc::new(Mutex::new(0));
    let (counted, wanted) = (
        Arc::clone(&fetches),
        format!("/layers/{}.squashfs", host.layer.id),
    );
    let serve_layer = async move |uri: axum::http::Uri| {
        *counted.lock().unwrap() += 1;
        // First something else, then what was asked for.
        if uri.path() == wanted {
            bytes
        } else {
            b"something else".to_vec()
        }
    };
    let listener = Listener::tcp(([192, 0, 2, 1], 0).into()).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(serve(
        listener,
        Router::new().fallback(serve_layer),
        std::future::pending(),
    ));

    let from = |path: &str, job: &mut Job| job.artifacts[0].layer_url_template = Some(format!("{url}{path}"));
    let mut wrong = host.job("true");
    from("/wrong/{id}", &mut wrong);
    let error = host.api.add_job(&wrong).await.unwrap_err();
    assert!(error.message.contains("it is another file"), "{error}");
    assert_eq!(std::fs::read_dir(host.state.join("layers")).unwrap().count(), 0);

    // Two jobs that want one layer fetch it once.
    let (mut one, mut two) = (host.job("echo one"), host.job("echo two"));
    from("/layers/{id}.squashfs", &mut one);
    from("/layers/{id}.squashfs", &mut two);
    let (one, two) = tokio::join!(host.finish(&one), host.finish(&two));
    assert_eq!((one.1, two.1), (vec!["one".to_owned()], vec!["two".to_owned()]));
    assert_eq!(*fetches.lock().unwrap(), 2);
}

/// Has the host have heard of another one, with a key.
fn hear_of_another(state: &std::path::Path) {
    let lease = |last: u8| SubnetLease {
        subnet: format!("100.100.{}.0/24", last + 6),
        address: Ipv4Addr::new(192, 0, 2, last),
        renewed_at: None,
    };
    let leases = NetworkLeases {
        network: "100.100.0.0/16".into(),
        leases: [("one".to_owned(), lease(1)), ("two".to_owned(), lease(2))].into(),
        ..NetworkLeases::default()
    };
    let endpoints = HostEndpoints {
        version: 1,
        host: "two".into(),
        identities: BTreeMap::new(),
        wireguard: Some(WireguardPeer {
            key: "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=".into(),
            port: 51820,
        }),
    };
    let dir = state.join("network");
    fs::create_dir(&dir).unwrap();
    let write = |service: &str, data: serde_json::Value| {
        let meta = ServiceMeta {
            data,
            index: 1,
            leader_id: None,
        };
        let file = dir.join(format!("{service}.json"));
        fs::write(file, serde_json::to_vec(&meta).unwrap()).unwrap();
    };
    write(HOST_SERVICE, serde_json::to_value(leases).unwrap());
    let service = endpoints_service("100.100.8.0/24");
    write(&service, serde_json::to_value(endpoints).unwrap());
}

pub(crate) async fn other_hosts_are_encrypted_with_or_named() {
    let host = Host::new(hear_of_another);
    host.start().await;
    host.api.configure_network(&config()).await.unwrap();
    let path = host.state.join("wireguard.key");
    let key = || fs::read_to_string(&path).unwrap();
    let first = key();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let status = host.api.status().await.unwrap();
    let possible = status
        .features
        .iter()
        .any(|feature| feature.name == "wireguard" && feature.present);
    // Nobody is there to answer.
    let wanted = if possible {
        "traffic is not encrypted with the hosts two: they have not answered yet"
    } else {
        "traffic between hosts is not encrypted: who can listen"
    };
    let said = status.notices.iter().any(|notice| notice.starts_with(wanted));
    assert!(said, "{:?}", status.notices);
    let device = || {
        let shown = Command::new("ip")
            .args(["-o", "link", "show", "flynn-wg"])
            .output()
            .unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        shown.split(':').next().unwrap_or_default().to_owned()
    };
    let before = device();
    assert_eq!(!before.is_empty(), possible, "{}", host.log());
    host.kill_daemon();
    host.start().await;
    assert_eq!((key(), device()), (first.clone(), before.clone()));
    // Another key for whoever removes it.
    host.kill_daemon();
    fs::remove_file(&path).unwrap();
    host.start().await;
    assert_ne!(key(), first);
    assert_eq!(device(), before);
    for secret in [first, key()] {
        assert!(!host.log().contains(secret.trim()), "a private key is in the log");
    }
}
