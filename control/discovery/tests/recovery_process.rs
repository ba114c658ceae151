//! A majority that is lost for good, with real processes: two of three are killed while they are written to, the third
//! goes on alone, killed after each step of its recovery.
//!
//! The test binary is also discoverd, when `DISCOVERD_TEST_PORT` says so.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{block_on, eventually, free_port};
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{Consistency, ServiceConfig, ServiceMeta};
use flynn_api::server::CancellationToken;
use flynn_api::tls::{self, Ca, PeerIdentity};
use flynn_discovery::recovery::{self, JUMP};
use flynn_discovery::{Options, run};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::json;

const WRITERS: usize = 3;

fn main() -> std::process::ExitCode {
    tls::install_provider();
    if let Ok(port) = std::env::var("DISCOVERD_TEST_PORT") {
        return child(port.parse().unwrap());
    }
    let test = Trial::test(
        "two of three are lost for good, and each step of the recovery is killed",
        || {
            block_on(lost_for_good());
            Ok::<_, Failed>(())
        },
    );
    libtest_mimic::run(&Arguments::from_args(), vec![test]).exit_code()
}

/// The process under test.
fn child(port: u16) -> std::process::ExitCode {
    flynn_api::server::init_logging("discoverd");
    let mut options = Options::from_env().unwrap();
    options.tls = std::env::var_os("DISCOVERD_TEST_TLS").unwrap().into();
    options.api_port = port;
    options.timing = common::timing();
    options.timing.election = Duration::from_secs(1);
    options.timing.silence = Duration::from_secs(4);
    if std::env::var_os("DISCOVERD_TEST_ONE_STEP").is_some() && recovery::advance(&options).unwrap() {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
    block_on(run(options, CancellationToken::new())).unwrap();
    std::process::ExitCode::SUCCESS
}

/// One of the processes.
struct Member {
    dir: tempfile::TempDir,
    ip: Ipv4Addr,
    port: u16,
    join: Vec<String>,
    client: DiscoveryClient,
    running: Child,
}

impl Member {
    fn start(ca: &Ca, ip: Ipv4Addr, port: u16, join: Vec<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let identity = PeerIdentity::Job("discoverd".into());
        let identity = ca.issue(&identity, &[ip.to_string()]).unwrap();
        identity.save(&dir.path().join("tls")).unwrap();
        let tester = ca.issue(&PeerIdentity::Host("tester".into()), &[]).unwrap();
        let http = Http::new(&format!("https://{ip}:{port}")).unwrap();
        let client = DiscoveryClient::new(http.identity(&tester).unwrap().timeout(Duration::from_secs(20)));
        let running = spawn(dir.path(), ip, port, &join, false);
        Self {
            dir,
            ip,
            port,
            join,
            client,
            running,
        }
    }

    fn addr(&self) -> String {
        format!("{}:{}", self.ip, self.port)
    }

    fn kill(&mut self) {
        self.running.kill().unwrap();
        self.running.wait().unwrap();
    }

    fn again(&mut self, one_step: bool) {
        self.running = spawn(self.dir.path(), self.ip, self.port, &self.join, one_step);
    }

    async fn ended(&mut self) -> ExitStatus {
        let running = Mutex::new(&mut self.running);
        eventually("its end", async || running.lock().unwrap().try_wait().unwrap()).await
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let _ = self.running.kill();
        let _ = self.running.wait();
    }
}

fn spawn(dir: &std::path::Path, ip: Ipv4Addr, port: u16, join: &[String], one_step: bool) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    if one_step {
        command.env("DISCOVERD_TEST_ONE_STEP", "1");
    }
    command
        .env("DISCOVERD_TEST_PORT", port.to_string())
        .env("DISCOVERD_TEST_TLS", dir.join("tls"))
        .env("DISCOVERD_DATA", dir.join("data"))
        .env("DISCOVERD_INIT", join.is_empty().to_string())
        .env("DISCOVERD_JOIN", join.join(","))
        .env("HOST_ID", format!("h{}", ip.octets()[3]))
        .env("HOST_IP", ip.to_string())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

async fn voters(client: &DiscoveryClient, count: usize) {
    let votes = async || {
        let peers = client.peers().await.ok()?;
        (peers.len() == count && peers.iter().all(|peer| peer.voter)).then_some(())
    };
    eventually("all members vote", votes).await;
}

/// What was acknowledged, by service: the metadata as each write left it.
type Acknowledged = Arc<Mutex<BTreeMap<String, Vec<ServiceMeta>>>>;

/// Writes until it is told to stop.
async fn write(client: DiscoveryClient, service: String, acknowledged: Acknowledged, stop: Arc<AtomicBool>) {
    let mut n = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        n += 1;
        let Ok(present) = client.find_meta(&service).await else {
            continue;
        };
        let meta = ServiceMeta {
            data: json!(n),
            index: present.map_or(0, |meta| meta.index),
            leader_id: None,
        };
        if let Ok(written) = client.set_meta(&service, &meta).await {
            acknowledged
                .lock()
                .unwrap()
                .entry(service.clone())
                .or_default()
                .push(written);
        }
    }
}

