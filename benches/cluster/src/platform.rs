//! The platform on one host of a lab.

use std::ffi::OsStr;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use flynn_api::client::{Http, full};
use flynn_lab::{Bind, Forward, Host, Lab, LabConfig, Service};
use http::header::HOST;
use http::{Request, StatusCode};
use http_body_util::BodyExt as _;
use serde::Deserialize;

use crate::{Artifacts, until};

/// The cluster's domain.
pub const DOMAIN: &str = "flynn.localhost";

/// Where the lab's hosts have the host's binary. They do not see the machine's own paths: a checkout below `/tmp`, say.
pub const FLYNN_HOST: &str = "/usr/local/bin/flynn-host";

/// Where the lab's hosts have the images.
pub const IMAGES: &str = "/usr/local/share/flynn/images";

/// Where the lab's hosts have the program that booted the lab.
pub const PROGRAM: &str = "/usr/local/bin/lab-program";

/// What the host's daemon is called in the lab.
const DAEMON: &str = "flynn-host";

/// How long a daemon may take to answer for the first time.
const PATIENCE: Duration = Duration::from_secs(30);

/// What bootstrap says in the end.
#[derive(Clone, Deserialize)]
pub struct Bootstrapped {
    /// The cluster's domain.
    pub domain: String,
    /// The key of the controller.
    pub controller_key: String,
    /// The certificate that the command line pins.
    pub tls_pin: String,
    /// What bootstrap itself took.
    pub seconds: f64,
}

/// An answer to an HTTP request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: String,
}

/// A platform.
pub struct Platform {
    lab: Lab,
    artifacts: Artifacts,
    /// The command line's home.
    home: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    http: SocketAddr,
    https: SocketAddr,
    bootstrapped: Option<Bootstrapped>,
}

impl Platform {
    /// Boots a lab of so many hosts, each with its daemon; the platform comes to be on the first. The calling program
    /// must begin its `main` with [`flynn_lab::reexec`].
    pub fn boot(name: &str, artifacts: &Artifacts, hosts: u8) -> Result<Self> {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut config = LabConfig::new(name, artifacts.labs.join(name), hosts);
        config.services = vec![Service {
            name: DAEMON.into(),
            command: vec![FLYNN_HOST.into(), "daemon".into()],
            env: [("RUST_LOG".to_owned(), "info".to_owned())].into(),
        }];
        let bind = |from: &Path, to: &str| Bind {
            from: from.to_owned(),
            to: to.into(),
        };
        config.binds = vec![
            bind(&artifacts.flynn_host, FLYNN_HOST),
            bind(&artifacts.images, IMAGES),
            bind(&std::env::current_exe()?, PROGRAM),
        ];
        config.forwards = [80, 443].map(|port| Forward { listen: any, port }).into();
        let lab = Lab::start(&config)?;
        let forwards = lab.forwards()?;
        let [http, https] = forwards[..] else {
            bail!("the lab has {} forwards, not 2", forwards.len())
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let home = tempfile::tempdir().context("cannot make a home for the command line")?;
        Ok(Self {
            lab,
            artifacts: artifacts.clone(),
            home,
            runtime,
            http,
            https,
            bootstrapped: None,
        })
    }

    /// The lab's first host, which has the platform.
    pub fn host(&self) -> Host<'_> {
        self.lab.host(1)
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Where the machine reaches the router.
    pub fn router(&self) -> SocketAddr {
        self.http
    }

    /// What bootstrap said.
    pub fn bootstrapped(&self) -> Result<&Bootstrapped> {
        self.bootstrapped
            .as_ref()
            .context("the cluster was not bootstrapped")
    }

    /// The daemon's name in the lab.
    pub fn daemon(&self) -> &'static str {
        DAEMON
    }

