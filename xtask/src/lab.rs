//! The lab that `up` boots and `down` ends, through the `flynn-lab` binary.

use crate::{build, exec, workspace};
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Its name.
const NAME: &str = "up";
/// What the host's daemon is called there.
pub(crate) const DAEMON: &str = "flynn-host";
/// Where the host has the images.
pub(crate) const IMAGES: &str = "/usr/local/share/flynn/images";

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

/// The lab's state directory.
pub(crate) fn dir() -> PathBuf {
    labs().join(NAME)
}

/// What the host's daemon says.
pub(crate) fn daemon_log() -> PathBuf {
    dir().join("host1").join(format!("{DAEMON}.log"))
}

/// The tool: the lab's own copy of it, since it knows that lab, else the one that is built.
fn tool() -> Result<Command> {
    let built = build::Profile::default().binary("flynn-lab");
    let debug = build::Profile::debug().binary("flynn-lab");
    let program = [dir().join("program"), built, debug]
        .into_iter()
        .find(|path| path.is_file());
    let mut command = Command::new(program.context("flynn-lab is not built; run `cargo xtask build`")?);
    command.arg("--labs").arg(labs());
    Ok(command)
}

/// Whether the tool is there at all; without it, no lab ever was.
pub(crate) fn tool_exists() -> bool {
    tool().is_ok()
}

/// Boots the lab: one host with our daemon.
pub(crate) fn up(profile: build::Profile, ports: Ports) -> Result<Status> {
    let bind = |from: PathBuf, to: &str| json!({ "from": from, "to": to });
    let config = json!({
        "name": NAME,
        "dir": dir(),
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
    let file = labs().join(format!("{NAME}.json"));
    std::fs::write(&file, serde_json::to_vec_pretty(&config)?)
        .context("cannot write the lab's configuration")?;
    exec::run(tool()?.arg("up").arg(file))
        .context("should a port be in use, choose others with --http-port and --https-port")?;
    status().context("the lab does not answer")
}

/// How the lab is; none when there is none that answers.
pub(crate) fn status() -> Option<Status> {
    let output = tool()
        .ok()?
        .args(["status", NAME])
        .stderr(Stdio::null())
        .output()
        .ok()?;
    if !output.status.success() {
        return None;
    }
    serde_json::from_slice(&output.stdout).ok()
}

/// Ends the lab, or what is left of a crashed one; `all` ends those of killed tests as well.
pub(crate) fn down(all: bool) -> Result<()> {
    exec::run(tool()?.args(["down", if all { "--all" } else { NAME }]))
}

/// A command that runs in the host.
pub(crate) fn in_host<A: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = A>) -> Result<Command> {
    let mut command = tool()?;
    command.args(["exec", NAME, "1", program]).args(args);
    Ok(command)
}

/// Sees that we are root, which namespaces and mounts need.
pub(crate) fn need_root() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("this needs root, for namespaces and mounts; run it as root");
    }
    Ok(())
}
