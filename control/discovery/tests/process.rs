//! discoverd as a process: killed while it writes, and with a disk that fills up.
//!
//! The test binary is also that process, when `DISCOVERD_TEST_PORT` says so.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{block_on, eventually, free_port};
use flynn_api::ErrorCode;
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{ServiceConfig, ServiceMeta};
use flynn_api::server::CancellationToken;
use flynn_api::tls::{self, Ca, PeerIdentity};
use flynn_discovery::Options;
use flynn_discovery::raft::journal::{Journal, Record};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::json;

fn main() -> std::process::ExitCode {
    tls::install_provider();
    if let Ok(port) = std::env::var("DISCOVERD_TEST_PORT") {
        return child(port.parse().unwrap());
    }
    let arguments = Arguments::from_args();
    let skip = disk_tests_impossible();
    if let Some(why) = &skip {
        eprintln!("skipped: a full disk ({why})");
    }
    let full = Trial::test("a full disk is waited out", || {
        block_on(full_disk());
        Ok::<_, Failed>(())
    });
    let kills = Trial::test("no acknowledged write is lost to kills", || {
        block_on(kills());
        Ok::<_, Failed>(())
    });
    libtest_mimic::run(&arguments, vec![kills, full.with_ignored_flag(skip.is_some())]).exit_code()
}

fn disk_tests_impossible() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("a small file system needs root");
    }
    let unshare = Command::new("unshare")
        .args(["--mount", "true"])
        .stderr(Stdio::null())
        .status();
    (!unshare.is_ok_and(|status| status.success())).then_some("unshare(1) does not work here")
}

/// The process under test.
fn child(port: u16) -> std::process::ExitCode {
    flynn_api::server::init_logging("discoverd");
    let mut options = Options::from_env().unwrap();
    if let Ok(size) = std::env::var("DISCOVERD_TEST_DISK") {
        // In a mount namespace of its own, which goes with the process.
        let size = std::ffi::CString::new(format!("size={size}")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", &options.data, "tmpfs", flags, Some(size.as_c_str())).unwrap();
    }
    options.tls = std::env::var_os("DISCOVERD_TEST_TLS").unwrap().into();
    options.api_port = port;
    options.timing = common::timing();
    block_on(flynn_discovery::run(options, CancellationToken::new())).unwrap();
    std::process::ExitCode::SUCCESS
}

/// Starts and kills the process, and talks to it.
struct Process {
    dir: tempfile::TempDir,
    ip: Ipv4Addr,
    port: u16,
    disk: Option<&'static str>,
    client: DiscoveryClient,
    running: Child,
}

impl Process {
    fn start(disk: Option<&'static str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ip = Ipv4Addr::new(127, rand::random_range(1..255), rand::random_range(1..255), 1);
        let ca = Ca::create("test").unwrap();
        let identity = ca
            .issue(&PeerIdentity::Job("discoverd".into()), &[ip.to_string()])
            .unwrap();
        identity.save(&dir.path().join("tls")).unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        let port = free_port(ip);
        let client = ca.issue(&PeerIdentity::Host("tester".into()), &[]).unwrap();
        let http = Http::new(&format!("https://{ip}:{port}"))
            .unwrap()
            .identity(&client)
            .unwrap();
        let running = Self::spawn(dir.path(), ip, port, disk);
        Self {
            dir,
            ip,
            port,
            disk,
            client: DiscoveryClient::new(http),
            running,
        }
    }

    fn spawn(dir: &Path, ip: Ipv4Addr, port: u16, disk: Option<&str>) -> Child {
        let this = std::env::current_exe().unwrap();
        let mut command = Command::new(&this);
        if let Some(size) = disk {
            // A mount namespace for the disk.
            command = Command::new("unshare");
            command.arg("--mount").arg(this).env("DISCOVERD_TEST_DISK", size);
        }
        command
            .env("DISCOVERD_TEST_PORT", port.to_string())
            .env("DISCOVERD_TEST_TLS", dir.join("tls"))
            .env("DISCOVERD_DATA", dir.join("data"))
            .env("DISCOVERD_INIT", "true")
            .env("HOST_ID", "h0")
            .env("HOST_IP", ip.to_string())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    async fn ready(&self) {
        eventually("an answer", async || self.client.services().await.ok()).await;
        eventually("a leader", async || {
            self.client
                .peers()
                .await
                .ok()?
                .into_iter()
                .find(|peer| peer.leader)
        })
        .await;
    }

    fn kill(&mut self) {
        self.running.kill().unwrap();
        self.running.wait().unwrap();
    }

    fn restart(&mut self) {
        self.running = Self::spawn(self.dir.path(), self.ip, self.port, self.disk);
    }

    /// The process's data directory as it sees it.
    fn data(&self) -> PathBuf {
        let inside = self.dir.path().join("data");
        Path::new("/proc")
            .join(self.running.id().to_string())
            .join("root")
            .join(inside.strip_prefix("/").unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.running.kill();
        let _ = self.running.wait();
    }
}

fn meta(n: u64, index: u64) -> ServiceMeta {
    ServiceMeta {
        data: json!(n),
        index,
        leader_id: None,
    }
}

async fn kills() {
    const WRITERS: u64 = 4;
    const KILLS: u64 = 12;
    let mut process = Process::start(None);
    process.ready().await;
    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged: Arc<Mutex<BTreeMap<String, u64>>> = Arc::default();
    let mut writers = Vec::new();
    for writer in 0..WRITERS {
        let service = format!("w{writer}");
        process
            .client
            .create_service(&service, &ServiceConfig::default())
            .await
            .unwrap();
        let (client, stop, acknowledged) = (
            process.client.clone(),
            Arc::clone(&stop),
            Arc::clone(&acknowledged),
        );
        writers.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let Ok(present) = client.find_meta(&service).await else {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    continue;
                };
                let (n, index) = present.map_or((0, 0), |meta| (meta.data.as_u64().unwrap(), meta.index));
                let last = acknowledged.lock().unwrap().get(&service).copied().unwrap_or(0);
                // One more than was acknowledged may be there: a write whose answer did not arrive.
                assert!(
                    n == last || n == last + 1,
                    "{service} is at {n}; {last} was acknowledged"
                );
                if client.set_meta(&service, &meta(n + 1, index)).await.is_ok() {
                    acknowledged.lock().unwrap().insert(service.clone(), n + 1);
                } else {
                    acknowledged.lock().unwrap().insert(service.clone(), n);
                }
            }
        }));
    }
    for _ in 0..KILLS {
        // Some while, so that kills meet every stage.
        tokio::time::sleep(Duration::from_millis(rand::random_range(20..250))).await;
        process.kill();
        process.restart();
        process.ready().await;
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    process.kill();
    process.restart();
    process.ready().await;
    let acknowledged = acknowledged.lock().unwrap().clone();
    let total: u64 = acknowledged.values().sum();
    assert!(total > KILLS, "only {total} writes: the test did not test");
    for (service, n) in acknowledged {
        let there = process
            .client
            .meta(&service)
            .await
            .unwrap()
            .data
            .as_u64()
            .unwrap();
        assert!(
            there == n || there == n + 1,
            "{service} is at {there}; {n} was acknowledged"
        );
    }
}

