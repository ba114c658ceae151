//! What a developer does with an app, from the first push to the shell in it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flynn_api::controller::{Job, JobState};
use flynn_cluster_tests::{DOMAIN, Engine, Platform, until};

use crate::fixture::{APP, Cluster};

const MINUTE: Duration = Duration::from_mins(1);

pub(crate) fn comes_up(cluster: &mut Cluster) -> Result<()> {
    cluster.platform()?;
    eprintln!("    bootstrap took {:.1} s", cluster.took.as_secs_f64());
    Ok(())
}

pub(crate) fn answers(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    let answer = platform.answers(APP, MINUTE)?;
    ensure!(
        answer.body.starts_with("Hello from "),
        "the app said {:?}",
        answer.body
    );
    let apps = platform.run(["apps"])?;
    ensure!(apps.contains(APP), "the app is not listed: {apps}");
    Ok(())
}

pub(crate) fn engine(cluster: &mut Cluster) -> Result<()> {
    const LOCAL: &str = "local";
    const IMAGE: &str = "flynn-example:latest";
    let platform = cluster.platform()?;
    let engine = Engine::start()?;
    engine.load(platform.example())?;
    platform.run(["create", "--remote", "", LOCAL])?;
    let push = |host: &str, path: Option<&str>, image: &str| -> Result<(bool, String)> {
        let mut command = platform.flynn();
        command
            .env("DOCKER_HOST", host)
            .args(["-a", LOCAL, "docker", "push", image]);
        if let Some(path) = path {
            command.env("PATH", path);
        }
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        eprintln!("      docker push {image}: {said}");
        Ok((output.status.success(), said))
    };
    let refused = |host: &str, path: Option<&str>, image: &str, words: &str| -> Result<()> {
        let (done, said) = push(host, path, image)?;
        ensure!(
            !done && said.contains(words),
            "it should speak of {words:?}: {said}"
        );
        Ok(())
    };
    refused(&engine.host(), None, "no-such-image", "no-such-image")?;
    refused("unix:///nowhere.sock", None, IMAGE, "/nowhere.sock")?;
    refused(&engine.host(), Some("/nowhere"), IMAGE, "install docker")?;

    let (done, said) = push(&engine.host(), None, IMAGE)?;
    ensure!(done, "{said}");
    engine.end()?;
    let answer = platform.answers(LOCAL, MINUTE)?;
    ensure!(
        answer.body.starts_with("Hello from "),
        "the app said {:?}",
        answer.body
    );
    platform.run(["-a", LOCAL, "delete", "-y"]).map(drop)
}

/// The names that instances give as their own in answers to `count` requests.
fn instances(platform: &Platform, count: u32) -> Result<BTreeSet<String>> {
    (0..count)
        .map(|_| {
            let answer = platform.get(&format!("{APP}.{DOMAIN}"), "/")?;
            ensure!(answer.status.is_success(), "{}: {}", answer.status, answer.body);
            Ok(answer.body.trim().to_owned())
        })
        .collect()
}

/// The jobs of a process type that are up.
fn up(platform: &Platform, process_type: &str) -> Result<Vec<Job>> {
    let answer = platform.controller(http::Method::GET, &format!("/apps/{APP}/jobs"), "")?;
    let jobs: Vec<Job> = serde_json::from_str(&answer.body).context(answer.body)?;
    Ok(jobs
        .into_iter()
        .filter(|job| job.state == JobState::Up && job.process_type == process_type)
        .collect())
}

fn scaled(platform: &Platform, count: usize) -> Result<Vec<Job>> {
    until(MINUTE, &format!("{count} instances are up"), || {
        let jobs = up(platform, "web")?;
        Ok((jobs.len() == count).then_some(jobs))
    })
}

pub(crate) fn scales(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    platform.run(["-a", APP, "scale", "web=3"])?;
    scaled(platform, 3)?;
    until(MINUTE, "three addresses are in DNS", || {
        let said = platform.run([
            "-a",
            APP,
            "run",
            "--",
            "getent",
            "ahostsv4",
            &format!("{APP}-web.discoverd"),
        ])?;
        let addresses: BTreeSet<_> = said
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        Ok((addresses.len() == 3).then_some(()))
    })?;
    until(MINUTE, "three instances answer", || {
        Ok((instances(platform, 30)?.len() == 3).then_some(()))
    })
}

