//! A keeper in a process of its own, which can be killed.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use flynn_api::client::Http;
use flynn_api::sirenia::Status;
use flynn_postgres::Options;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio_postgres::{Client, NoTls};

use crate::discoverd::Discoverd;

pub(crate) const PASSWORD: &str = "correct horse 'battery' \\staple";

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// Waits until `attempt` gives something.
pub(crate) async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut attempt: impl FnMut() -> F) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = attempt().await {
            return value;
        }
        assert!(Instant::now() < end, "waited {PATIENCE:?} in vain: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A volume, an address, and the process on them.
pub(crate) struct Keeper {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) address: Ipv4Addr,
    pub(crate) password: String,
    discoverd: (SocketAddr, SocketAddr),
    child: Option<Child>,
}

impl Keeper {
    pub(crate) fn new(discoverd: &Discoverd, addresses: (SocketAddr, SocketAddr)) -> Self {
        // An address of its own on loopback, so that each has port 5432.
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let pid = std::process::id().to_be_bytes();
        let address = Ipv4Addr::new(127, pid[2] | 1, pid[3], NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::tempdir().unwrap();
        discoverd.issue(&dir.path().join("tls"));
        Self {
            dir,
            address,
            password: PASSWORD.into(),
            discoverd: addresses,
            child: None,
        }
    }

    /// Moves to another address, as a job that is started again.
    pub(crate) fn move_away(&mut self) {
        let [a, b, c, d] = self.address.octets();
        self.address = Ipv4Addr::new(a, b, c, d.wrapping_add(100));
    }

    pub(crate) fn volume(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub(crate) fn start(&mut self) {
        let child = Command::new(std::env::current_exe().unwrap())
            .args([
                "keeper".into(),
                self.dir.path().display().to_string(),
                self.address.to_string(),
            ])
            .args([self.discoverd.0.to_string(), self.discoverd.1.to_string()])
            .env("POSTGRES_PASSWORD", &self.password)
            .process_group(0)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    pub(crate) async fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended().await
    }

    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        tokio::task::spawn_blocking(move || child.wait().unwrap())
            .await
            .unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(self.child.as_ref().unwrap()), signal).unwrap();
    }

    /// Kills the keeper alone: its server goes on.
    pub(crate) async fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.ended().await;
    }

    /// Kills everything at once, as the end of a container does.
    pub(crate) async fn power_off(&mut self) {
        let server = self.postmaster();
        self.signal(Signal::KILL);
        if let Some(server) = server {
            // Each process of the server has a group of its own.
            for pid in children(server).into_iter().chain([server]) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        self.ended().await;
    }

    pub(crate) fn postmaster(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(self.volume().join("pg/postmaster.pid")).ok()?;
        Pid::from_raw(text.lines().next()?.parse().ok()?)
    }

    pub(crate) async fn status(&self) -> Option<Status> {
        let http = Http::new(&format!("http://{}:5433", self.address)).unwrap();
        http.get("/status").await.ok()
    }

    pub(crate) async fn connect(&self, password: &str) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::Config::new()
            .host(self.address.to_string())
            .user("flynn")
            .dbname("flynn")
            .password(password)
            .connect_timeout(Duration::from_secs(5))
            .connect(NoTls)
            .await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Waits until clients can log in.
    pub(crate) async fn ready(&self) -> Client {
        until("clients can log in", || async {
            self.connect(&self.password).await.ok()
        })
        .await
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(pid) = self.postmaster().filter(|pid| is_server(*pid, &self.volume())) {
            let _ = kill_process_group(pid, Signal::QUIT);
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn is_server(pid: Pid, volume: &Path) -> bool {
    let cwd = std::fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero()));
    cwd.is_ok_and(|cwd| cwd.starts_with(volume))
}

/// The children of a process.
pub(crate) fn children(pid: Pid) -> Vec<Pid> {
    let pid = pid.as_raw_nonzero();
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace()
        .filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
        .collect()
}

/// The process of [`Keeper::start`].
pub(crate) fn main(arguments: &[String]) {
    let [dir, address, plain, tls] = arguments else {
        panic!("{arguments:?}")
    };
    let options = Options {
        data: Path::new(dir).join("data"),
        programs: crate::programs().unwrap(),
        address: address.parse().unwrap(),
        port: 5432,
        password: std::env::var("POSTGRES_PASSWORD").unwrap(),
        discoverd: format!("http://{plain}"),
        cluster: format!("https://{tls}"),
        identity: Some(Path::new(dir).join("tls")),
        labels: [("FLYNN_APP_NAME".to_owned(), "postgres".to_owned())].into(),
    };
    flynn_api::tls::install_provider();
    flynn_api::server::init_logging("postgres");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let run = async { flynn_postgres::run(options, flynn_api::server::shutdown().cancelled_owned()).await };
    if let Err(error) = runtime.block_on(run) {
        eprintln!("{error}");
        std::process::exit(1);
    }
}
