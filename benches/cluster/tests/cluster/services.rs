//! Virtual addresses of services, as an app sees them.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flynn_api::discovery::{Instance, ServiceInfo, VirtualNetworks};
use flynn_cluster_tests::{Platform, until};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::fixture::{APP, Cluster};

const MINUTE: Duration = Duration::from_mins(1);

/// A service of the test's own, whose leader it sets.
const CHOSEN: &str = "chosen";

/// Asks whoever is at `$1:$2`, and says what it answered.
const ASK: &str =
    "ask() { exec 3<>/dev/tcp/$1/$2 && printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && tail -n1 <&3; }";

pub(crate) fn reached(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    let (service, port) = serving(platform, 1)?;
    let info: ServiceInfo = discoverd(platform, "GET", &format!("/services/{service}"), None::<&()>)?;
    let addresses = info.addresses.context("the service has no virtual addresses")?;
    let networks = VirtualNetworks::default();
    ensure!(networks.ipv4.contains(&addresses.ipv4) && networks.ipv6.contains(&addresses.leader_ipv6));
    // By name and by number, over IPv4 and IPv6.
    for to in [
        format!("vip.{service}.discoverd"),
        format!("vip.leader.{service}.discoverd"),
        addresses.ipv4.to_string(),
        addresses.leader_ipv6.to_string(),
    ] {
        let said = in_app(platform, &format!("{ASK}; ask {to} {port}"))?;
        ensure!(said.contains(" from "), "{to} said {said:?}");
    }
    // PostgreSQL answers a question about encryption with one letter.
    let said = in_app(
        platform,
        "exec 3<>/dev/tcp/vip.leader.postgres.discoverd/5432; \
         printf '\\x00\\x00\\x00\\x08\\x04\\xd2\\x16\\x2f' >&3; head -c1 <&3",
    )?;
    ensure!(matches!(said.trim(), "S" | "N"), "PostgreSQL said {said:?}");
    // Nobody there: at once, and not after a timeout.
    let none = networks.addresses(networks.greatest()).ipv4;
    let begun = Instant::now();
    let said = in_app(platform, &format!("exec 3<>/dev/tcp/{none}/80 || echo refused"))?;
    ensure!(
        said.contains("refused") && begun.elapsed() < Duration::from_secs(20),
        "{said:?}"
    );
    Ok(())
}

