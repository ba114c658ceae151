//! A PostgreSQL cluster in a temporary directory, on a Unix socket, run by nobody. Made once per process.

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use tokio_postgres::NoTls;

const BIN: &str = "/usr/lib/postgresql/15/bin";
/// `nobody`: PostgreSQL refuses to run as root.
const NOBODY: u32 = 65534;

/// Why there can be no cluster.
pub(crate) fn missing() -> Option<String> {
    let initdb = Path::new(BIN).join("initdb");
    (!initdb.exists()).then(|| format!("{} is missing: install postgresql-15", initdb.display()))
}

/// A running cluster.
pub(crate) struct Cluster {
    dir: tempfile::TempDir,
    server: Mutex<Option<Child>>,
}

/// The cluster of this process.
pub(crate) static CLUSTER: LazyLock<Cluster> = LazyLock::new(Cluster::start);

fn is_root() -> bool {
    std::fs::metadata("/proc/self")
        .map(|me| std::os::unix::fs::MetadataExt::uid(&me))
        .ok()
        == Some(0)
}

fn command(program: &str) -> Command {
    let mut command = Command::new(Path::new(BIN).join(program));
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/");
    command
}

fn copy(from: &Path, to: &Path) {
    // Owner and modes as they are: PostgreSQL looks at both.
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(copied.success(), "cannot copy {}", from.display());
}

impl Cluster {
    /// Makes and starts one.
    pub(crate) fn start() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("flynn-controller-pg")
            .tempdir_in("/tmp")
            .unwrap();
        if is_root() {
            chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let cluster = Self {
            dir,
            server: Mutex::new(None),
        };
        cluster.copy_template();
        cluster.launch();
        cluster
    }

    /// Copies a data directory that the first process to need one has made: `initdb` takes longer than most tests,
    /// and runners may give each test a process.
    fn copy_template(&self) {
        let template = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("postgres-15-root-{}", is_root()));
        if !template.exists() {
            let made = command("initdb")
                .args([
                    "--auth=trust",
                    "--username=flynn",
                    "--no-sync",
                    "--encoding=UTF8",
                    "--locale=C",
                ])
                .arg("-D")
                .arg(self.data())
                .status()
                .unwrap();
            assert!(made.success(), "initdb failed");
            let mine = template.with_extension(std::process::id().to_string());
            copy(&self.data(), &mine);
            // Another process may have been faster; its template is as good.
            if std::fs::rename(&mine, &template).is_err() {
                let _ = std::fs::remove_dir_all(&mine);
            }
            return;
        }
        copy(&template, &self.data());
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Starts the server and waits until it answers.
    pub(crate) fn launch(&self) {
        let mut server = self.server.lock().unwrap();
        assert!(server.is_none());
        let mut postgres = command("postgres");
        postgres.arg("-D").arg(self.data()).arg("-k").arg(self.dir.path());
        postgres.args([
            "-c",
            "listen_addresses=",
            "-c",
            "fsync=off",
            "-c",
            "max_connections=200",
        ]);
        *server = Some(postgres.spawn().unwrap());
        drop(server);
        // After a kill it looks through its log first.
        let patience = Instant::now() + Duration::from_mins(1);
        while Instant::now() < patience {
            let ready = command("pg_isready")
                .args(["-q", "-h"])
                .arg(self.dir.path())
                .status()
                .unwrap();
            if ready.success() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("PostgreSQL did not start");
    }

    /// Kills the server as a power cut would: nothing is flushed, every connection breaks.
    pub(crate) fn kill(&self) {
        let Some(mut server) = self.server.lock().unwrap().take() else {
            return;
        };
        // An immediate shutdown takes the server's children along, which SIGKILL of the first process would not.
        let stopped = command("pg_ctl")
            .args(["stop", "-m", "immediate", "-D"])
            .arg(self.data())
            .status();
        if !stopped.is_ok_and(|status| status.success()) {
            let _ = server.kill();
        }
        let _ = server.wait();
    }

    /// The configuration of a new, empty database.
    pub(crate) async fn database(&self) -> tokio_postgres::Config {
        let name = format!("test_{}", uuid::Uuid::new_v4().simple());
        let (client, connection) = self.config("postgres").connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
            .batch_execute(&format!("CREATE DATABASE {name}"))
            .await
            .unwrap();
        self.config(&name)
    }

    fn config(&self, name: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host_path(self.dir.path()).user("flynn").dbname(name);
        config
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Ends the cluster of this process, if it was started: nothing drops a static.
pub(crate) fn stop() {
    if LazyLock::get(&CLUSTER).is_some() {
        CLUSTER.kill();
        let _ = std::fs::remove_dir_all(CLUSTER.dir.path());
    }
}
