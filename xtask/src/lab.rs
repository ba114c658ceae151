//! The lab that `up` boots and `down` ends, through the `flynn-lab` binary. There may be several, by name.

use crate::{build, exec, workspace};
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// What it is called when nobody says otherwise.
const DEFAULT: &str = "up";
/// What the host's daemon is called there.
pub(crate) const DAEMON: &str = "flynn-host";
/// Where the host has the images.
pub(crate) const IMAGES: &str = "/usr/local/share/flynn/images";

/// The lab.
#[derive(clap::Args, Clone)]
pub(crate) struct Lab {
    /// Its name: several can be up, each with ports of its own
    #[arg(long = "lab", value_name = "NAME", default_value = DEFAULT)]
    name: String,
}

/// Where the machine listens for the cluster, on 127.0.0.1.
#[derive(clap::Args, Clone, Copy)]
pub(crate) struct Ports {
    /// The port for HTTP
    #[arg(long = "http-port", value_name = "PORT", default_value_t = 8080)]
    pub(crate) http: u16,
    /// The port for HTTPS
    #[arg(long = "https-port", value_name = "PORT", default_value_t = 8443)]
    pub(crate) https: u16,
}

/// How a lab is, as `flynn-lab status` says.
#[derive(Deserialize)]
pub(crate) struct Status {
    pub(crate) hosts: Vec<Host>,
    forwards: Vec<SocketAddr>,
}

impl Status {
    /// Where the machine listens for it.
    pub(crate) fn ports(&self) -> Result<Ports> {
        let [http, https] = self.forwards[..] else {
            bail!("the lab does not listen; `cargo xtask down` ends it")
        };
        Ok(Ports {
            http: http.port(),
            https: https.port(),
        })
    }
}

/// One host of it.
#[derive(Deserialize)]
pub(crate) struct Host {
    pub(crate) number: u8,
    pub(crate) init: Option<i32>,
    pub(crate) services: BTreeMap<String, Option<i32>>,
}

/// Where labs have their state.
fn labs() -> PathBuf {
    workspace::target().join("lab")
}

impl Lab {
    /// Its state directory.
    fn dir(&self) -> PathBuf {
        labs().join(&self.name)
    }

    /// What the host's daemon says.
    pub(crate) fn daemon_log(&self) -> PathBuf {
        self.dir().join("host1").join(format!("{DAEMON}.log"))
    }

    /// Where the CLI keeps its cluster: beside the lab, and not among the developer's own clusters.
    pub(crate) fn flynnrc(&self) -> PathBuf {
        labs().join(format!("{}.flynnrc", self.name))
    }

    /// What a command of ours must be given to mean this one.
    pub(crate) fn option(&self) -> String {
        if self.name == DEFAULT {
            String::new()
        } else {
            format!(" --lab {}", self.name)
        }
    }

    /// The tool: the lab's own copy of it, since it knows that lab, else the one that is built.
    fn tool(&self) -> Result<Command> {
        let built = build::Profile::default().binary("flynn-lab");
        let debug = build::Profile::debug().binary("flynn-lab");
        let program = [self.dir().join("program"), built, debug]
            .into_iter()
            .find(|path| path.is_file());
        let mut command = Command::new(program.context("flynn-lab is not built; run `cargo xtask build`")?);
        command.arg("--labs").arg(labs());
        Ok(command)
    }

    /// Whether the tool is there at all; without it, no lab ever was.
    pub(crate) fn tool_exists(&self) -> bool {
        self.tool().is_ok()
    }

    /// Boots it: one host with our daemon.
    pub(crate) fn up(&self, profile: build::Profile, ports: Ports) -> Result<Status> {
        let bind = |from: PathBuf, to: &str| json!({ "from": from, "to": to });
        let config = json!({
            "name": self.name,
            "dir": self.dir(),
            "hosts": 1,
            "services": [{ "name": DAEMON, "command": ["/usr/local/bin/flynn-host", "daemon"] }],
            "binds": [
                bind(profile.binary("flynn-host"), "/usr/local/bin/flynn-host"),
                bind(profile.binary("flynn"), "/usr/local/bin/flynn"),
                bind(workspace::images(), IMAGES),
            ],
            "forwards": [
                { "listen": format!("127.0.0.1:{}", ports.http), "port": 80 },
                { "listen": format!("127.0.0.1:{}", ports.https), "port": 443 },
            ],
        });
        std::fs::create_dir_all(labs()).context("cannot make target/lab")?;
        let file = labs().join(format!("{}.json", self.name));
        std::fs::write(&file, serde_json::to_vec_pretty(&config)?)
            .context("cannot write the lab's configuration")?;
        exec::run(self.tool()?.arg("up").arg(file))
            .context("should a port be in use, choose others with --http-port and --https-port")?;
        self.status().context("the lab does not answer")
    }

    /// How it is; none when there is none that answers.
    pub(crate) fn status(&self) -> Option<Status> {
        let output = self
            .tool()
            .ok()?
            .args(["status", &self.name])
            .stderr(Stdio::null())
            .output()
            .ok()?;
        if !output.status.success() {
            return None;
        }
        serde_json::from_slice(&output.stdout).ok()
    }

    /// Ends it, or what is left of a crashed one; `all` ends every lab, those of killed tests as well.
    pub(crate) fn down(&self, all: bool) -> Result<()> {
        exec::run(
            self.tool()?
                .args(["down", if all { "--all" } else { &self.name }]),
        )?;
        // It holds the key of a cluster that is no more.
        for left in [self.flynnrc(), labs().join(format!("{}.json", self.name))] {
            let _ = std::fs::remove_file(left);
        }
        Ok(())
    }

    /// A command that runs in the host.
    pub(crate) fn in_host<A: AsRef<OsStr>>(
        &self,
        program: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Command> {
        let mut command = self.tool()?;
        command.args(["exec", &self.name, "1", program]).args(args);
        Ok(command)
    }
}

/// Sees that we are root, which namespaces and mounts need.
pub(crate) fn need_root() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("this needs root, for namespaces and mounts; run it as root");
    }
    Ok(())
}
