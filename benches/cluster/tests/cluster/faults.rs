//! What breaks, and that it mends itself.

use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use flynn_api::controller::{Job, JobState};
use flynn_api::host::ActiveJob;
use flynn_cluster_tests::{DOMAIN, Load, Platform, until};

use crate::fixture::{APP, Cluster};

const LIMIT: Duration = Duration::from_mins(2);

/// The jobs of the host, by its own word.
fn jobs(platform: &Platform) -> Result<Vec<ActiveJob>> {
    let curl = [
        "--silent",
        "--show-error",
        "--unix-socket",
        flynn_api::host::SOCKET,
        "http://localhost/host/jobs",
    ];
    let said = platform.host().run("curl", curl)?;
    let jobs: std::collections::BTreeMap<String, ActiveJob> = serde_json::from_str(&said).context(said)?;
    Ok(jobs
        .into_values()
        .filter(|job| !job.status.is_terminal())
        .collect())
}

fn app_of(job: &ActiveJob) -> &str {
    job.job
        .metadata
        .get(flynn_api::host::label::APP_NAME)
        .map_or("", String::as_str)
}

/// The first processes of a system app's jobs.
fn processes(platform: &Platform, app: &str) -> Result<Vec<u32>> {
    let pids: Vec<u32> = jobs(platform)?
        .iter()
        .filter(|job| app_of(job) == app)
        .filter_map(|job| job.pid)
        .collect();
    ensure!(!pids.is_empty(), "{app} has no process");
    Ok(pids)
}

/// Waits until the controller and the host agree on what runs of the example.
fn agree(platform: &Platform) -> Result<()> {
    until(LIMIT, "controller and host agree on what runs", || {
        let answer = platform.controller(http::Method::GET, &format!("/apps/{APP}/jobs"), "")?;
        let known: Vec<Job> = serde_json::from_str(&answer.body).context(answer.body)?;
        let mut known: Vec<_> = known
            .into_iter()
            .filter(|job| job.state == JobState::Up)
            .map(|job| job.id)
            .collect();
        let mut there: Vec<_> = jobs(platform)?
            .into_iter()
            .filter(|job| app_of(job) == APP)
            .map(|job| job.job.id)
            .collect();
        known.sort();
        there.sort();
        ensure!(
            known == there && !known.is_empty(),
            "the controller knows {known:?}, the host has {there:?}"
        );
        Ok(Some(()))
    })
}

pub(crate) fn killed_daemons(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    let before = jobs(platform)?;
    let load = Load::start(platform.router(), &format!("{APP}.{DOMAIN}"), 100);
    let served = |load: &Load, count: u64| {
        let goal = load.sent() + count;
        until(LIMIT, &format!("{count} more requests are sent"), || {
            Ok((load.sent() >= goal).then_some(()))
        })
    };
    served(&load, 100)?;

    let daemon = platform.daemon();
    platform.host().kill(daemon)?;
    for app in ["scheduler", "controller", "discoverd"] {
        // The daemon is dead: ask the kernel for the processes, by what the host said before.
        for pid in before
            .iter()
            .filter(|job| app_of(job) == app)
            .filter_map(|job| job.pid)
        {
            eprintln!("    killing {app}, process {pid} of the host");
            platform.host().signal_process(pid, 9)?;
        }
    }
    ensure!(!platform.host().runs(daemon)?, "the daemon was not killed");
    served(&load, 1000)?;
    platform.host().start(daemon)?;
    until(LIMIT, "all four are back", || {
        for app in ["scheduler", "controller", "discoverd"] {
            let old: Vec<u32> = before
                .iter()
                .filter(|job| app_of(job) == app)
                .filter_map(|job| job.pid)
                .collect();
            if processes(platform, app)?.iter().any(|pid| old.contains(pid)) {
                bail!("{app} was not killed");
            }
        }
        Ok(Some(()))
    })?;
    agree(platform)?;
    served(&load, 200)?;
    let report = load.stop()?;
    eprintln!(
        "    {} requests, {} failed, slowest {:?}",
        report.sent,
        report.failures.len(),
        report.slowest
    );
    ensure!(
        report.failures.is_empty(),
        "requests failed, first {:?}",
        &report.failures[..report.failures.len().min(5)]
    );

    // The same containers as before: nobody was restarted who was not killed.
    let after = jobs(platform)?;
    for job in before
        .iter()
        .filter(|job| [APP, "router", "postgres", "blobstore"].contains(&app_of(job)))
    {
        let same = after
            .iter()
            .any(|now| now.job.id == job.job.id && now.pid == job.pid);
        ensure!(same, "{} of {} did not live through it", job.job.id, app_of(job));
    }
    // And the platform is of use again.
    platform.run(["-a", APP, "env", "set", "GREETING=Back again"])?;
    until(LIMIT, "a deployment goes through", || {
        Ok(platform
            .answers(APP, LIMIT)?
            .body
            .starts_with("Back again")
            .then_some(()))
    })
}

