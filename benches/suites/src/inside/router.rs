//! Requests through the router, nginx and HAProxy to one and the same instance, in turns, with the CPU that each spent.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flynn_api::client::Http;
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::host::label;
use serde::{Deserialize, Serialize};

use crate::samples::in_turns;

/// How to measure.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    rounds: u32,
    #[arg(long)]
    seconds: u32,
    #[arg(long)]
    host_header: String,
    #[arg(long)]
    service: String,
}

/// What came of it, for one.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Samples {
    /// Requests per second.
    pub(crate) rates: Vec<f64>,
    /// Microseconds of CPU per request.
    pub(crate) micros: Vec<f64>,
}

/// What came of it, for all.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Throughput {
    pub(crate) ours: Samples,
    pub(crate) nginx: Samples,
    pub(crate) haproxy: Samples,
}

/// A proxy under test.
struct Proxy {
    address: SocketAddr,
    /// Its processes are this one and what it started.
    pid: u32,
    samples: Samples,
    /// Set for those that we started.
    child: Option<Child>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // SIGTERM has nginx stop its workers as well.
            if let Some(pid) = rustix::process::Pid::from_raw(child.id().cast_signed()) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
            let _ = child.wait();
        }
    }
}

/// Measures all three in turns.
pub(crate) fn measure(args: &Args) -> Result<Throughput> {
    let (router, backend) = super::runtime()?.block_on(find(&args.service))?;
    eprintln!("    the instance is {backend}");
    let dir = tempfile::tempdir()?;
    let mut proxies = [
        Proxy {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 80)),
            pid: router,
            samples: Samples::default(),
            child: None,
        },
        nginx(dir.path(), backend)?,
        haproxy(dir.path(), backend)?,
    ];
    for proxy in &mut proxies {
        ready(proxy.address)?;
        load(proxy, args, 1).with_context(|| format!("warming {} up", proxy.address))?;
        proxy.samples = Samples::default();
    }
    in_turns(&mut proxies, args.rounds, |proxy| load(proxy, args, args.seconds))?;
    let [ours, nginx, haproxy] = &mut proxies;
    let take = |proxy: &mut Proxy| std::mem::take(&mut proxy.samples);
    Ok(Throughput {
        ours: take(ours),
        nginx: take(nginx),
        haproxy: take(haproxy),
    })
}

/// The router's process and the address of an instance.
async fn find(service: &str) -> Result<(u32, SocketAddr)> {
    let daemon = super::daemon()?;
    let gateway = daemon
        .status()
        .await?
        .gateway
        .context("the host has no network yet")?;
    let jobs = daemon.jobs().await?;
    let router = jobs.values().find(|job| {
        !job.status.is_terminal()
            && job
                .job
                .metadata
                .get(label::APP_NAME)
                .is_some_and(|name| name == "router")
    });
    let router = router
        .and_then(|job| job.pid)
        .context("no router runs on this host")?;
    let url = format!("http://{gateway}:{}", flynn_api::discovery::PORT);
    let instances = DiscoveryClient::new(Http::new(&url)?).instances(service).await?;
    let instance = instances
        .first()
        .with_context(|| format!("{service} has no instance"))?;
    Ok((router, instance.addr.parse().context("the instance's address")?))
}

/// Loads a proxy for so long, notes its rate and cost, and gives the rate.
fn load(proxy: &mut Proxy, args: &Args, seconds: u32) -> Result<f64> {
    let before = cpu(proxy.pid)?;
    let output = Command::new("wrk")
        .args([
            "--threads",
            "1",
            "--connections",
            "64",
            "--duration",
            &format!("{seconds}s"),
        ])
        .arg("--header")
        .arg(format!("Host: {}", args.host_header))
        .arg(format!("http://{}/", proxy.address))
        .output()
        .context("cannot start wrk")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "wrk: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    ensure!(!said.contains("Non-2xx"), "not all answers were good: {said}");
    let spent = cpu(proxy.pid)?.saturating_sub(before);
    let (requests, rate) = read(&said).with_context(|| format!("wrk said {said:?}"))?;
    proxy.samples.rates.push(rate);
    proxy.samples.micros.push(spent.as_secs_f64() * 1e6 / requests);
    Ok(rate)
}