pub(crate) fn replaces(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    let before = up(platform, "web")?;
    let victim = before.first().context("no instance is up")?.id.clone();
    platform.run(["-a", APP, "kill", &victim])?;
    until(MINUTE, "another instance took its place", || {
        let now = up(platform, "web")?;
        Ok((now.len() == before.len() && now.iter().all(|job| job.id != victim)).then_some(()))
    })?;
    until(MINUTE, "as many instances answer as before", || {
        Ok((instances(platform, 30)?.len() == before.len()).then_some(()))
    })
}

/// Waits until every answer begins with a greeting.
fn greets(platform: &Platform, greeting: &str) -> Result<()> {
    until(MINUTE, &format!("all instances say {greeting:?}"), || {
        let answers = instances(platform, 20)?;
        Ok(answers
            .iter()
            .all(|answer| answer.starts_with(greeting))
            .then_some(()))
    })
}

pub(crate) fn releases(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    platform.run(["-a", APP, "env", "set", "GREETING=Good evening"])?;
    greets(platform, "Good evening from ")?;
    let value = platform.run(["-a", APP, "env", "get", "GREETING"])?;
    ensure!(value.trim() == "Good evening", "env get says {value:?}");
    platform.run(["-a", APP, "release", "rollback", "-y"])?;
    greets(platform, "Hello from ")?;
    let value = platform.output(["-a", APP, "env", "get", "GREETING"])?;
    ensure!(value.stdout.is_empty(), "the rollback kept the environment");
    Ok(())
}

pub(crate) fn logs(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    platform.get(&format!("{APP}.{DOMAIN}"), "/?needle-in-the-log")?;
    until(MINUTE, "the request is in the log", || {
        let log = platform.run(["-a", APP, "log", "-n", "200"])?;
        Ok(log.contains("needle-in-the-log").then_some(()))
    })
}

pub(crate) fn shell(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    let said = platform.run([
        "-a",
        APP,
        "run",
        "--",
        "sh",
        "-c",
        "echo in $FLYNN_APP_NAME; ls /usr/sbin/nginx",
    ])?;
    ensure!(
        said.contains(&format!("in {APP}")) && said.contains("/usr/sbin/nginx"),
        "the shell said {said:?}"
    );
    let output = platform.output([
        "-a",
        APP,
        "run",
        "--",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 42",
    ])?;
    ensure!(
        output.status.code() == Some(42),
        "the exit code was {:?}",
        output.status.code()
    );
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    ensure!(
        stdout.contains("out") && stderr.contains("err"),
        "stdout {stdout:?}, stderr {stderr:?}"
    );
    // In the container of a job that runs, by its type: nginx is pid 1's program there.
    let output = platform.output([
        "-a",
        APP,
        "exec",
        "web",
        "--",
        "sh",
        "-c",
        "cat /proc/[0-9]*/comm; exit 41",
    ])?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.code() == Some(41) && said.contains("nginx"),
        "{:?}: {said:?}, {}",
        output.status.code(),
        String::from_utf8_lossy(&output.stderr)
    );
    // With a terminal, which `script` lends it.
    let mut command = platform.flynn();
    let flynn = command.get_program().display().to_string();
    let line =
        format!("{flynn} -a {APP} run -- sh -c 'test -t 0 && test -t 1 && echo a terminal of $TERM; exit 7'");
    command.env("TERM", "xterm");
    let mut script = std::process::Command::new("script");
    script.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => script.env(name, value),
            None => script.env_remove(name),
        };
    }
    let output = script
        .stdin(std::process::Stdio::null())
        .output()
        .context("cannot run script")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        said.contains("a terminal of xterm"),
        "on a terminal it said {said:?}"
    );
    ensure!(
        output.status.code() == Some(7),
        "on a terminal the exit code was {:?}",
        output.status.code()
    );
    Ok(())
}

pub(crate) fn system_apps(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.platform()?;
    for app in [
        "discoverd",
        "postgres",
        "controller",
        "scheduler",
        "router",
        "blobstore",
        "tarreceive",
    ] {
        let processes = platform.run(["-a", app, "ps"])?;
        ensure!(
            processes.contains("up"),
            "{app} has no process that is up: {processes}"
        );
    }
    let scale = platform.run(["-a", "router", "scale"])?;
    ensure!(scale.contains("app=1"), "the router's scale is {scale:?}");
    let releases = platform.run(["-a", "controller", "release"])?;
    ensure!(!releases.trim().is_empty(), "the controller has no release");
    Ok(())
}