async fn lost_for_good() {
    let ca = Ca::create("test").unwrap();
    let base = [rand::random_range(1..255), rand::random_range(1..255)];
    let ip = |last| Ipv4Addr::new(127, base[0], base[1], last);
    let port = free_port(ip(1));
    let mut members = vec![Member::start(&ca, ip(1), port, Vec::new())];
    let first = vec![members[0].addr()];
    voters(&members[0].client, 1).await;
    for last in [2, 3] {
        members.push(Member::start(&ca, ip(last), port, first.clone()));
    }
    voters(&members[0].client, 3).await;

    let (acknowledged, stop) = (Acknowledged::default(), Arc::new(AtomicBool::new(false)));
    let mut writers = Vec::new();
    for (at, member) in members[..2].iter().enumerate() {
        for writer in 0..WRITERS {
            let service = format!("w{at}-{writer}");
            let made = async || {
                let config = ServiceConfig::default();
                member.client.ensure_service(&service, &config).await.ok()
            };
            eventually("a service", made).await;
            let (acknowledged, stop) = (Arc::clone(&acknowledged), Arc::clone(&stop));
            writers.push(tokio::spawn(write(
                member.client.clone(),
                service,
                acknowledged,
                stop,
            )));
        }
    }
    let written = async || {
        let acknowledged = acknowledged.lock().unwrap();
        let written = acknowledged.len() == 2 * WRITERS && acknowledged.values().all(|of| of.len() > 3);
        written.then_some(())
    };
    eventually("writes", written).await;
    members[0].kill();
    members[1].kill();
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }

    let [a, b, survivor] = &mut members[..] else {
        unreachable!()
    };
    let before = survivor.client.own_status().await.unwrap();
    let plan = survivor.client.recover(false).await.unwrap();
    assert!(plan.others.iter().all(|other| !other.answers), "{plan:?}");
    assert!(survivor.ended().await.success());
    let mut killed = 0;
    loop {
        survivor.again(true);
        let ended = async |member: &mut Member| {
            let status = eventually("its end, or its answer", {
                let member = Mutex::new(member);
                async move || {
                    let ended = member.lock().unwrap().running.try_wait().unwrap();
                    let client = member.lock().unwrap().client.clone();
                    match ended {
                        Some(status) => Some(Some(status)),
                        None => client.own_status().await.ok().map(|_| None),
                    }
                }
            });
            status.await
        };
        match ended(survivor).await {
            Some(status) => {
                assert!(!status.success());
                killed += 1;
            }
            None => break,
        }
    }
    assert_eq!(killed, 4, "make, two renames, and the end of the order");

    // What it had, it has, and goes on from.
    let leads = async || (survivor.client.own_status().await.ok()?.state == "leader").then_some(());
    eventually("it leads", leads).await;
    let after = survivor.client.own_status().await.unwrap();
    assert_ne!(after.id, before.id);
    let mut kept = 0;
    let written = acknowledged.lock().unwrap().clone();
    for (service, writes) in &written {
        let here = survivor.client.meta(service).await.unwrap();
        let Some(last) = writes.iter().rfind(|meta| meta.index <= before.last_log) else {
            continue;
        };
        assert!(
            here.index >= last.index,
            "{service} is at {}, {} was acknowledged",
            here.index,
            last.index
        );
        if here.index == last.index {
            assert_eq!(here, *last);
        }
        kept += 1;
    }
    assert!(kept > 0, "nothing was told apart");
    let next = ServiceMeta {
        index: survivor.client.meta("w0-0").await.unwrap().index,
        data: json!("alone"),
        leader_id: None,
    };
    let next = survivor.client.set_meta("w0-0", &next).await.unwrap();
    assert!(next.index > before.last_log + JUMP);
    let lost = written.values().flatten().map(|meta| meta.index).max();
    assert!(lost < Some(next.index), "no token is given out twice");

    // The lost come back together, a majority of the old cluster, and disturb nobody.
    a.again(false);
    b.again(false);
    for back in [&mut *a, &mut *b] {
        assert!(back.ended().await.success());
        back.again(false);
    }
    voters(&survivor.client, 3).await;
    for back in [&*a, &*b] {
        let local = back.client.clone().consistency(Consistency::Local);
        let reads = async || local.meta("w0-0").await.ok().filter(|meta| *meta == next);
        eventually("what was written without it", reads).await;
    }
    let id = survivor.client.own_status().await.unwrap().id;
    assert_eq!(id, after.id, "it was not begun anew");
}