/// Requests in all, and per second.
fn read(said: &str) -> Option<(f64, f64)> {
    let requests = said
        .lines()
        .find_map(|line| line.trim().split_once(" requests in "))?
        .0
        .parse()
        .ok()?;
    let rate = said
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:"))?
        .trim()
        .parse()
        .ok()?;
    (requests > 0.0).then_some((requests, rate))
}

/// The CPU that a process and its descendants have spent.
fn cpu(pid: u32) -> Result<Duration> {
    let stat =
        fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} is gone"))?;
    let ticks = ticks(&stat).with_context(|| format!("/proc/{pid}/stat is odd"))?;
    let own =
        Duration::from_secs_f64(ticks / f64::from(u32::try_from(rustix::param::clock_ticks_per_second())?));
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children
        .split_whitespace()
        .try_fold(own, |sum, child| Ok(sum + cpu(child.parse()?)?))
}

/// `utime` and `stime` (fields 14 and 15), behind the name, which may hold anything.
fn ticks(stat: &str) -> Option<f64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (f64, f64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

fn ready(address: SocketAddr) -> Result<()> {
    let begun = Instant::now();
    while TcpStream::connect(address).is_err() {
        if begun.elapsed() > Duration::from_secs(10) {
            bail!("nothing listens on {address}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn start(command: &mut Command, address: SocketAddr) -> Result<Proxy> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    Ok(Proxy {
        address,
        pid: child.id(),
        samples: Samples::default(),
        child: Some(child),
    })
}

fn nginx(dir: &std::path::Path, backend: SocketAddr) -> Result<Proxy> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 8101));
    let place = dir.display();
    let config = format!(
        "daemon off; user root; worker_processes 1; pid {place}/nginx.pid; error_log stderr crit;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
           access_log off; keepalive_requests 1000000000;\n\
           client_body_temp_path {place}/body; proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/fastcgi;\n\
           uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;\n\
           upstream app {{ server {backend}; keepalive 128; keepalive_requests 1000000000; }}\n\
           server {{ listen {address} backlog=1024; location / {{\n\
             proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection \"\";\n\
             proxy_set_header Host $host; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; }} }}\n\
         }}\n"
    );
    let path = dir.join("nginx.conf");
    fs::write(&path, config)?;
    start(
        Command::new("nginx").arg("-e").arg("stderr").arg("-c").arg(path),
        address,
    )
}

fn haproxy(dir: &std::path::Path, backend: SocketAddr) -> Result<Proxy> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 8102));
    let config = format!(
        "global\n  nbthread 1\n  maxconn 4096\n\
         defaults\n  mode http\n  timeout connect 5s\n  timeout client 1m\n  timeout server 1m\n\
         \x20 http-reuse always\n  option forwardfor\n\
         frontend all\n  bind {address}\n  default_backend app\n\
         backend app\n  server one {backend}\n"
    );
    let path = dir.join("haproxy.cfg");
    fs::write(&path, config)?;
    start(Command::new("haproxy").arg("-db").arg("-f").arg(path), address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_says_is_read() {
        let said = "Running 3s test @ http://x/\n  1 threads\n  158713 requests in 3.00s, 129.58MB read\nRequests/sec:  52890.62\n";
        assert_eq!(read(said), Some((158_713.0, 52_890.62)));
        assert_eq!(read("unable to connect"), None);
    }

    #[test]
    fn processor_time_is_read_behind_any_name() {
        let stat = "7 (a) b c) S 1 7 7 0 -1 0 1 2 3 4 30 12 0 0 20 0 1 0 99";
        assert_eq!(ticks(stat), Some(42.0));
        assert!(cpu(std::process::id()).is_ok());
    }
}
