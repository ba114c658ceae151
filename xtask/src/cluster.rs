//! Making a cluster of the lab's host and deploying the example to it: with the commands that an operator and a
//! developer would type.

use crate::image::ARCHIVE;
use crate::lab::{self, Lab, Ports};
use crate::{build, exec, ui, workspace};
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The domain of the lab's cluster, which leads to this machine by its very name.
const DOMAIN: &str = "flynn.localhost";
/// The example app.
const APP: &str = "example";

/// What a bootstrap has made.
#[derive(Deserialize)]
pub(crate) struct Cluster {
    controller_key: String,
    tls_pin: String,
}

/// The address of the example.
pub(crate) fn url(ports: Ports) -> String {
    format!("http://{APP}.{DOMAIN}:{}", ports.http)
}

/// Waits until the host's daemon answers.
pub(crate) fn wait_for_daemon(lab: &Lab) -> Result<()> {
    wait(Duration::from_secs(30), || {
        let Ok(mut command) = lab.in_host("test", ["-S", "/run/flynn/host.sock"]) else {
            return false;
        };
        command
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    })
    .with_context(|| {
        format!(
            "the host's daemon does not come up; {} says why",
            lab.daemon_log().display()
        )
    })
}

/// Makes a cluster of the host. Progress goes to stderr.
pub(crate) fn bootstrap(lab: &Lab) -> Result<Cluster> {
    let mut command = lab.in_host(
        "flynn-host",
        ["bootstrap", "--domain", DOMAIN, "--images", lab::IMAGES, "--json"],
    )?;
    let output = exec::tied(&mut command)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run bootstrap")?;
    if !output.status.success() {
        bail!(
            "bootstrap failed: {}; {} may say more",
            output.status,
            lab.daemon_log().display()
        );
    }
    serde_json::from_slice(&output.stdout).context("bootstrap's answer cannot be read")
}

/// Tells the CLI of the cluster.
pub(crate) fn add(lab: &Lab, cluster: &Cluster, profile: build::Profile, ports: Ports) -> Result<()> {
    let domain = format!("{DOMAIN}:{}", ports.https);
    let mut child = flynn(lab, profile)
        .args([
            "cluster",
            "add",
            "--force",
            "--default",
            "--tls-pin",
            &cluster.tls_pin,
            "lab",
            &domain,
            "-",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot run flynn")?;
    // The key is not on the command line, where every user of the machine could read it.
    child
        .stdin
        .take()
        .context("no stdin")?
        .write_all(cluster.controller_key.as_bytes())?;
    let status = child.wait()?;
    if !status.success() {
        bail!("`flynn cluster add` failed: {status}");
    }
    Ok(())
}

/// Deploys the example from its docker-archive and waits until it answers.
pub(crate) fn deploy(lab: &Lab, profile: build::Profile, ports: Ports) -> Result<()> {
    let archive = workspace::images().join(ARCHIVE);
    let known = exec::quiet(flynn(lab, profile).args(["-a", APP, "info"])).is_ok();
    if !known {
        exec::quiet(flynn(lab, profile).args(["create", "--remote", "", APP]))?;
    }
    exec::run(
        flynn(lab, profile)
            .args(["-a", APP, "docker", "push", "--archive"])
            .arg(archive),
    )?;
    wait(Duration::from_mins(1), || {
        answer(ports).is_some_and(|answer| answer.contains("200 OK"))
    })
    .with_context(|| format!("{} does not answer; `flynn -a {APP} log` may say why", url(ports)))
}

/// The CLI with the lab's cluster.
pub(crate) fn flynn(lab: &Lab, profile: build::Profile) -> Command {
    let mut command = Command::new(profile.binary("flynn"));
    command.env("FLYNNRC", lab.flynnrc());
    command
}

/// What the example answers, status line and all.
pub(crate) fn answer(ports: Ports) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", ports.http)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: {APP}.{DOMAIN}\r\nConnection: close\r\n\r\n"
    )
    .ok()?;
    let mut text = String::new();
    stream.take(64 << 10).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The two or three commands to try next.
pub(crate) fn what_next(lab: &Lab, profile: build::Profile, ports: Ports) {
    let bin = profile.binary("flynn");
    let bin = bin.parent().unwrap_or(&bin).display();
    ui::step("Try next");
    for line in [
        format!("export PATH={bin}:$PATH FLYNNRC={}", lab.flynnrc().display()),
        format!("curl {}", url(ports)),
        format!("flynn -a {APP} scale web=3"),
        format!("flynn -a {APP} env set GREETING=Hi"),
        format!("cargo xtask down{}", lab.option()),
    ] {
        ui::note(&line);
    }
}

fn wait(limit: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    let begun = Instant::now();
    while !condition() {
        if begun.elapsed() > limit {
            bail!("waited {} s in vain", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
