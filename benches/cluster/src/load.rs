//! A client that asks at a steady rate and forgets nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use flynn_api::client::{Http, full};
use http::header::HOST;
use http::{Request, StatusCode};
use http_body_util::BodyExt as _;

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A request that was not answered as it should be.
#[derive(Clone, Debug)]
pub struct Failure {
    /// When, since the beginning.
    pub at: Duration,
    /// How.
    pub why: String,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Requests that were sent.
    pub sent: u64,
    /// Requests that failed.
    pub failures: Vec<Failure>,
    /// The longest that an answer took.
    pub slowest: Duration,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    sent: AtomicU64,
    report: Mutex<Report>,
}

/// The client.
pub struct Load {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<()>>,
}

impl Load {
    /// Asks the router at `address` for `/` of `host`, `rate` times a second, whether or not answers come.
    pub fn start(address: SocketAddr, host: &str, rate: u32) -> Self {
        let (shared, host) = (Arc::new(Shared::default()), host.to_owned());
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(ask(&for_thread, address, &host, rate))
        });
        Self { shared, thread }
    }

    /// How many requests have been sent.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// Waits for the answers under way and tells.
    pub fn stop(self) -> Result<Report> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the client panicked")??;
        let mut report = self
            .shared
            .report
            .lock()
            .ok()
            .context("the client panicked")?
            .clone();
        report.sent = self.shared.sent.load(Ordering::Relaxed);
        Ok(report)
    }
}

async fn ask(shared: &Arc<Shared>, address: SocketAddr, host: &str, rate: u32) -> Result<()> {
    let http = Http::new(&format!("http://{address}"))?;
    let begun = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate);
    // What was late is made up for: the rate is the client's, not the server's.
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    let mut requests = tokio::task::JoinSet::new();
    while !shared.stop.load(Ordering::Relaxed) {
        ticks.tick().await;
        while requests.try_join_next().is_some() {}
        let (http, shared, host) = (http.clone(), Arc::clone(shared), host.to_owned());
        shared.sent.fetch_add(1, Ordering::Relaxed);
        requests.spawn(async move {
            let at = begun.elapsed();
            let answer = tokio::time::timeout(PATIENCE, request(&http, &host)).await;
            let why = match answer {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(format!("{error:#}")),
                Err(_) => Some(format!("no answer within {} s", PATIENCE.as_secs())),
            };
            if let Ok(mut report) = shared.report.lock() {
                report.slowest = report.slowest.max(begun.elapsed().saturating_sub(at));
                report.failures.extend(why.map(|why| Failure { at, why }));
            }
        });
    }
    while requests.join_next().await.is_some() {}
    Ok(())
}

async fn request(http: &Http, host: &str) -> Result<()> {
    let request = Request::builder().uri("/").header(HOST, host).body(full(""))?;
    let response = http.send_raw(request).await?;
    let status = response.status();
    response
        .into_body()
        .collect()
        .await
        .context("the answer was cut short")?;
    anyhow::ensure!(status == StatusCode::OK, "status {status}");
    Ok(())
}