/// A process in a container's network that is in no job's cgroup: its packets go to virtual addresses.
pub(crate) fn bypassed(cluster: &mut Cluster) -> Result<()> {
    // From the first container that is not an instance itself.
    const ASK_FROM_OUTSIDE: &str = "own=$(readlink /proc/self/ns/net); \
        for process in /proc/[0-9]*; do \
            there=$(readlink \"$process/ns/net\") && [ \"$there\" != \"$own\" ] || continue; \
            address=$(nsenter --net=\"$process/ns/net\" ip -4 -o addr show eth0) || continue; \
            echo \"$address\" | grep -qwF \"$2\" && continue; \
            exec nsenter --net=\"$process/ns/net\" curl -gsS --max-time 20 \"$1\"; \
        done; echo 'there is no other container'; exit 1";
    let platform = cluster.app()?;
    let (service, port) = serving(platform, 1)?;
    let info: ServiceInfo = discoverd(platform, "GET", &format!("/services/{service}"), None::<&()>)?;
    let addresses = info.addresses.context("the service has no virtual addresses")?;
    let path = format!("/services/{service}/instances");
    let instances: Vec<Instance> = discoverd(platform, "GET", &path, None::<&()>)?;
    let instances: Vec<_> = instances
        .iter()
        .filter_map(|instance| Some(instance.addr.rsplit_once(':')?.0))
        .collect();
    for url in [
        format!("http://{}:{port}/", addresses.ipv4),
        format!("http://[{}]:{port}/", addresses.ipv6),
    ] {
        let arguments = ["-c", ASK_FROM_OUTSIDE, "sh", &url, &instances.join("\n")];
        let output = platform.host().exec("sh", arguments)?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success() && said.contains(" from "),
            "{url} said {said:?} {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

pub(crate) fn leader_changes(cluster: &mut Cluster) -> Result<()> {
    let platform = cluster.app()?;
    let (service, port) = serving(platform, 2)?;
    let instances: Vec<Instance> = discoverd(
        platform,
        "GET",
        &format!("/services/{service}/instances"),
        None::<&()>,
    )?;
    let [a, b, ..] = &instances[..] else {
        bail!("there are no two instances")
    };
    let config = serde_json::json!({ "leader_type": "manual" });
    discoverd::<serde_json::Value>(platform, "PUT", &format!("/services/{CHOSEN}"), Some(&config))?;
    lead(platform, a, &[a, b])?;

    // One that waits for the leader to say something, as a database's client would.
    let script = format!(
        "exec 4<>/dev/tcp/vip.leader.{CHOSEN}.discoverd/{port}; echo connected; cat <&4 2>&1; echo ended"
    );
    let mut waiting = platform.flynn();
    waiting.args(["-a", APP, "run", "--", "bash", "-c", &script]);
    let mut waiting = waiting.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    let mut said = BufReader::new(waiting.stdout.take().context("no stdout")?);
    let mut line = String::new();
    while line.trim() != "connected" {
        line.clear();
        ensure!(
            said.read_line(&mut line)? > 0,
            "the client ended before it was connected"
        );
    }

    let begun = Instant::now();
    lead(platform, b, &[a, b])?;
    let mut rest = String::new();
    said.read_to_string(&mut rest)?;
    let took = begun.elapsed();
    waiting.wait()?;
    eprintln!(
        "      the client of the deposed leader was told after {} ms: {}",
        took.as_millis(),
        rest.trim()
    );
    ensure!(
        rest.contains("abort") && rest.contains("ended"),
        "the client was told {rest:?}"
    );
    ensure!(
        took < Duration::from_secs(10),
        "the client was told after {took:?}"
    );

    // Whoever asks now asks the new one, by the same name and address. Nobody beats for these instances, which are gone
    // after ten seconds.
    let address = b.addr.rsplit_once(':').context("an instance without a port")?.0;
    until(MINUTE, "the new leader is asked", || {
        lead(platform, b, &[a, b])?;
        let said = in_app(
            platform,
            &format!("{ASK}; for i in 1 2 3; do ask vip.leader.{CHOSEN}.discoverd {port}; done"),
        )?;
        ensure!(
            said.lines()
                .filter(|line| line.contains(&format!(" at {address}")))
                .count()
                == 3,
            "{said:?}"
        );
        Ok(Some(()))
    })?;
    discoverd::<serde_json::Value>(platform, "DELETE", &format!("/services/{CHOSEN}"), None::<&()>).map(drop)
}

/// A client that never stops asking for the leader, while the leader's job is killed.
pub(crate) fn goes_on(cluster: &mut Cluster) -> Result<()> {
    const REQUESTS: usize = 80;
    let platform = cluster.app()?;
    let (service, port) = serving(platform, 2)?;
    let leader: Instance = discoverd(
        platform,
        "GET",
        &format!("/services/{service}/leader"),
        None::<&()>,
    )?;
    let job = leader
        .meta
        .get("FLYNN_JOB_ID")
        .context("the leader names no job")?
        .clone();
    let script = format!(
        "{ASK}; for i in $(seq {REQUESTS}); do ask vip.leader.{service}.discoverd {port} || echo failed; sleep 0.1; done"
    );
    let mut asking = platform.flynn();
    asking.args(["-a", APP, "run", "--", "bash", "-c", &script]);
    let mut asking = asking.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    let mut lines = BufReader::new(asking.stdout.take().context("no stdout")?).lines();
    let mut said = Vec::new();
    while said.len() < 5 {
        said.push(lines.next().context("the client ended early")??);
    }
    platform.run(["-a", APP, "kill", &job])?;
    for line in lines {
        said.push(line?);
    }
    asking.wait()?;
    let (first, last) = (&said[0], &said[said.len() - 1]);
    let failed = said.iter().filter(|line| !line.contains(" from ")).count();
    eprintln!(
        "      {failed} of {} requests failed; first {first:?}, last {last:?}",
        said.len()
    );
    ensure!(
        first.contains(" from ") && last.contains(" from ") && first != last,
        "the leader has not changed"
    );
    ensure!(
        said.len() == REQUESTS && failed <= 1,
        "{failed} of {} requests failed",
        said.len()
    );
    Ok(())
}

/// The app's service with at least so many instances, and their port.
fn serving(platform: &Platform, least: usize) -> Result<(String, u16)> {
    let service = format!("{APP}-web");
    if least > 1 {
        platform.run(["-a", APP, "scale", &format!("web={least}")])?;
    }
    let instances = until(MINUTE, "the instances are registered", || {
        let path = format!("/services/{service}/instances");
        let instances: Vec<Instance> = discoverd(platform, "GET", &path, None::<&()>)?;
        Ok((instances.len() >= least).then_some(instances))
    })?;
    let (_, port) = instances[0]
        .addr
        .rsplit_once(':')
        .context("an instance without a port")?;
    Ok((service, port.parse()?))
}

/// Makes one of the instances lead the service of the test's own.
fn lead(platform: &Platform, leader: &Instance, instances: &[&Instance]) -> Result<()> {
    for instance in instances {
        let path = format!("/services/{CHOSEN}/instances/{}", instance.id);
        discoverd::<serde_json::Value>(platform, "PUT", &path, Some(instance))?;
    }
    discoverd::<serde_json::Value>(
        platform,
        "PUT",
        &format!("/services/{CHOSEN}/leader"),
        Some(leader),
    )
    .map(drop)
}

fn in_app(platform: &Platform, script: &str) -> Result<String> {
    platform.run(["-a", APP, "run", "--", "bash", "-c", script])
}

/// Asks the first host's discoverd, as that host.
fn discoverd<T: DeserializeOwned>(
    platform: &Platform,
    method: &str,
    path: &str,
    body: Option<&impl Serialize>,
) -> Result<T> {
    const TLS: &str = "--cacert /var/lib/flynn/tls/ca.pem --cert /var/lib/flynn/tls/cert.pem \
                       --key /var/lib/flynn/tls/key.pem";
    let body = body.map(serde_json::to_string).transpose()?;
    let data = if body.is_some() {
        "-H 'content-type: application/json' -d @-"
    } else {
        ""
    };
    let body = body.unwrap_or_default();
    let port = flynn_api::discovery::PORT;
    let script = format!(
        "address=$(ip -4 -o addr show scope global | grep -v flynn0 | head -n1 | sed 's/.*inet \\([0-9.]*\\).*/\\1/'); \
         printf %s \"$1\" | curl -sS --fail-with-body --max-time 10 {TLS} -X {method} {data} \
         https://$address:{port}{path}"
    );
    let output = platform.host().exec("sh", ["-c", &script, "sh", &body])?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "{method} {path}: {said} {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let said = if said.trim().is_empty() {
        "null"
    } else {
        said.trim()
    };
    serde_json::from_str(said).with_context(|| format!("{method} {path} answers {said:?}"))
}