async fn full_disk() {
    let process = Process::start(Some("2m"));
    process.ready().await;
    let client = &process.client;
    client
        .create_service("web", &ServiceConfig::default())
        .await
        .unwrap();
    let mut last = client.set_meta("web", &meta(1, 0)).await.unwrap();

    let filler = process.data().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[1; 512]).is_ok() {}
    // The page that the journal ends in may have room for a few.
    let refused = eventually("a clear refusal", async || {
        let read = client.meta("web").await.unwrap();
        match client
            .set_meta(
                "web",
                &ServiceMeta {
                    data: json!("x".repeat(5000)),
                    ..read
                },
            )
            .await
        {
            Ok(_) => None,
            Err(error) => (error.code != ErrorCode::Timeout).then_some(error),
        }
    })
    .await;
    assert_eq!(refused.code, ErrorCode::LimitExceeded, "{refused}");
    assert!(refused.message.contains("make room"), "{refused}");
    // It goes on answering.
    assert_eq!(client.services().await.unwrap(), ["web"]);
    client.meta("web").await.unwrap();

    drop(file);
    std::fs::remove_file(&filler).unwrap();
    last = eventually("writes go on", async || {
        let read = client.meta("web").await.unwrap();
        client
            .set_meta(
                "web",
                &ServiceMeta {
                    data: json!(3),
                    ..read
                },
            )
            .await
            .ok()
            .filter(|new| new.index > last.index)
    })
    .await;
    assert_eq!(client.meta("web").await.unwrap(), last);
    // What is on the disk is whole.
    let copy = process.dir.path().join("journal");
    std::fs::copy(process.data().join("raft").join("journal"), &copy).unwrap();
    let mut entries = 0;
    Journal::open(&copy, |record| {
        entries += u32::from(matches!(record, Record::Entry(_)));
    })
    .unwrap();
    assert!(entries > 3);
}
