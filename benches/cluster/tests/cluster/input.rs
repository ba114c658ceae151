//! Bad input: refused with a reason and a way on, and nothing is lost by it.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flynn_api::{Error, ErrorCode};
use flynn_cluster_tests::{Answer, DOMAIN, FLYNN_HOST, Platform};
use http::Method;

use crate::fixture::{APP, Cluster};

/// The error of an answer that must be one, with this code, and speak of `words`.
fn refused(answer: &Answer, code: ErrorCode, words: &str) -> Result<()> {
    let error: Error = serde_json::from_str(&answer.body)
        .with_context(|| format!("{} without an error body: {:?}", answer.status, answer.body))?;
    eprintln!("      {}: {}", error.code, error.message);
    ensure!(
        error.code == code,
        "the code is {} and should be {code}",
        error.code
    );
    ensure!(answer.status == code.status(), "the status is {}", answer.status);
    ensure!(
        error.message.contains(words),
        "the message does not speak of {words:?}: {}",
        error.message
    );
    Ok(())
}

/// The app is as it was.
fn unharmed(platform: &Platform) -> Result<()> {
    platform.answers(APP, Duration::from_secs(30)).map(drop)
}

pub(crate) fn requests(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    let post = |path: &str, body: &str| platform.controller(Method::POST, path, body.to_owned());
    refused(&post("/apps", r#"{"name": "#)?, ErrorCode::Validation, "JSON")?;
    refused(
        &post("/apps", r#"{"nmae": "shop"}"#)?,
        ErrorCode::Validation,
        "nmae",
    )?;
    refused(
        &post("/apps", r#"{"name": "No Such Name!"}"#)?,
        ErrorCode::Validation,
        "name",
    )?;
    let unknown = r#"{"artifacts":["5f0c0b3e-5b0e-4b3b-9f3e-0d3c1c1d7a11"]}"#;
    let answer = post("/releases", unknown)?;
    ensure!(
        answer.status.is_client_error(),
        "{}: {}",
        answer.status,
        answer.body
    );
    ensure!(
        answer.body.contains("5f0c0b3e"),
        "the artifact is not named: {}",
        answer.body
    );
    let answer = post(
        &format!("/apps/{APP}/deploy"),
        r#"{"id":"5f0c0b3e-5b0e-4b3b-9f3e-0d3c1c1d7a11"}"#,
    )?;
    ensure!(
        answer.status.is_client_error(),
        "{}: {}",
        answer.status,
        answer.body
    );
    unharmed(platform)
}

pub(crate) fn archives(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    let dir = tempfile::tempdir()?;
    let whole = fs::read(platform.example())?;
    let push = |name: &str, bytes: &[u8]| -> Result<String> {
        let path = dir.path().join(name);
        fs::write(&path, bytes)?;
        platform.refused([
            "-a",
            APP,
            "docker",
            "push",
            "--archive",
            &path.display().to_string(),
        ])
    };
    let release = || platform.run(["-a", APP, "release", "show"]);
    let before = release()?;
    push("short.tar", &whole[..whole.len() / 2])?;
    push("empty.tar", b"")?;
    push("noise.tar", &[7; 10_000])?;
    ensure!(release()? == before, "a broken archive changed the release");

    // A layer under a digest that is not its own.
    let digest = flynn_api::Digest::of(b"what it should be").to_string();
    let url = format!("http://localhost/host/layers/{digest}");
    let args = [
        "--silent",
        "--show-error",
        "--unix-socket",
        flynn_api::host::SOCKET,
    ];
    let args = args
        .into_iter()
        .chain(["--request", "PUT", "--data-binary", "what it is", &url]);
    let said = platform.host().run("curl", args)?;
    ensure!(
        said.contains("validation"),
        "the host took a layer with a wrong digest: {said}"
    );
    let stored = format!("/var/lib/flynn/layers/{digest}.squashfs");
    ensure!(
        !platform.host().exec("test", ["-e", &stored])?.status.success(),
        "and kept it"
    );
    unharmed(platform)
}

pub(crate) fn names(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    let said = platform.refused(["create", "--remote", "", APP])?;
    ensure!(said.contains(APP), "{said}");
    platform.run(["create", "--remote", "", "other"])?;
    let domain = format!("{APP}.{DOMAIN}");
    let said = platform.refused(["-a", "other", "route", "add", "http", &domain])?;
    ensure!(said.contains(&domain), "the taken domain is not named: {said}");
    platform.run(["-a", "other", "delete", "-y"])?;
    let said = platform.refused(["-a", "nowhere", "ps"])?;
    ensure!(said.contains("nowhere"), "{said}");
    platform.refused(["-a", APP, "scale", "web=many"])?;
    let said = platform.refused(["-a", APP, "route", "add", "tcp", "--port", "1113"])?;
    ensure!(said.contains("1113"), "the host's own port is not named: {said}");
    platform.run(["-a", APP, "route", "add", "tcp", "--port", "3456"])?;
    let said = platform.refused(["-a", APP, "route", "add", "tcp", "--port", "3456"])?;
    ensure!(
        said.contains("3456") && said.contains(APP),
        "who has the port is not said: {said}"
    );
    unharmed(platform)
}

pub(crate) fn hosts(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.platform()?;
    // A second daemon, on the same state and on one of its own.
    for state in ["/var/lib/flynn", "/tmp/second"] {
        let output = platform
            .host()
            .exec("timeout", ["20", FLYNN_HOST, "daemon", "--state", state])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        eprintln!("      refused: {}", said.lines().last().unwrap_or_default());
        ensure!(
            !output.status.success() && output.status.code() != Some(124),
            "two daemons run on one host"
        );
        ensure!(said.contains("stop it first"), "it says: {said}");
    }
    // Not as root.
    let user = [
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        FLYNN_HOST,
        "daemon",
    ];
    let output = platform.host().exec("setpriv", user)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success() && said.contains("root"),
        "without root it says: {said}"
    );
    Ok(())
}

pub(crate) fn secrets(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    platform.run(["-a", APP, "env", "set", "API_TOKEN=s3cr3t-of-the-app"])?;
    unharmed(platform)?;
    let key = platform.bootstrapped()?.controller_key.clone();
    let secrets = [key.as_str(), "s3cr3t-of-the-app"];
    let shown = |what: &str, text: &str| -> Result<()> {
        for secret in secrets {
            ensure!(!text.contains(secret), "a secret shows in {what}");
        }
        Ok(())
    };
    // Command lines of every process; the logs; what the host says of its jobs; the controller's events.
    let lines = platform.host().run(
        "sh",
        ["-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '; true"],
    )?;
    shown("a command line", &lines)?;
    let logs = platform
        .host()
        .run("sh", ["-c", "cat /var/lib/flynn/jobs/*/log/* 2>/dev/null; true"])?;
    shown("a log", &logs)?;
    let daemon = fs::read(platform.host().log(platform.daemon()))?;
    shown("the daemon's log", &String::from_utf8_lossy(&daemon))?;
    let curl = [
        "--silent",
        "--unix-socket",
        flynn_api::host::SOCKET,
        "http://localhost/host/jobs",
    ];
    shown("the host's jobs", &platform.host().run("curl", curl)?)?;
    let inspect = "for job in $(flynn-host ps --all --quiet); do \
                   flynn-host inspect $job; flynn-host inspect --json $job; done";
    let inspected = platform.host().run("sh", ["-ec", inspect])?;
    ensure!(
        inspected.contains("API_TOKEN"),
        "the environment is not shown at all: {inspected}"
    );
    shown("an inspected job", &inspected)?;
    shown("ps", &platform.run(["-a", APP, "ps"])?)?;
    // Errors: of a program that is not there, of a release that is refused, and of a key that is wrong.
    shown(
        "a failed command",
        &platform.refused(["-a", APP, "run", "--", "/no/such/program"])?,
    )?;
    let release = r#"{"env":{"API_TOKEN":"s3cr3t-of-the-app"},"artifacts":["nowhere"],"procesess":{}}"#;
    let answer = platform.controller(Method::POST, "/releases", release)?;
    ensure!(
        answer.status.is_client_error(),
        "{}: {}",
        answer.status,
        answer.body
    );
    shown("a refused release", &answer.body)?;
    shown(
        "the events",
        &platform.controller(Method::GET, "/events?past=true", "")?.body,
    )?;
    let value = platform.run(["-a", APP, "env", "get", "API_TOKEN"])?;
    ensure!(
        value.trim() == "s3cr3t-of-the-app",
        "its owner does not see it: {value:?}"
    );
    platform.run(["-a", APP, "env", "unset", "API_TOKEN"]).map(drop)
}