pub(crate) fn renewal(cluster: &mut Cluster) -> Result<()> {
    const CERTIFICATES: &str = "cd /var/lib/flynn/tls; cat cert.pem; cat apps/discoverd/cert.pem";
    let platform = cluster.app()?;
    let host = platform.host();
    let before = (
        host.run("sh", ["-ec", CERTIFICATES])?,
        processes(platform, "discoverd")?,
    );
    let load = Load::start(platform.router(), &format!("{APP}.{DOMAIN}"), 50);
    let renewed = host.run("flynn-host", ["renew"])?;
    ensure!(
        ["this host", "discoverd", "controller", "postgres"]
            .iter()
            .all(|name| renewed.contains(name)),
        "only these were renewed: {renewed}"
    );
    ensure!(
        host.run("sh", ["-ec", CERTIFICATES])? != before.0,
        "they are the same"
    );
    // Without a restart: `loaded` is what it uses, beside what is in the files.
    until(LIMIT, "discoverd uses its own", || {
        let status: serde_json::Value =
            serde_json::from_str(&host.run("flynn-host", ["ca", "status", "--json"])?)?;
        let kept = status["certificates"].as_array().cloned().unwrap_or_default();
        let kept = kept.into_iter().find(|kept| kept["name"] == "discoverd");
        let kept = kept.map(|kept| kept["fingerprint"].clone());
        Ok((kept.as_ref() == Some(&status["cluster"]["loaded"]["certificate"])).then_some(()))
    })?;
    ensure!(
        processes(platform, "discoverd")? == before.1,
        "discoverd was restarted for its certificate"
    );
    let rotated = host.run("flynn-host", ["ca", "rotate"])?;
    ensure!(
        rotated.contains("done: "),
        "the CA's root was not replaced: {rotated}"
    );
    until(LIMIT, "controller and host speak with theirs", || {
        platform.run(["-a", APP, "run", "--", "true"]).map(Some)
    })?;
    until(LIMIT, "the host is registered with its own", || {
        host.run("flynn-host", ["token"]).map(Some)
    })?;
    let report = load.stop()?;
    ensure!(
        report.failures.is_empty(),
        "requests failed meanwhile: {:?}",
        report.failures.first()
    );
    Ok(())
}

pub(crate) fn full_disk(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    let before = platform.run(["-a", APP, "release", "show"])?;
    // Reserved without being written, but for the last bit.
    let fill = "cd /var/lib/flynn; fallocate -l $(($(stat -f -c '%f * %S' .) - 100000000)) filler; \
                dd if=/dev/zero of=filler bs=1M oflag=append conv=notrunc 2>/dev/null; df . | tail -1";
    let filled = platform.host().run("sh", ["-c", fill])?;
    eprintln!("    the disk is full: {}", filled.trim());
    let load = Load::start(platform.router(), &format!("{APP}.{DOMAIN}"), 20);
    let said = complaints(platform);
    platform.host().run("rm", ["/var/lib/flynn/filler"])?;
    said?;
    let report = load.stop()?;
    ensure!(
        report.failures.is_empty(),
        "requests failed while the disk was full: {:?}",
        report.failures.first()
    );
    let after = until(LIMIT, "the database is back by itself", || {
        platform.run(["-a", APP, "release", "show"]).map(Some)
    })?;
    ensure!(after == before, "the release changed");
    until(LIMIT, "commands run again", || {
        Ok(platform
            .output(["-a", APP, "run", "--", "true"])?
            .status
            .success()
            .then_some(()))
    })
}

/// Whoever wants for room says so: the host, the database that cannot make a table longer, and the one whose server has
/// ended since it could not go on with its log.
fn complaints(platform: &Platform) -> Result<()> {
    says_full(&platform.refused(["-a", APP, "run", "--", "true"])?)?;

    let large = format!("LARGE={}", "0123456789abcdef".repeat(6000));
    until(LIMIT, "a table wants to grow", || {
        let output = platform
            .flynn()
            .args(["-a", APP, "env", "set", &large])
            .output()?;
        Ok(refusal(&output))
    })
    .and_then(|said| says_full(&said))?;

    let postgres = processes(platform, "postgres")?[0].to_string();
    let write = "psql -qh /data/run -U flynn flynn -c \
                 \"SELECT pg_logical_emit_message(true, 'test', repeat('x', 8000000)) FROM generate_series(1, 16)\"";
    until(
        5 * LIMIT,
        "the log wants to grow and the database is away",
        || {
            let inside = ["--target", &postgres, "--all", "sh", "-c", write];
            platform.host().exec("nsenter", inside)?;
            let output = platform.output(["apps"])?;
            Ok(refusal(&output))
        },
    )
    .and_then(|said| says_full(&said))
}

fn refusal(output: &Output) -> Option<String> {
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

fn says_full(said: &str) -> Result<()> {
    eprintln!("      refused: {}", said.trim());
    ensure!(
        said.contains("disk") && said.contains("full") && said.contains("make room"),
        "what is full, and what to do, is not said: {said}"
    );
    Ok(())
}

pub(crate) fn power_cut(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    // What was acknowledged a moment before is on the disk.
    platform.run(["-a", APP, "env", "set", "KEPT=through the cut"])?;
    platform.host().power_cut()?;
    ensure!(
        platform.get(&format!("{APP}.{DOMAIN}"), "/").is_err(),
        "something answers without power"
    );
    platform.host().boot()?;
    until(LIMIT, "the app answers again by itself", || {
        let answer = platform.get(&format!("{APP}.{DOMAIN}"), "/")?;
        ensure!(
            answer.status.is_success(),
            "{}: {}",
            answer.status,
            answer.body.trim()
        );
        Ok(Some(()))
    })?;
    agree(platform)?;
    let value = platform.run(["-a", APP, "env", "get", "KEPT"])?;
    ensure!(
        value.trim() == "through the cut",
        "the release from before the cut is lost: {value:?}"
    );
    platform.run(["-a", APP, "env", "set", "GREETING=After the cut"])?;
    until(LIMIT, "a deployment goes through", || {
        Ok(platform
            .answers(APP, LIMIT)?
            .body
            .starts_with("After the cut")
            .then_some(()))
    })
}

pub(crate) fn down(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.take()?;
    let (name, dir) = (platform.lab().name().to_owned(), platform.lab().dir().to_owned());
    platform.down()?;
    crate::traces::none(&name, &dir)
}