    /// Bootstraps the cluster from the built images, and gives what it took from the first command to the last.
    pub fn bootstrap(&mut self) -> Result<Duration> {
        until(PATIENCE, "the daemon's socket is there", || {
            Ok(self
                .host()
                .exec("test", ["-S", flynn_api::host::SOCKET])?
                .status
                .success()
                .then_some(()))
        })?;
        let begun = Instant::now();
        let mut command = self.host().command(FLYNN_HOST)?;
        command.args(["bootstrap", "--json", "--domain", DOMAIN, "--images", IMAGES]);
        let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("bootstrap failed: {}; what it says is above", output.status);
        }
        let took = begun.elapsed();
        let said: Bootstrapped = serde_json::from_slice(&output.stdout).context("bootstrap's JSON")?;
        self.bootstrapped = Some(said);
        Ok(took)
    }

    /// Makes the cluster known to the command line.
    pub fn cluster_add(&self) -> Result<()> {
        let said = self.bootstrapped()?;
        let domain = format!("{}:{}", said.domain, self.https.port());
        let mut command = self.flynn();
        command.args([
            "cluster",
            "add",
            "--force",
            "--default",
            "--tls-pin",
            &said.tls_pin,
            "lab",
            &domain,
            "-",
        ]);
        // The key is not on the command line, where every user of the machine could read it.
        let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        writeln!(stdin, "{}", said.controller_key)?;
        drop(stdin);
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "cluster add failed: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }

    /// The command line, in a home of its own.
    pub fn flynn(&self) -> Command {
        let mut command = Command::new(&self.artifacts.flynn);
        command
            .env("HOME", self.home.path())
            .current_dir(self.home.path())
            .stdin(Stdio::null());
        for name in ["FLYNN_APP", "FLYNN_CLUSTER", "FLYNNRC"] {
            command.env_remove(name);
        }
        command
    }

    /// Runs the command line to its end.
    pub fn output<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<Output> {
        let mut command = self.flynn();
        command.args(args);
        let shown: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
        let shown = shown.join(" ");
        eprintln!("    $ flynn {shown}");
        command.output().context("cannot run the command line")
    }

    /// Runs the command line, which must succeed, and gives what it wrote to stdout.
    pub fn run<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<String> {
        let output = self.output(args)?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!("flynn ended with {}: {}", output.status, said.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs the command line, which must fail, and gives what it wrote to stderr.
    pub fn refused<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Result<String> {
        let output = self.output(args)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            bail!(
                "flynn should have refused, and said: {}",
                String::from_utf8_lossy(&output.stdout)
            );
        }
        eprintln!("      refused: {}", said.trim());
        Ok(said)
    }

    /// Makes an app of the example and waits until it answers.
    pub fn push_example(&self, app: &str) -> Result<()> {
        self.run(["create", "--remote", "", app])?;
        let archive = self.artifacts.example.display().to_string();
        self.run(["-a", app, "docker", "push", "--archive", &archive])?;
        self.answers(app, Duration::from_mins(1)).map(drop)
    }

    /// The example's docker-archive.
    pub fn example(&self) -> &Path {
        &self.artifacts.example
    }

    /// Waits until an app answers through the router.
    pub fn answers(&self, app: &str, limit: Duration) -> Result<Answer> {
        until(limit, &format!("{app} answers"), || {
            let answer = self.get(&format!("{app}.{DOMAIN}"), "/")?;
            if answer.status != StatusCode::OK {
                bail!("{}: {}", answer.status, answer.body.trim());
            }
            Ok(Some(answer))
        })
    }

    /// Asks the router from the machine, over a connection of its own.
    pub fn get(&self, host: &str, path: &str) -> Result<Answer> {
        self.send(Request::get(path).header(HOST, host).body(full(""))?)
    }

    /// Asks the controller, through the router, with the cluster's key.
    pub fn controller(
        &self,
        method: http::Method,
        path: &str,
        body: impl Into<bytes::Bytes>,
    ) -> Result<Answer> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, format!("controller.{DOMAIN}"))
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(full(body))?;
        self.send(request)
    }

    fn send(&self, request: Request<flynn_api::client::Body>) -> Result<Answer> {
        let mut http = Http::new(&format!("http://{}", self.http))?;
        if let Some(said) = &self.bootstrapped {
            http = http.password(&said.controller_key);
        }
        let exchange = async {
            let response = http.send_raw(request).await?;
            let status = response.status();
            let body = response
                .into_body()
                .collect()
                .await
                .context("the answer was cut short")?
                .to_bytes();
            anyhow::Ok(Answer {
                status,
                body: String::from_utf8_lossy(&body).into_owned(),
            })
        };
        self.runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(15), exchange).await })
            .context("no answer within 15 s")?
    }

    /// Shows the end of every log there is, to find out why something failed.
    pub fn dump(&self) {
        let mut stderr = std::io::stderr();
        let script = "for log in /var/lib/flynn/jobs/*; do echo \"--- $log\"; \
                      cat \"$log/status.json\" 2>/dev/null | head -c 1500; echo; \
                      tail -qn 40 \"$log\"/log/* 2>/dev/null | cut -c 1-400; done";
        let hosts = self.lab.status().map_or(0, |status| status.hosts.len());
        for host in 1..=u8::try_from(hosts).unwrap_or(u8::MAX) {
            let host = self.lab.host(host);
            let jobs = host
                .exec("sh", ["-c", script])
                .map(|output| output.stdout)
                .unwrap_or_default();
            let daemon = std::fs::read(host.log(DAEMON)).unwrap_or_default();
            let daemon = &daemon[daemon.len().saturating_sub(16 << 10)..];
            let name = host.name();
            // A closed stderr is no reason to stop.
            let _ = writeln!(stderr, "=== jobs of {name}")
                .and_then(|()| stderr.write_all(&jobs))
                .and_then(|()| writeln!(stderr, "\n=== {DAEMON} of {name}"))
                .and_then(|()| stderr.write_all(daemon));
        }
    }

    /// Ends it and sees that nothing is left.
    pub fn down(self) -> Result<()> {
        self.lab.down()
    }
}
